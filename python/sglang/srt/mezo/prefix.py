"""Prefixes whose KV is taken from the radix tree, or kept privately for one step.

What is counted here is counted where the KV is taken: a token is reused when a row reads KV that was not computed for
that row's scoring, and computed when it ran through the model.
"""

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from array import array
from dataclasses import dataclass

import torch

from sglang.srt.mezo.engine import EngineHandle
from sglang.srt.mezo.errors import CapacityError
from sglang.srt.mezo.forward import Sequenced, extend

Tokens = tuple[int, ...]


@dataclass
class PrefixStats:
    """Prefix tokens that rows have read, and how many of them had to be run through the model."""

    total: int = 0
    computed: int = 0

    @property
    def reused(self) -> int:
        return self.total - self.computed


class BasePrefixes:
    """Prefixes of the base model, in the tree's base namespace: shared with ordinary traffic, both ways."""

    def __init__(self, handle: EngineHandle, max_tokens: int, stats: PrefixStats):
        self._handle = handle
        self._max_tokens = max_tokens
        self._stats = stats

    @contextmanager
    def acquire(self, prefixes: Iterable[Tokens]):
        """Lock the KV of each prefix for the duration; compute what is missing.

        Yields:
            prefix -> int64 [len(prefix)] KV indices.
        """
        locks = []
        try:
            indices = {(): torch.empty(0, dtype=torch.int64)}
            for group in _groups_within(sorted(set(prefixes) - {()}), self._max_tokens):
                self._compute_missing(group)
                for prefix in group:
                    indices[prefix], lock = self._lock(prefix)
                    locks.append(lock)
            yield indices
        finally:
            for lock in locks:
                self._handle.tree_cache.unlock(lock)

    def _lock(self, prefix: Tokens):
        tree = self._handle.tree_cache
        match = self._match(prefix)
        if match.device_prefix_len < len(prefix):
            raise CapacityError(f"a prefix of {len(prefix)} tokens was evicted while its batch was being set up: raise max_total_tokens ({self._handle.kv_capacity}) or lower the batch size")
        lock = tree.lock(match.last_device_node)
        return tree.path_device_indices(match.last_device_node)[: len(prefix)], lock

    def _match(self, prefix: Tokens):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self._handle.tree_cache.match_prefix(MatchPrefixParams(key=_key(prefix)))

    def _compute_missing(self, prefixes: Sequence[Tokens]) -> None:
        """Run the unmatched ends of the prefixes in one batch and hand their KV to the tree."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        tree = self._handle.tree_cache
        partial = [(prefix, match) for prefix in prefixes if (match := self._match(prefix)).device_prefix_len < len(prefix)]
        if not partial:
            return
        locks = [tree.lock(match.last_device_node) for _, match in partial]
        try:
            hits = [match.device_prefix_len for _, match in partial]
            cached = [tree.path_device_indices(match.last_device_node)[:hit] for (_, match), hit in zip(partial, hits)]
            sequences = [
                Sequenced(indices, prefix[hit:], ((None, len(prefix) - hit),))
                for (prefix, _), hit, indices in zip(partial, hits, cached)
            ]
            _, new = extend(self._handle, sequences)
            self._stats.computed += new.numel()
            parts = new.split([len(sequence.tokens) for sequence in sequences])
            for (prefix, _), hit, indices, part in zip(partial, hits, cached, parts):
                # The tree owns the new KV from here on, and frees what another prefix of the batch brought already.
                tree.insert(InsertParams(key=_key(prefix), value=torch.cat((indices, part)), prev_prefix_len=hit))
        finally:
            for lock in locks:
                tree.unlock(lock)


class SlotPrefixes:
    """Prefixes that one slot's adapter acts on: computed for that slot, private to the pass, freed after it."""

    def __init__(self, handle: EngineHandle, max_tokens: int, stats: PrefixStats):
        self._handle = handle
        self._max_tokens = max_tokens
        self._stats = stats

    @contextmanager
    def acquire(self, wanted: Iterable[tuple[str, Tokens]]):
        """Compute the KV of each (adapter id, prefix) once.

        Yields:
            (adapter id, prefix) -> int64 [len(prefix)] KV indices.
        """
        owned = []
        try:
            indices = {}
            keys = sorted({key for key in wanted if key[1]})
            for group in _groups_within(keys, self._max_tokens, length=lambda key: len(key[1])):
                nothing = torch.empty(0, dtype=torch.int64)
                sequences = [Sequenced(nothing, prefix, ((lora_id, len(prefix)),)) for lora_id, prefix in group]
                _, new = extend(self._handle, sequences)
                owned.append(new)
                self._stats.computed += new.numel()
                indices.update(zip(group, new.split([len(prefix) for _, prefix in group])))
            yield indices
        finally:
            for kv_indices in owned:
                self._handle.kv_allocator.free(kv_indices)


def _key(prefix: Tokens):
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(array("q", prefix), None)


def _groups_within(items: Sequence, max_tokens: int, length=len) -> Iterable[list]:
    """Cut a list into runs of at most ``max_tokens`` tokens each, or of one item that is longer."""
    group, tokens = [], 0
    for item in items:
        if group and tokens + length(item) > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += length(item)
    if group:
        yield group
