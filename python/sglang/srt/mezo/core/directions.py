"""The directions z_1 ... z_d of a step, as their users need them: a multiple of one added to something, a stretch of
numbers at a time, so that none of them has to be in memory as a whole."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from sglang.srt.mezo.core.noise import LARGEST_GAUSSIAN, Distribution, Shapes, add_direction, low_rank_factors


class Directions(Protocol):
    def __len__(self) -> int: ...

    @property
    def largest(self) -> float:
        """No number of theirs is larger, up or down."""
        ...

    def add(self, k: int, scale: float, base: torch.Tensor, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """out = base + scale z_k, of the numbers from ``first`` on; returns ``out``.

        Args:
            base, out: float32 [n], which may be the same.
        """
        ...


class KeptDirections:
    """Directions in memory.

    Args:
        z: float32 [numel] each, on any device.
    """

    def __init__(self, z: Sequence[torch.Tensor]):
        self._z = z

    def __len__(self) -> int:
        return len(self._z)

    @property
    def largest(self) -> float:
        bounds = [abs(bound.item()) for z in self._z for bound in z.aminmax()]
        return math.nan if any(map(math.isnan, bounds)) else max(bounds, default=0.0)

    def add(self, k: int, scale: float, base: torch.Tensor, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        part = self._z[k][first : first + out.numel()].to(base.device)
        return torch.add(base, part, alpha=scale, out=out)


class DrawnDirections:
    """Directions that are drawn wherever they are needed: those of ``noise.direction``.

    Args:
        seed: of the step.
        count: of directions.
    """

    def __init__(self, seed: int, count: int, distribution: Distribution):
        self._seed = seed
        self._count = count
        self._distribution: Distribution = distribution

    def __len__(self) -> int:
        return self._count

    @property
    def largest(self) -> float:
        return 1.0 if self._distribution == "rademacher" else LARGEST_GAUSSIAN

    def add(self, k: int, scale: float, base: torch.Tensor, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        return add_direction(self._seed, k, scale, base, out, self._distribution, first)


class LowRankDirections:
    """Directions whose matrices are products of two factors, which are kept: those of ``noise.low_rank_factors``."""

    def __init__(self, seed: int, count: int, shapes: Shapes, rank: int, distribution: Distribution):
        self._shapes = shapes
        self._factors = [low_rank_factors(seed, k, shapes, rank, distribution) for k in range(count)]
        self._scale = math.sqrt(rank)
        self._largest = rank / self._scale * (1.0 if distribution == "rademacher" else LARGEST_GAUSSIAN**2)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def largest(self) -> float:
        return self._largest

    def add(self, k: int, scale: float, base: torch.Tensor, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        end, begin = first + out.numel(), 0
        for shape, u, v in zip(self._shapes, *self._factors[k]):
            low, high = max(begin, first), min(begin + math.prod(shape), end)
            if low < high:
                numbers = self._numbers(u, v, low - begin, high - begin) if len(shape) == 2 else u[low - begin :, 0]
                place = slice(low - first, high - first)
                torch.add(base[place], numbers[: high - low].to(out.device), alpha=scale, out=out[place])
            begin += math.prod(shape)
        return out

    def _numbers(self, u: torch.Tensor, v: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """u v' / sqrt(rank) from number ``first`` on, to ``end`` at least: term by term, as a matrix product may add in
        any order."""
        row, columns = first // len(v), len(v)
        u = u[row : -(-end // columns)]
        total = torch.zeros(len(u), columns)
        for left, right in zip(u.T, v.T):
            total += left[:, None] * right
        return total.flatten().div_(self._scale)[first - row * columns :]
