"""The update of MeZO (arXiv 2305.17333, algorithm 1): stochastic gradient descent along the drawn directions."""

import math
import struct
from collections.abc import Sequence
from typing import Literal

import torch

from sglang.srt.mezo.noise import Distribution, direction

SchedulerType = Literal["constant", "linear", "cosine"]


def learning_rate_at(
    step: int, *, learning_rate: float, lr_scheduler_type: SchedulerType, warmup_steps: int, max_steps: int
) -> float:
    """Learning rate of ``step`` (from 0), with the meaning of ``transformers.get_scheduler``.

    "constant" warms up too, as Transformers' "constant_with_warmup".
    """
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    if lr_scheduler_type == "constant":
        return learning_rate
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if lr_scheduler_type == "linear":
        return learning_rate * max(0.0, 1.0 - progress)
    return learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def apply_update(
    theta: torch.Tensor,
    directions: Sequence[torch.Tensor],
    projected_grads: Sequence[float],
    learning_rate: float,
    weight_decay: float,
) -> None:
    """theta <- theta - learning_rate (mean_k projected_grad_k z_k + weight_decay theta), in place.

    Args:
        theta: float32 [parameters], the master copy.
        directions: float32 [parameters] each.
        projected_grads: one number per direction.
    """
    if weight_decay:
        theta.mul_(1.0 - learning_rate * weight_decay)
    for z, projected_grad in zip(directions, projected_grads, strict=True):
        theta.add_(z, alpha=-learning_rate * projected_grad / len(directions))


def round_to_log(projected_grad: float) -> float:
    """The nearest number that the seed log can hold: a float32."""
    return struct.unpack("<f", struct.pack("<f", projected_grad))[0]


def replay_update(
    theta: torch.Tensor,
    seed: int,
    projected_grads: Sequence[float],
    learning_rate: float,
    weight_decay: float,
    distribution: Distribution,
) -> None:
    """Repeat, bit for bit, the update of a step that is known only by its seed and its projected gradients."""
    directions = [direction(seed, k, theta.numel(), distribution) for k in range(len(projected_grads))]
    apply_update(theta, directions, projected_grads, learning_rate, weight_decay)
