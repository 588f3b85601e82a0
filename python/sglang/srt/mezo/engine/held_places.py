"""Places in the KV pool that stay ours from one pass to the next.

SGLang counts a pool's places whenever it has nothing to do, and ends where some are neither free nor in the radix
tree. So they lie in the tree, under a name that no request has by itself, and locked, so that nothing evicts them.
"""

import itertools
from array import array
from typing import Any

from sglang.srt.mezo.core.errors import CapacityError
from sglang.srt.mezo.engine.handle import EngineHandle

OURS = "\x1f"
"""First character of the namespaces of the tree that are ours; those that users choose do not have it."""
_NUMBERS = itertools.count(1)


class HeldPlaces:
    """Some places, held until they are released or the tree is emptied.

    Args:
        name: namespace of the tree that nothing else is in; a new one by default. In it the places are those of
            ``key_of(count)``.

    Attributes:
        places: int64 [count], indices of the pool.

    Raises:
        CapacityError: the pool has no room for them.
    """

    def __init__(self, handle: EngineHandle, count: int, name: str | None = None):
        from sglang.srt.mem_cache.allocation import alloc_token_slots
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        if count > handle.free_kv_tokens:
            raise CapacityError(
                f"{count} KV tokens are to be held and {handle.free_kv_tokens} of {handle.kv_capacity} are free: raise "
                "max_total_tokens"
            )
        self._handle = handle
        self._tree: Any = handle.tree_cache
        self._root = self._lock = None
        self.places = alloc_token_slots(self._tree, count)
        if self._tree.supports_prefix_sharing():
            key = RadixKey(key_of(count), name or f"{OURS}held{next(_NUMBERS)}")
            self._tree.insert(InsertParams(key=key, value=self.places, prev_prefix_len=0))
            self._lock = self._tree.lock(self._tree.match_prefix(MatchPrefixParams(key=key)).last_device_node)
            self._root = self._tree.root_node_handle()

    @property
    def is_valid(self) -> bool:
        """False once the tree has been emptied, and the pool with it."""
        return self._lock is None or self._tree.root_node_handle() == self._root

    def release(self) -> None:
        """Give the places back: at once, or to the tree, which evicts what nobody looks for."""
        if self._lock is None:
            self._handle.kv_allocator.free(self.places)
        elif self.is_valid:
            self._tree.unlock(self._lock)


def key_of(count: int) -> array:
    """What stands for held places where the tree and requests have token ids."""
    return array("q", [0]) * count


def keeps_keys(tree_cache: Any) -> bool:
    """Whether keys of ours are safe in a tree: only this one is known to take them, and only while it keeps them to
    this process."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if type(tree_cache) is not UnifiedRadixCache:
        return False
    core: Any = tree_cache.tree_core
    return not core.enable_kv_cache_events and not tree_cache.enable_storage and tree_cache.linker is None
