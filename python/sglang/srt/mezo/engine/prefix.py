"""Prefixes whose KV is taken from the radix tree.

What is counted here is counted where the KV is taken: a token is reused when a row reads KV that was not computed for
that row's scoring, and computed when it ran through the model.
"""

from array import array
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang.srt.mezo.core.errors import CapacityError
from sglang.srt.mezo.core.passes import Passes, drain
from sglang.srt.mezo.core.tokens import Tokens, common_length
from sglang.srt.mezo.engine.forward import Sequenced, extend, require_finite_base
from sglang.srt.mezo.engine.handle import EngineHandle

_PASS_COST = 64
"""Tokens that a forward pass costs beside those it runs, as weights are read once more."""

_ROUNDS = 2  # in which the prefixes of a pass are computed


@dataclass
class PrefixStats:
    """Prefix tokens that rows have read, and how many of them had to be run through the model."""

    total: int = 0
    computed: int = 0

    @property
    def reused(self) -> int:
        return self.total - self.computed


@dataclass(frozen=True)
class _Locked:
    """KV of a prefix that the tree does not evict."""

    kv_indices: torch.Tensor
    lock: Any


class BasePrefixes:
    """Prefixes of the base model, in the tree's base namespace: shared with ordinary traffic, both ways.

    Args:
        max_tokens: most tokens run in one forward pass; may be set anew between two.
        kept_tokens: most tokens that stay locked between passes, so that ordinary traffic does not evict them.
    """

    def __init__(self, handle: EngineHandle, max_tokens: int, stats: PrefixStats, kept_tokens: int = 0):
        self._handle = handle
        self.max_tokens = max_tokens
        self._stats = stats
        self._most_kept_tokens = kept_tokens
        self._kept: dict[Tokens, _Locked] = {}
        self._root = handle.tree_cache.root_node_handle()

    @property
    def kept_tokens(self) -> int:
        """Tokens of the prefixes that are locked now; what several of them share is counted for each."""
        return sum(map(len, self._valid_kept()))

    def prepare(self, prefixes: Iterable[Tokens]) -> Passes[None]:
        """Compute what is missing, at most ``max_tokens`` in one forward pass; a long prefix takes several.

        What others have evicted meanwhile is computed again, so that little is left to the pass that reads it; not for
        ever, as in a pool that is too small one prefix evicts another.
        """
        wanted = sorted(set(prefixes) - {()})
        for _ in range(_ROUNDS):
            missing = self._missing(prefix for prefix in wanted if prefix not in self._valid_kept())
            if not missing:
                return
            while missing:
                pieces = self._pieces(missing)
                self._compute(list(pieces.values()))
                yield
                missing = self._missing(prefix for prefix in missing if pieces.get(prefix) != prefix)

    @contextmanager
    def acquire(self, prefixes: Iterable[Tokens], beside: int, keep: bool):
        """Lock the KV of each prefix for the duration; compute what is missing.

        Args:
            beside: tokens that are to run meanwhile and need room too.
            keep: the locks may outlive this.

        Yields:
            prefix -> int64 [len(prefix)] KV indices.
        """
        wanted = sorted(set(prefixes) - {()})
        root = self._handle.tree_cache.root_node_handle()
        nothing = torch.empty(0, dtype=torch.int64, device=self._handle.device)
        self._make_room(wanted, beside)
        lent = {prefix: self._kept.pop(prefix) for prefix in wanted if prefix in self._kept}  # out of release's reach
        fresh: dict[Tokens, _Locked] = {}
        try:
            others = [prefix for prefix in wanted if prefix not in lent]
            fresh |= {prefix: found for prefix in others if (found := self._lock(prefix)) is not None}
            missing = [prefix for prefix in others if prefix not in fresh]
            drain(self.prepare(missing))
            for prefix in missing:
                fresh[prefix] = self._lock(prefix) or self._raise_evicted(prefix)
            yield {prefix: locked.kv_indices for prefix, locked in (lent | fresh).items()} | {(): nothing}
        finally:
            if self._handle.tree_cache.root_node_handle() == root:  # else it has been emptied, and the locks with it
                self._keep_or_unlock(lent, True)
                self._keep_or_unlock(fresh, keep)

    def release(self) -> None:
        """Unlock what is kept: the tree may evict it from now on."""
        kept = self._valid_kept()
        while kept:
            _, locked = kept.popitem()
            self._handle.tree_cache.unlock(locked.lock)

    def _valid_kept(self) -> dict[Tokens, "_Locked"]:
        """What is kept, unless the tree has been emptied since, and the locks with it."""
        root = self._handle.tree_cache.root_node_handle()
        if root != self._root:
            self._kept.clear()
            self._root = root
        return self._kept

    def _make_room(self, wanted: Sequence[Tokens], beside: int) -> None:
        """Nothing stays kept where a batch needs the room."""
        kept = self._valid_kept()
        missing = sum(len(prefix) for prefix in wanted if prefix not in kept)
        if kept and missing + beside > self._handle.free_kv_tokens:
            self.release()

    def _keep_or_unlock(self, held: dict[Tokens, "_Locked"], keep: bool) -> None:
        room = self._most_kept_tokens - self.kept_tokens if keep else 0
        for prefix, locked in held.items():
            if len(prefix) <= room:
                self._kept[prefix] = locked
                room -= len(prefix)
            else:
                self._handle.tree_cache.unlock(locked.lock)

    def _lock(self, prefix: Tokens) -> "_Locked | None":
        """Locks the whole prefix; None where the tree does not hold it."""
        tree = self._handle.tree_cache
        match = self._match(prefix)
        if match.device_prefix_len < len(prefix):
            return None
        return _Locked(
            tree.path_device_indices(match.last_device_node)[: len(prefix)], tree.lock(match.last_device_node)
        )

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

    def _missing(self, prefixes: Iterable[Tokens]) -> list[Tokens]:
        return [prefix for prefix in prefixes if self._hit(prefix) < len(prefix)]

    def _pieces(self, missing: Sequence[Tokens]) -> dict[Tokens, Tokens]:
        """As much of the missing prefixes as one pass may compute: whole ones, and the beginning of the last.

        A prefix that begins as the one before it waits, so that what they share is computed once.
        """
        pieces: dict[Tokens, Tokens] = {}
        room, before = self.max_tokens, ()
        for prefix in missing:
            hit = self._hit(prefix)
            if common_length(before, prefix) >= hit + _PASS_COST:
                continue
            pieces[prefix] = before = prefix[: hit + room]
            room -= len(before) - hit
            if room == 0 or len(pieces) == self._handle.free_rows:
                break
        return pieces

    def _compute(self, prefixes: Sequence[Tokens]) -> None:
        """Run the unmatched ends of the prefixes in one batch and hand their KV to the tree."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        tree: Any = self._handle.tree_cache
        matches = [self._match(prefix) for prefix in prefixes]
        locks = [tree.lock(match.last_device_node) for match in matches]
        try:
            hits = [match.device_prefix_len for match in matches]
            cached = [tree.path_device_indices(match.last_device_node)[:hit] for match, hit in zip(matches, hits)]
            sequences = [
                Sequenced(indices, prefix[hit:], ((None, len(prefix) - hit),))
                for prefix, hit, indices in zip(prefixes, hits, cached)
            ]
            hidden, new = extend(self._handle, sequences)
            parts = list(new.split([len(sequence.tokens) for sequence in sequences]))
            try:
                require_finite_base(self._handle, hidden, new)
                self._stats.computed += new.numel()
                for prefix, hit, indices in zip(prefixes, hits, cached):
                    # The tree owns the new KV from here on, and frees what another prefix of the batch brought already.
                    tree.insert(
                        InsertParams(key=_key(prefix), value=torch.cat((indices, parts[0])), prev_prefix_len=hit)
                    )
                    del parts[0]
            finally:
                for part in parts:  # what the tree did not take
                    self._handle.kv_allocator.free(part)
        finally:
            for lock in locks:
                tree.unlock(lock)


def _key(prefix: Tokens):
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(array("q", prefix), None)
