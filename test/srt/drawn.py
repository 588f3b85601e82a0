"""Directions as whole vectors."""

import torch

from sglang.srt.mezo.core.directions import Directions


def whole(directions: Directions, k: int, numel: int) -> torch.Tensor:
    """Direction ``k``: float32 [numel]."""
    zeros = torch.zeros(numel)
    return directions.add(k, 1.0, zeros, zeros)
