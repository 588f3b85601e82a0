"""Prefixes in the KV pool as ``Points``: each has the keys and values of its virtual tokens in places of its own."""

from collections.abc import Iterator
from itertools import count

import torch

from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.directions import Directions
from sglang.srt.mezo.core.errors import CapacityError, ConfigError
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.core.noise import initial_uniform
from sglang.srt.mezo.engine.forward import Sequenced, extend
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.held_places import OURS, HeldPlaces
from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.engine.points import Point, PointGroup, Round

_POOL_SHARE = 0.25  # of the KV pool that the points of a pass may have
_NAMES = count(1)


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
    held = HeldPlaces(handle, adapter.spec.num_virtual_tokens, f"{OURS}points{next(_NAMES)}")
    PrefixLayout(handle, adapter.spec).write(adapter.theta.view(adapter.by_layer), held.places)
    return Point(cached=held.places, shift=_shift(adapter.spec))


def _shift(spec: PrefixSpec) -> int:
    return 0 if spec.positions == "shifted" else -spec.num_virtual_tokens


class PrefixPoints:
    """Theta itself, and some directions at a time.

    Args:
        most_tokens: of the KV pool that they may have, besides a share that they never pass.
        seed: of the random tokens whose keys and values theta begins with, as in the paper, once the engine has the
            room to compute them; None where theta has begun.

    Raises:
        ConfigError: see ``PrefixLayout``.
        CapacityError: the pool has no room for those of one direction.
    """

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
        self._signs = SIGNS[estimator]
        self._with_theta = estimator == "one_sided"
        self._layout = PrefixLayout(handle, adapter.spec)
        tokens = adapter.spec.num_virtual_tokens
        room = min(int(_POOL_SHARE * handle.kv_capacity), most_tokens)
        self._width = min(num_perturbations, (room // tokens - 1) // len(self._signs))
        if self._width < 1:
            raise CapacityError(
                f"prefixes of {tokens} tokens for theta and one direction are more than the {room} of the KV pool's "
                f"{handle.kv_capacity} tokens that they may have: raise max_total_tokens or lower num_virtual_tokens"
            )
        self._held: HeldPlaces | None = None
        self._points: list[Point] = []
        self._scratch = torch.empty_like(adapter.theta)

    @property
    def current(self) -> Point:
        return self._points[0]

    @property
    def slots(self) -> int:
        return 0

    @property
    def tokens(self) -> int:
        return self._adapter.spec.num_virtual_tokens * (1 + self._width * len(self._signs))

    @property
    def claimed(self) -> bool:
        return self._held is not None and self._held.is_valid

    def claim(self) -> None:
        """Take the places in the pool."""
        if self._seed is not None:
            self._begin(self._seed)
            self._seed = None
        spec, shift = self._adapter.spec, _shift(self._adapter.spec)
        self._held = HeldPlaces(self._handle, self.tokens, f"{OURS}points{next(_NAMES)}")
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
        _, places = extend(self._handle, [Sequenced(torch.empty(0, dtype=torch.int64), tokens, ((None, len(tokens)),))])
        theta.fill_(-0.0)  # leaves every number as it is when it is added
        if self._layout.is_first_copy:
            self._layout.read(places, theta.view(self._adapter.by_layer))
        self._handle.kv_allocator.free(places)
        theta.copy_(self._handle.sum_of_ranks(theta))

    def write_current(self) -> None:
        self._write(self.current, self._adapter.theta)

    def rounds(self, directions: int) -> list[Round]:
        """One for as many directions as the pool has room for. One-sided, theta comes before the first direction."""
        firsts = range(0, directions, self._width)
        return [self._round(first, min(first + self._width, directions)) for first in firsts]

    def _round(self, first: int, end: int) -> Round:
        with_theta = first == 0 and self._with_theta
        groups: list[PointGroup] = [self._of_direction(place) for place in range(end - first)]

        def fill(directions: Directions, zo_eps: float) -> Iterator[None]:
            if with_theta:
                self.write_current()
            for k, group in zip(range(first, end), groups):
                for point, sign in zip(group, self._signs):
                    self._write(point, directions.add(k, sign * zo_eps, self._adapter.theta, self._scratch))
                yield

        return Round([*([(self.current,)] if with_theta else []), *groups], fill)

    def _of_direction(self, place: int) -> PointGroup:
        begin = 1 + place * len(self._signs)
        return tuple(self._points[begin : begin + len(self._signs)])

    def _write(self, point: Point, theta: torch.Tensor) -> None:
        self._layout.write(theta.view(self._adapter.by_layer), point.cached)
