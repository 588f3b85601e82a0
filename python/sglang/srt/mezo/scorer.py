"""Scores of a batch of examples under several adapter slots: the one path for training and evaluation."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sglang.srt.mezo.config import Objective
from sglang.srt.mezo.engine import EngineHandle
from sglang.srt.mezo.forward import Sequenced, extend
from sglang.srt.mezo.head import Head
from sglang.srt.mezo.passes import Passes, drain
from sglang.srt.mezo.plan import ExamplePlan, PrefixScope, Row, needs_normaliser
from sglang.srt.mezo.prefix import BasePrefixes, Beginning, PrefixStats, SlotPrefixes, SlotRow
from sglang.srt.mezo.sharing import PASS_COST, common_length

SlotGroup = tuple[str | None, ...]
"""Adapter ids that are scored in the same pass: both signs of a direction, or one adapter alone."""

_PREFIX_SHARE = 0.25  # of the KV pool that the prefixes of one pass may fill
_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class _Item:
    """A row in one slot; ``first_read`` is the column of its first value."""

    slot: int
    lora_id: str | None
    row: Row
    first_read: int


class Scorer:
    """Scores plans on an engine.

    Args:
        scope: where the prefixes of the plans hold; see ``plan.PREFIX_SCOPE``.
        max_tokens: most tokens run in one forward pass; a single example may exceed it.
        prefix_reuse: False runs every prefix anew in every row: same losses, no sharing, to check the sharing by.
        kept_tokens: most tokens of base-model prefixes that stay locked in the tree between passes.
    """

    def __init__(self, handle: EngineHandle, scope: PrefixScope, max_tokens: int, prefix_reuse: bool = True, kept_tokens: int = 0):
        self._handle = handle
        self._scope = scope
        self._max_tokens = max_tokens
        self._prefix_reuse = prefix_reuse
        self._head = Head(handle)
        self.prefix_stats = PrefixStats()
        self.base_prefixes = BasePrefixes(handle, max_tokens, self.prefix_stats, kept_tokens)
        self._slot_prefixes = SlotPrefixes(handle, max_tokens, self.prefix_stats)

    def score(self, plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup], objective: Objective) -> torch.Tensor:
        """All of ``passes`` at once."""
        return drain(self.passes(plans, groups, objective))

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup], objective: Objective, keep: bool = True
    ) -> Passes[torch.Tensor]:
        """Read every scored token of every plan in every slot, a forward pass of at most ``max_tokens`` at a time.

        Between passes nothing is held but locks on kept prefixes: neither rows nor KV tokens outside of the tree.

        Args:
            keep: base-model prefixes may stay locked afterwards.

        Returns:
            float32 [slots, reads] on the CPU: log-probabilities, or logits where the normaliser cancels. Slots are in
            the order of ``groups``, reads in the order of plans, rows and ``Row.reads``.
        """
        normalise = needs_normaliser(plans, objective)
        num_reads = sum(len(row.reads) for plan in plans for row in plan.rows)
        values = torch.empty(sum(map(len, groups)), num_reads)
        for items in self._batches(plans, groups):
            if self._prefix_reuse and self._scope is PrefixScope.BASE:
                yield from self.base_prefixes.prepare(item.row.prefix for item in items)
            read = self._score_items(items, normalise, keep)
            for item, part in zip(items, read.split([len(item.row.reads) for item in items])):
                values[item.slot, item.first_read : item.first_read + part.numel()] = part
            yield
        return values

    def prefix_passes(self, plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup]) -> Passes[None]:
        """Compute the base-model prefixes that the tree lacks, in the very batches in which ``passes`` would."""
        for items in self._batches(plans, groups):
            yield from self.base_prefixes.prepare(item.row.prefix for item in items)
            yield

    def _batches(self, plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup]) -> Iterator[list[_Item]]:
        """Pack (example, slot group) units up to the token budget, the free rows and the room for prefixes, slot after slot."""
        batch: list[_Item] = []
        tokens, prefixes, before = 0, _Prefixes(), None
        for unit in _units(plans, groups, slots_first=self._scope is PrefixScope.SLOT):
            cost, longer = self._cost(unit, before), prefixes.with_unit(unit)
            full = tokens + cost > self._max_tokens or len(batch) + len(unit.items) > self._handle.free_rows
            if batch and (full or longer.tokens > _PREFIX_SHARE * self._handle.kv_capacity):
                yield sorted(batch, key=lambda item: item.slot)
                batch, tokens, cost, longer = [], 0, self._cost(unit, None), _Prefixes().with_unit(unit)
            batch += unit.items
            tokens, prefixes, before = tokens + cost, longer, unit
        yield sorted(batch, key=lambda item: item.slot)

    def _cost(self, unit: "_Unit", before: "_Unit | None") -> int:
        """Tokens that the unit runs, after ``before`` in the same pass.

        A base-model prefix is not counted, as it is computed once for many steps, nor what slots share with the unit before.
        """
        if not self._prefix_reuse:
            return sum(len(item.row.prefix) + len(item.row.suffix) for item in unit.items)
        shared = 0
        if before is not None and before.group == unit.group:
            a, b = before.items[-1].row, unit.items[0].row
            shared = common_length(a.suffix[: a.shareable], b.suffix[: b.shareable]) if a.prefix == b.prefix else 0
        return len(unit.group) * (unit.plan.slot_tokens - (shared if shared >= PASS_COST else 0))

    def _score_items(self, items: Sequence[_Item], normalise: bool, keep: bool) -> torch.Tensor:
        with self._beginnings(items, keep) as beginnings:
            sequences = [self._sequence(item, beginning) for item, beginning in zip(items, beginnings)]
            self.prefix_stats.total += sum(sequence.cached.numel() for sequence in sequences)
            hidden, kv_indices = extend(self._handle, sequences)
            self._handle.kv_allocator.free(kv_indices)
        return self._read(hidden, items, sequences, beginnings, normalise)

    @contextmanager
    def _beginnings(self, items: Sequence[_Item], keep: bool):
        if not self._prefix_reuse:
            computed = sum(len(item.row.prefix) for item in items)
            self.prefix_stats.total += computed
            self.prefix_stats.computed += computed
            yield [Beginning(_NOTHING)] * len(items)
            return
        rows = [SlotRow(item.lora_id, item.row.prefix, item.row.suffix, item.row.shareable) for item in items]
        tokens = sum(len(row.suffix) for row in rows)
        held = self.base_prefixes.acquire((row.prefix for row in rows), tokens, keep)
        with held as base, self._slot_prefixes.acquire(rows, base) as beginnings:
            yield beginnings

    def _sequence(self, item: _Item, beginning: Beginning) -> Sequenced:
        """The tokens of the row that do not belong to its beginning."""
        cached, row = beginning.kv_indices, item.row
        on_base = row.prefix[cached.numel() :] if self._scope is PrefixScope.BASE else ()
        own = (row.prefix + row.suffix)[cached.numel() :]
        segments = ((None, len(on_base)), (item.lora_id, len(own) - len(on_base)))
        return Sequenced(cached, own, segments if on_base else segments[1:])

    def _read(
        self, hidden: torch.Tensor, items: Sequence[_Item], sequences: Sequence[Sequenced], beginnings: Sequence[Beginning], normalise: bool
    ) -> torch.Tensor:
        """The first token that is read may be the last of a beginning: its hidden state comes behind those of the batch."""
        rows, tokens, end = [], [], 0
        shared: dict[Beginning, int] = {}
        for item, sequence, beginning in zip(items, sequences, beginnings):
            start, end = end, end + len(sequence.tokens)
            for position, token in item.row.reads:
                row = end - len(item.row.suffix) + position
                rows.append(row if row >= start else shared.setdefault(beginning, len(hidden) + len(shared)))
                tokens.append(token)
        if shared:
            hidden = torch.cat((hidden, *(beginning.last_hidden for beginning in shared)))
        rows, tokens = (torch.tensor(column, device=hidden.device) for column in (rows, tokens))
        read = self._head.log_probs if normalise else self._head.logits
        with torch.inference_mode():
            return read(hidden, rows, tokens).cpu()


@dataclass(frozen=True)
class _Unit:
    """What must share a pass: all rows of one example in one group of slots."""

    plan: ExamplePlan
    group: SlotGroup
    items: list[_Item]


@dataclass(frozen=True)
class _Prefixes:
    """Base-model prefixes of a batch in the making."""

    texts: frozenset[tuple[int, ...]] = frozenset()
    tokens: int = 0

    def with_unit(self, unit: _Unit) -> "_Prefixes":
        new = {item.row.prefix for item in unit.items} - self.texts
        return _Prefixes(self.texts | new, self.tokens + sum(map(len, new))) if new else self


def _units(plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup], slots_first: bool) -> Iterator[_Unit]:
    """Units that follow each other share what is worth most: a base-model prefix, or with ``slots_first`` the slots."""
    reads = [sum(len(row.reads) for row in plan.rows) for plan in plans]
    first_reads = [0, *itertools.accumulate(reads)]
    first_slots = [0, *itertools.accumulate(map(len, groups))]
    if slots_first:
        order = ((plan, group) for group in range(len(groups)) for plan in range(len(plans)))
    else:
        order = ((plan, group) for plan in range(len(plans)) for group in range(len(groups)))
    for plan, group in order:
        yield _Unit(plans[plan], groups[group], _items(plans[plan], groups[group], first_slots[group], first_reads[plan]))


def _items(plan: ExamplePlan, group: SlotGroup, first_slot: int, first_read: int) -> list[_Item]:
    columns = list(itertools.accumulate((len(row.reads) for row in plan.rows), initial=first_read))
    return [
        _Item(slot, lora_id, row, column)
        for slot, lora_id in enumerate(group, first_slot)
        for row, column in zip(plan.rows, columns)
    ]
