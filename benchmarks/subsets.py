"""Steps that move some of an adapter's matrices: elsewhere their directions are zero. For studies; a run that is
resumed or replayed needs the same."""

import math
from collections.abc import Callable

import torch

from sglang.srt.mezo.core.directions import Directions
from sglang.srt.mezo.core.optimizer import Optimizer

Moved = Callable[[int, int], bool]
"""Of the number of a matrix, and of how many there are; A and B of a site follow each other, layer by layer."""

MATRICES_OF_A_LAYER = 8  # A and B of q, k, v and o


def b_alone(number: int, count: int) -> bool:
    return number % 2 == 1


def last_layer(number: int, count: int) -> bool:
    return number >= count - MATRICES_OF_A_LAYER


def middle_layer(number: int, count: int) -> bool:
    return number // MATRICES_OF_A_LAYER == count // MATRICES_OF_A_LAYER // 2


class Within:
    """Directions where ``mask`` (float32 [numel]) is one."""

    def __init__(self, directions: Directions, mask: torch.Tensor):
        self._directions, self._mask = directions, mask
        self.largest = directions.largest

    def __len__(self) -> int:
        return len(self._directions)

    def add(self, k: int, scale: float, base: torch.Tensor, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        z = self._directions.add(k, scale, torch.zeros_like(base), torch.zeros_like(base), first)
        return torch.add(base, z.mul_(self._mask[first : first + len(z)]), out=out)


def move_only(moved: Moved) -> None:
    """From now on, in this process."""
    whole = Optimizer.directions

    def directions(self: Optimizer, seed: int, count: int) -> Directions:
        shapes = self._shapes
        parts = [torch.full((math.prod(one),), float(moved(i, len(shapes)))) for i, one in enumerate(shapes)]
        return Within(whole(self, seed, count), torch.cat(parts))

    Optimizer.directions = directions
