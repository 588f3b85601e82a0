"""Scores of a batch of examples under several adapter slots: the one path for training and evaluation."""

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
from sglang.srt.mezo.prefix import BasePrefixes, PrefixStats, SlotPrefixes

SlotGroup = tuple[str | None, ...]
"""Adapter ids that are scored in the same pass: both signs of a direction, or one adapter alone."""

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

    def passes(self, plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup], objective: Objective) -> Passes[torch.Tensor]:
        """Read every scored token of every plan in every slot, a forward pass of at most ``max_tokens`` at a time.

        Between passes nothing is held but locks on kept prefixes: neither rows nor KV tokens outside of the tree.

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
            read = self._score_items(items, normalise)
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
        """Pack (example, slot group) units up to the token budget and the free rows, slot after slot."""
        batch, tokens = [], 0
        for unit in _units(plans, groups):
            cost = self._cost(unit)
            full = tokens + cost > self._max_tokens or len(batch) + len(unit) > self._handle.free_rows
            if batch and full:
                yield sorted(batch, key=lambda item: item.slot)
                batch, tokens = [], 0
            batch += unit
            tokens += cost
        yield sorted(batch, key=lambda item: item.slot)

    def _cost(self, unit: Sequence[_Item]) -> int:
        """Tokens that the unit runs, a base-model prefix not counted: it is computed once for many steps."""
        suffixes = sum(len(item.row.suffix) for item in unit)
        if not self._prefix_reuse:
            return suffixes + sum(len(item.row.prefix) for item in unit)
        if self._scope is PrefixScope.BASE:
            return suffixes
        return suffixes + sum(len(prefix) for _, prefix in {(item.lora_id, item.row.prefix) for item in unit})

    def _score_items(self, items: Sequence[_Item], normalise: bool) -> torch.Tensor:
        with self._sequences(items) as sequences:
            self.prefix_stats.total += sum(sequence.cached.numel() for sequence in sequences)
            hidden, kv_indices = extend(self._handle, sequences)
            self._handle.kv_allocator.free(kv_indices)
        return self._read(hidden, items, sequences, normalise)

    @contextmanager
    def _sequences(self, items: Sequence[_Item]):
        if not self._prefix_reuse:
            computed = sum(len(item.row.prefix) for item in items)
            self.prefix_stats.total += computed
            self.prefix_stats.computed += computed
            yield [self._whole(item) for item in items]
        elif self._scope is PrefixScope.BASE:
            with self.base_prefixes.acquire(item.row.prefix for item in items) as indices:
                yield [_continued(item, indices[item.row.prefix]) for item in items]
        else:
            with self._slot_prefixes.acquire((item.lora_id, item.row.prefix) for item in items) as indices:
                yield [_continued(item, indices.get((item.lora_id, item.row.prefix), _NOTHING)) for item in items]

    def _whole(self, item: _Item) -> Sequenced:
        tokens = item.row.prefix + item.row.suffix
        if self._scope is PrefixScope.BASE and item.row.prefix:
            segments = ((None, len(item.row.prefix)), (item.lora_id, len(item.row.suffix)))
        else:
            segments = ((item.lora_id, len(tokens)),)
        return Sequenced(_NOTHING, tokens, segments)

    def _read(self, hidden: torch.Tensor, items: Sequence[_Item], sequences: Sequence[Sequenced], normalise: bool) -> torch.Tensor:
        rows, tokens, end = [], [], 0
        for item, sequence in zip(items, sequences):
            end += len(sequence.tokens)
            suffix_start = end - len(item.row.suffix)
            rows += [suffix_start + position for position, _ in item.row.reads]
            tokens += [token for _, token in item.row.reads]
        rows, tokens = (torch.tensor(column, device=hidden.device) for column in (rows, tokens))
        read = self._head.log_probs if normalise else self._head.logits
        with torch.inference_mode():
            return read(hidden, rows, tokens).cpu()


def _units(plans: Sequence[ExamplePlan], groups: Sequence[SlotGroup]) -> Iterator[list[_Item]]:
    """What must share a pass: all rows of one example in one group of slots."""
    first_read = 0
    for plan in plans:
        slot = 0
        for group in groups:
            unit = []
            for lora_id in group:
                column = first_read
                for row in plan.rows:
                    unit.append(_Item(slot, lora_id, row, column))
                    column += len(row.reads)
                slot += 1
            yield unit
        first_read += sum(len(row.reads) for row in plan.rows)


def _continued(item: _Item, cached: torch.Tensor) -> Sequenced:
    return Sequenced(cached, item.row.suffix, ((item.lora_id, len(item.row.suffix)),))
