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
from sglang.srt.mezo.passes import Passes, drain

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
    """Prefixes of the base model, in the tree's base namespace: shared with ordinary traffic, both ways.

    Args:
        max_tokens: most tokens run in one forward pass.
        kept_tokens: most tokens that stay locked between passes, so that ordinary traffic does not evict them.
    """

    def __init__(self, handle: EngineHandle, max_tokens: int, stats: PrefixStats, kept_tokens: int = 0):
        self._handle = handle
        self._max_tokens = max_tokens
        self._stats = stats
        self._kept_tokens = kept_tokens
        self._kept: dict[Tokens, object] = {}  # prefix -> lock

    @property
    def kept_tokens(self) -> int:
        """Tokens of the prefixes that are locked now; what several of them share is counted for each."""
        return sum(map(len, self._kept))

    def prepare(self, prefixes: Iterable[Tokens]) -> Passes[None]:
        """Compute what is missing, at most ``max_tokens`` in one forward pass; a long prefix takes several."""
        missing = [prefix for prefix in sorted(set(prefixes) - {()}) if self._hit(prefix) < len(prefix)]
        while missing:
            pieces = self._pieces(missing)
            self._compute(pieces)
            # Never looked at again here: in a pool that is too small one prefix would evict another for ever.
            missing = missing[sum(piece == prefix for piece, prefix in zip(pieces, missing)) :]
            yield

    @contextmanager
    def acquire(self, prefixes: Iterable[Tokens]):
        """Lock the KV of each prefix for the duration; compute what is missing.

        Yields:
            prefix -> int64 [len(prefix)] KV indices.
        """
        wanted = sorted(set(prefixes) - {()})
        held = {}
        try:
            held = {prefix: found for prefix in wanted if (found := self._lock(prefix)) is not None}
            missing = [prefix for prefix in wanted if prefix not in held]
            drain(self.prepare(missing))
            for prefix in missing:
                held[prefix] = self._lock(prefix) or self._raise_evicted(prefix)
            yield {(): torch.empty(0, dtype=torch.int64)} | {prefix: indices for prefix, (indices, _) in held.items()}
        finally:
            self._keep_or_unlock({prefix: lock for prefix, (_, lock) in held.items()})

    def release(self) -> None:
        """Unlock what is kept: the tree may evict it from now on."""
        while self._kept:
            _, lock = self._kept.popitem()
            self._handle.tree_cache.unlock(lock)

    def forget(self) -> None:
        """The tree has been emptied, and the locks are gone with it."""
        self._kept.clear()

    def _keep_or_unlock(self, locks: dict[Tokens, object]) -> None:
        room = self._kept_tokens - self.kept_tokens
        for prefix, lock in locks.items():
            if prefix not in self._kept and len(prefix) <= room:
                self._kept[prefix] = lock
                room -= len(prefix)
            else:
                self._handle.tree_cache.unlock(lock)

    def _lock(self, prefix: Tokens) -> tuple[torch.Tensor, object] | None:
        """KV indices of the whole prefix and a lock on them; None where the tree does not hold it."""
        tree = self._handle.tree_cache
        match = self._match(prefix)
        if match.device_prefix_len < len(prefix):
            return None
        return tree.path_device_indices(match.last_device_node)[: len(prefix)], tree.lock(match.last_device_node)

    def _raise_evicted(self, prefix: Tokens):
        raise CapacityError(
            f"a prefix of {len(prefix)} tokens was evicted while its batch was being set up: "
            f"raise max_total_tokens ({self._handle.kv_capacity}) or lower the batch size"
        )

    def _match(self, prefix: Tokens):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self._handle.tree_cache.match_prefix(MatchPrefixParams(key=_key(prefix)))

    def _hit(self, prefix: Tokens) -> int:
        return self._match(prefix).device_prefix_len

    def _pieces(self, missing: Sequence[Tokens]) -> list[Tokens]:
        """As much of the missing prefixes as one pass may compute: whole ones, and the beginning of the last."""
        pieces, room = [], self._max_tokens
        for prefix in missing:
            hit = self._hit(prefix)
            pieces.append(prefix[: hit + room])
            room -= len(pieces[-1]) - hit
            if room == 0 or len(pieces) == self._handle.free_rows:
                break
        return pieces

    def _compute(self, prefixes: Sequence[Tokens]) -> None:
        """Run the unmatched ends of the prefixes in one batch and hand their KV to the tree."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        tree = self._handle.tree_cache
        matches = [self._match(prefix) for prefix in prefixes]
        locks = [tree.lock(match.last_device_node) for match in matches]
        try:
            hits = [match.device_prefix_len for match in matches]
            cached = [tree.path_device_indices(match.last_device_node)[:hit] for match, hit in zip(matches, hits)]
            sequences = [
                Sequenced(indices, prefix[hit:], ((None, len(prefix) - hit),))
                for prefix, hit, indices in zip(prefixes, hits, cached)
            ]
            _, new = extend(self._handle, sequences)
            self._stats.computed += new.numel()
            parts = new.split([len(sequence.tokens) for sequence in sequences])
            for prefix, hit, indices, part in zip(prefixes, hits, cached, parts):
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
