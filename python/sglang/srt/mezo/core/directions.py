"""The directions z_1 ... z_d of a step, as their users need them: a multiple of one added to something, a stretch of
numbers at a time, so that none of them has to be in memory as a whole."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from sglang.srt.mezo.core.noise import LARGEST_GAUSSIAN, Distribution, add_direction


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
        z: float32 [numel] each.
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
        return torch.add(base, self._z[k][first : first + out.numel()], alpha=scale, out=out)


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
