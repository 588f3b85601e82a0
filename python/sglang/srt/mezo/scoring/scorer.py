"""Scores of a batch of examples at several points: the one path for training and evaluation."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.tokens import common_length
from sglang.srt.mezo.engine.forward import Sequenced, before, extend, extend_into
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.head import Head
from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.engine.points import Point, PointGroup
from sglang.srt.mezo.engine.prefix import BasePrefixes, PrefixStats
from sglang.srt.mezo.scoring.plan import ExamplePlan, PrefixScope, Row, needs_normaliser
from sglang.srt.mezo.scoring.sharing import SharedPrefix, plan_shared_prefixes

# Of the KV pool that the prefixes of one pass may fill, and what goes on over many passes: the first, or as much as may
# be kept, up to the second.
_PREFIX_SHARE, _MOST_PREFIX_SHARE = 0.25, 0.5
_PASS_SHARE = 0.75  # of the KV pool for all tokens of a pass
_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Item:
    """A row under one point.

    Attributes:
        number: of the point among all.
        plan: number of the row's plan.
        first_read: the column of its first value.
    """

    number: int
    point: Point
    plan: int
    row: Row
    first_read: int


@dataclass(frozen=True)
class Ran:
    """What a pass has computed, good until its KV is given back.

    Attributes:
        hidden: [tokens, hidden size].
        rows: item -> for every token of its suffix the row of ``hidden``.
        order: the items of ``sequences``.
        kv_indices: int64 [tokens].
    """

    hidden: torch.Tensor
    rows: dict[int, list[int]]
    order: tuple[int, ...]
    sequences: list[Sequenced]
    kv_indices: torch.Tensor

    def places(self) -> dict[int, torch.Tensor]:
        """Item -> int64 places in the KV pool of all its tokens, and of what its point has before them."""
        new = self.kv_indices.split([len(sequence.tokens) for sequence in self.sequences])
        return {number: torch.cat(parts) for number, *parts in zip(self.order, before(self.sequences, new), new)}


class Scorer:
    """Scores plans on an engine.

    Args:
        scope: where the prefixes of the plans hold; see ``plan.PREFIX_SCOPE``.
        max_tokens: most tokens run in one forward pass; a single example may exceed it. May be set anew between two
            passes.
        prefix_reuse: False runs every prefix anew in every row: same losses, no sharing, to check the sharing by. So
            it is in an engine without a prefix cache.
        kept_tokens: most tokens of base-model prefixes that stay locked in the tree between passes.
    """

    def __init__(
        self, handle: EngineHandle, scope: PrefixScope, max_tokens: int, prefix_reuse: bool = True, kept_tokens: int = 0
    ):
        self._handle = handle
        self.scope = scope
        most = int(_MOST_PREFIX_SHARE * handle.kv_capacity)
        self._prefix_room = max(int(_PREFIX_SHARE * handle.kv_capacity), min(kept_tokens, most))
        self.prefix_reuse = prefix_reuse and (
            scope is not PrefixScope.BASE or handle.tree_cache.supports_prefix_sharing()
        )
        self.head = Head(handle)
        self.during_prefixes: Callable[[], AbstractContextManager[None]] = nullcontext
        self.prefix_stats = PrefixStats()
        self.base_prefixes = BasePrefixes(handle, max_tokens, self.prefix_stats, kept_tokens)
        # In an encoder the KV of a beginning depends on what follows it.
        self._shares_in_slots = self.prefix_reuse and handle.writes_kv_first and handle.is_causal
        self.max_tokens = max_tokens

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, tokens: int) -> None:
        self._max_tokens = self.base_prefixes.max_tokens = tokens

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], objective: Objective, keep: bool = True
    ) -> Passes[torch.Tensor]:
        """Read every scored token of every plan at every point, a forward pass of at most ``max_tokens`` at a time.

        Between passes nothing is held but locks on kept prefixes: neither rows nor KV tokens outside of the tree.

        Args:
            keep: base-model prefixes may stay locked afterwards.

        Returns:
            float32 [points, reads] on the CPU: log-probabilities, or logits where the normaliser cancels. Points are in
            the order of ``groups``, reads in the order of plans, rows and ``Row.reads``.
        """
        normalise = needs_normaliser(plans, objective)
        num_reads = sum(len(row.reads) for plan in plans for row in plan.rows)
        values = torch.empty(sum(map(len, groups)), num_reads)
        for items in self.batches(plans, groups):
            yield from self.prepare(items)
            with self.running(items, keep) as ran:
                read = self._read(ran, items, normalise)
            for item, part in zip(items, read.split([len(item.row.reads) for item in items])):
                values[item.number, item.first_read : item.first_read + part.numel()] = part
            yield
        return values

    def prepare(self, items: Sequence[Item]) -> Passes[None]:
        """Compute the base-model prefixes of the items that the tree lacks, where they are shared."""
        if self.prefix_reuse and self.scope is PrefixScope.BASE:
            with self.during_prefixes():
                yield from self.base_prefixes.prepare(item.row.prefix for item in items)

    def prefix_passes(self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup]) -> Passes[None]:
        """Compute the base-model prefixes that the tree lacks, in the very batches in which ``passes`` would."""
        for items in self.batches(plans, groups):
            yield from self.base_prefixes.prepare(item.row.prefix for item in items)
            yield

    def batches(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], new_tokens: int = 0
    ) -> Iterator[list[Item]]:
        """Pack (example, group of points) units up to the token budget, the free rows and the room for prefixes, point
        after point.

        Args:
            new_tokens: that follow on each row later; the rows are held until then.
        """
        batch: list[Item] = []
        tokens, held, prefixes, before = 0, 0, _Prefixes(), None
        for unit in _units(plans, groups, points_first=self.scope is PrefixScope.SLOT):
            cost, longer = self._cost(unit, before), prefixes.with_unit(unit)
            more = self.tokens_of(unit.items, new_tokens) if new_tokens else 0
            full = tokens + cost > self._max_tokens or len(batch) + len(unit.items) > self._handle.free_rows
            if batch and (full or not self._has_room(longer.tokens, tokens + cost, held + more)):
                yield sorted(batch, key=lambda item: item.number)
                batch, tokens, held, cost, longer = [], 0, 0, self._cost(unit, None), _Prefixes().with_unit(unit)
            batch += unit.items
            tokens, held, prefixes, before = tokens + cost, held + more, longer, unit
        yield sorted(batch, key=lambda item: item.number)

    def tokens_of(self, items: Sequence[Item], new_tokens: int) -> int:
        """Of the KV pool, that so many more on each item take beside the prefixes that are shared."""
        shared = self.prefix_reuse
        return sum((0 if shared else len(item.row.prefix)) + len(item.row.suffix) + new_tokens for item in items)

    def _has_room(self, prefix_tokens: int, tokens: int, held: int) -> bool:
        most = _PASS_SHARE * self._handle.kv_capacity
        return max(prefix_tokens, held) <= self._prefix_room and prefix_tokens + max(tokens, held) <= most

    def _cost(self, unit: "_Unit", before: "_Unit | None") -> int:
        """Tokens that the unit runs, after ``before`` in the same pass.

        A base-model prefix is not counted, as it is computed once for many steps, nor what a point shares with the unit
        before.
        """
        if not self.prefix_reuse:
            return sum(len(item.row.prefix) + len(item.row.suffix) for item in unit.items)
        if not self._shares_in_slots:
            return sum(len(item.row.suffix) for item in unit.items)
        shared = 0
        if before is not None and before.group == unit.group:
            a, b = before.items[-1].row, unit.items[0].row
            shared = common_length(a.suffix, b.suffix[:-1]) if a.prefix == b.prefix else 0
        return len(unit.group) * (unit.plan.slot_tokens - shared)

    @contextmanager
    def running(self, items: Sequence[Item], keep: bool, places: torch.Tensor | None = None) -> Iterator[Ran]:
        """Run the items in one pass; their KV and the locks on their prefixes are held for the duration.

        Args:
            keep: base-model prefixes may stay locked afterwards.
            places: of the caller's in the KV pool, for ``tokens_of`` the items at least; by default they are taken and
                given back.
        """
        borrowed = self._borrowed(items)
        with self._base(items, keep) as base:
            sequences = self._sequences(items, borrowed, base)
            if places is None:
                hidden, kv_indices = extend(self._handle, sequences)
            else:
                kv_indices = places[: sum(len(sequence.tokens) for sequence in sequences)]
                hidden = extend_into(self._handle, sequences, kv_indices)
            try:
                yield Ran(hidden, self._hidden_rows(items, borrowed), tuple(borrowed), sequences, kv_indices)
            finally:
                if not hidden.isfinite().all():  # of a point that has diverged
                    erase(self._handle.kv_allocator.get_kvcache(), kv_indices)
                if places is None:
                    self._handle.kv_allocator.free(kv_indices)

    def _borrowed(self, items: Sequence[Item]) -> dict[int, SharedPrefix]:
        """Item -> the tokens of its suffix that another item runs, in the order in which they run."""
        if not self._shares_in_slots:
            return {number: SharedPrefix(None, 0) for number in range(len(items))}
        keys = [(item.point, item.row.prefix) for item in items]
        number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        borrowed = plan_shared_prefixes([item.row.suffix for item in items], [number_of[key] for key in keys])
        self._count_shared(borrowed)
        return borrowed

    def _count_shared(self, borrowed: dict[int, SharedPrefix]) -> None:
        """What a row runs and others borrow is computed; it and what is borrowed are read."""
        lengths = [one.length for one in borrowed.values()]
        lent = sum(max(0, after - own) for own, after in zip(lengths, lengths[1:]))
        self.prefix_stats.computed += lent
        self.prefix_stats.total += lent + sum(lengths)

    @contextmanager
    def _base(self, items: Sequence[Item], keep: bool):
        """Prefix -> KV indices of the base model: none where prefixes are run anew."""
        prefix_tokens = sum(len(item.row.prefix) for item in items)
        self.prefix_stats.total += prefix_tokens
        if not self.prefix_reuse:
            self.prefix_stats.computed += prefix_tokens
            yield {item.row.prefix: _NOTHING for item in items}
            return
        tokens = sum(len(item.row.suffix) for item in items)
        with self.base_prefixes.acquire((item.row.prefix for item in items), tokens, keep) as base:
            yield base

    def _sequences(
        self, items: Sequence[Item], borrowed: dict[int, SharedPrefix], base: dict[tuple[int, ...], torch.Tensor]
    ) -> list[Sequenced]:
        """In the order of ``borrowed``."""
        place = {number: place for place, number in enumerate(borrowed)}
        sequences = []
        for number, taken in borrowed.items():
            item = items[number]
            point, on_base = item.point, item.row.prefix[len(base[item.row.prefix]) :]
            own = item.row.suffix[taken.length :]
            segments = ((point.adapter, len(own)),)
            if on_base and self.scope is PrefixScope.BASE:
                segments = ((None, len(on_base)), *segments)
            first = len(point.cached) + len(item.row.prefix) + taken.length
            follows = None if taken.row is None else (place[taken.row], first)
            cached = [places for places in (point.cached, base[item.row.prefix]) if len(places)]
            sequences.append(
                Sequenced(torch.cat(cached) if cached else _NOTHING, on_base + own, segments, follows, point.shift)
            )
        return sequences

    def _read(self, ran: Ran, items: Sequence[Item], normalise: bool) -> torch.Tensor:
        """The values of the items, one after the other; a token that was borrowed is read where it ran."""
        rows = [ran.rows[number][position] for number, item in enumerate(items) for position, _ in item.row.reads]
        tokens = [token for item in items for _, token in item.row.reads]
        rows, tokens = (torch.tensor(column, device=ran.hidden.device) for column in (rows, tokens))
        read = self.head.log_probs if normalise else self.head.logits
        with torch.inference_mode():
            return read(ran.hidden, rows, tokens).cpu()

    def _hidden_rows(self, items: Sequence[Item], borrowed: dict[int, SharedPrefix]) -> dict[int, list[int]]:
        """Item -> for every token of its suffix the row of the hidden states."""
        rows_of: dict[int, list[int]] = {}
        end = 0
        for number, taken in borrowed.items():
            row = items[number].row
            end += (0 if self.prefix_reuse else len(row.prefix)) + len(row.suffix) - taken.length
            first = [] if taken.row is None else rows_of[taken.row][: taken.length]
            rows_of[number] = [*first, *range(end - len(row.suffix) + taken.length, end)]
        return rows_of


@dataclass(frozen=True)
class _Unit:
    """What must share a pass: all rows of one example under one group of points."""

    plan: ExamplePlan
    group: PointGroup
    items: list[Item]


@dataclass(frozen=True)
class _Prefixes:
    """Base-model prefixes of a batch in the making."""

    texts: frozenset[tuple[int, ...]] = frozenset()
    tokens: int = 0

    def with_unit(self, unit: _Unit) -> "_Prefixes":
        new = {item.row.prefix for item in unit.items} - self.texts
        return _Prefixes(self.texts | new, self.tokens + sum(map(len, new))) if new else self


def _units(plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], points_first: bool) -> Iterator[_Unit]:
    """Units that follow each other share what is worth most: a base-model prefix, or with
    ``points_first`` the point."""
    reads = [sum(len(row.reads) for row in plan.rows) for plan in plans]
    first_reads = [0, *itertools.accumulate(reads)]
    first_points = [0, *itertools.accumulate(map(len, groups))]
    if points_first:
        order = ((plan, group) for group in range(len(groups)) for plan in range(len(plans)))
    else:
        order = ((plan, group) for plan in range(len(plans)) for group in range(len(groups)))
    for plan, group in order:
        rows = plans[plan].rows
        columns = list(itertools.accumulate((len(row.reads) for row in rows), initial=first_reads[plan]))
        items = [
            Item(number, point, plan, row, column)
            for number, point in enumerate(groups[group], first_points[group])
            for row, column in zip(rows, columns)
        ]
        yield _Unit(plans[plan], groups[group], items)
