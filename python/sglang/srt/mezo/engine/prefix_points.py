"""Prefixes in the KV pool as ``Points``: each has the keys and values of its virtual tokens in places of its own."""

import torch

from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.errors import CapacityError, ConfigError
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.core.noise import initial_uniform
from sglang.srt.mezo.engine.forward import Sequenced, extend, require_finite_base
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.held_places import HeldPlaces
from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.engine.points import PackedPoints, Point

_POOL_SHARE = 0.25  # of the KV pool that the points of a pass may have


class PrefixLayout:
    """Where each number of a prefix lies in the pool: a rank has the heads that it computes.

    Raises:
        ConfigError: the engine keeps keys and values otherwise than as one of each for every token, layer and head.
    """

    def __init__(self, handle: EngineHandle, spec: PrefixSpec):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.runtime_context import get_parallel

        pool = handle.kv_allocator.get_kvcache()
        if type(pool) is not MHATokenToKVPool:
            raise ConfigError(
                "tuning", "prefix", f"alora, lora or full: the KV pool of this model is a {type(pool).__name__}"
            )
        self._layers = [pool.get_kv_buffer(pool.start_layer + layer) for layer in range(pool.layer_num)]
        heads = self._layers[0][0].shape[1]
        parallel = get_parallel()
        replicas = max(1, parallel.tp_size * heads // spec.kv.heads)
        self._heads = slice(parallel.tp_rank // replicas * heads, (parallel.tp_rank // replicas + 1) * heads)
        self.is_first_copy = parallel.tp_rank % replicas == 0

    def write(self, prefix: torch.Tensor, places: torch.Tensor) -> None:
        """Put a prefix, [tokens, layers, 2, heads, head_dim], into places of the pool, cast once to its dtype."""
        own = prefix[:, :, :, self._heads].to(places.device)
        with torch.inference_mode():
            for layer, buffers in enumerate(self._layers):
                for which, buffer in enumerate(buffers):
                    buffer[places] = own[:, layer, which].to(buffer.dtype)

    def read(self, places: torch.Tensor, out: torch.Tensor) -> None:
        """Put what this rank has in places of the pool where it belongs in a prefix, [tokens, layers, 2, heads,
        head_dim]."""
        for layer, buffers in enumerate(self._layers):
            for which, buffer in enumerate(buffers):
                out[:, layer, which, self._heads] = buffer[places].to(out.device, out.dtype)


def held_prefix(handle: EngineHandle, adapter: PrefixAdapter) -> Point:
    """A point at which a prefix stays as it is, as long as the engine lives."""
    held = HeldPlaces(handle, adapter.spec.num_virtual_tokens)
    PrefixLayout(handle, adapter.spec).write(adapter.theta.view(adapter.by_layer), held.places)
    return Point(cached=held.places, shift=_shift(adapter.spec))


def _shift(spec: PrefixSpec) -> int:
    return 0 if spec.positions == "shifted" else -spec.num_virtual_tokens


class PrefixPoints(PackedPoints):
    """Prefixes as the ``Points`` of one.

    Args:
        most_tokens: of the KV pool that they may have, besides a share that they never pass.
        seed: of the random tokens whose keys and values theta begins with, as in the paper, once the engine has the
            room to compute them; None where theta has begun.

    Raises:
        ConfigError: see ``PrefixLayout``.
        CapacityError: the pool has no room for those of one direction.
    """

    slots = 0

    def __init__(
        self,
        handle: EngineHandle,
        adapter: PrefixAdapter,
        num_perturbations: int,
        estimator: Estimator,
        most_tokens: int,
        seed: int | None,
    ):
        self._handle = handle
        self._adapter = adapter
        self._seed = seed
        self._layout = PrefixLayout(handle, adapter.spec)
        tokens = adapter.spec.num_virtual_tokens
        room = min(int(_POOL_SHARE * handle.kv_capacity), most_tokens)
        width = min(num_perturbations, (room // tokens - 1) // len(SIGNS[estimator]))
        if width < 1:
            raise CapacityError(
                f"prefixes of {tokens} tokens for theta and one direction are more than the {room} of the KV pool's "
                f"{handle.kv_capacity} tokens that they may have: raise max_total_tokens or lower num_virtual_tokens"
            )
        super().__init__(adapter, estimator, width, torch.empty_like(adapter.theta))
        self._held: HeldPlaces | None = None

    @property
    def tokens(self) -> int:
        return self._adapter.spec.num_virtual_tokens * self.count

    @property
    def claimed(self) -> bool:
        return self._held is not None and self._held.is_valid

    def claim(self) -> None:
        """Take the places in the pool."""
        if self._seed is not None:
            self._begin(self._seed)
            self._seed = None
        spec, shift = self._adapter.spec, _shift(self._adapter.spec)
        self._held = HeldPlaces(self._handle, self.tokens)
        self._points = [Point(cached=own, shift=shift) for own in self._held.places.split(spec.num_virtual_tokens)]

    def release(self) -> None:
        held, self._held, self._points = self._held, None, []
        if held is None or not held.is_valid:
            return
        with torch.inference_mode():  # a perturbed number may have been none in the pool's dtype
            erase(self._handle.kv_allocator.get_kvcache(), held.places)
        held.release()

    def _begin(self, seed: int) -> None:
        """Fill theta with what the model computes for random tokens."""
        spec, theta = self._adapter.spec, self._adapter.theta
        numbers = initial_uniform(seed, 0, spec.num_virtual_tokens).double().add_(1).div_(2)
        vocabulary = self._handle.model_runner.model_config.vocab_size
        tokens = tuple((numbers * vocabulary).long().clamp_(max=vocabulary - 1).tolist())
        random = Sequenced(torch.empty(0, dtype=torch.int64), tokens, ((None, len(tokens)),))
        hidden, places = extend(self._handle, [random])
        theta.fill_(-0.0)  # leaves every number as it is when it is added
        try:
            require_finite_base(self._handle, hidden, places)
            if self._layout.is_first_copy:
                self._layout.read(places, theta.view(self._adapter.by_layer))
        finally:
            self._handle.kv_allocator.free(places)
        theta.copy_(self._handle.sum_of_ranks(theta))

    def write(self, number: int, theta: torch.Tensor) -> None:
        self._layout.write(theta.view(self._adapter.by_layer), self._points[number].cached)
