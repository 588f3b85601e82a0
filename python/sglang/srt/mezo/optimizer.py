"""The update of MeZO (arXiv 2305.17333, algorithm 1) from the drawn directions: SGD, with momentum if wanted, or AdamW."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sglang.srt.mezo.noise import Distribution, Shapes, direction, low_rank_direction, numel_of

Optim = Literal["sgd", "adamw"]
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


@dataclass(frozen=True)
class UpdateRule:
    """How theta moves, given the projected gradients: with their log it is all that a replay needs.

    Attributes:
        distribution: of the directions' numbers, or of their factors'.
        perturbation_rank: of the directions' matrices; None for full ones.
        weight_decay: decoupled, as in AdamW.
        momentum: of SGD, as in ``torch.optim.SGD`` without dampening.
        adam_beta1, adam_beta2, adam_epsilon: as in ``torch.optim.AdamW``.
    """

    distribution: Distribution = "gaussian"
    perturbation_rank: int | None = None
    weight_decay: float = 0.0
    optim: Optim = "sgd"
    momentum: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8


class Optimizer:
    """Moves theta along mean_k projected_grad_k z_k, the estimate of the gradient.

    Momentum and AdamW keep one or two vectors like theta. They are never stored: replaying the log makes them anew.

    Args:
        theta: float32 [parameters], the master copy; changed in place.
        shapes: of the matrices that theta holds.
    """

    def __init__(self, theta: torch.Tensor, shapes: Shapes, rule: UpdateRule):
        if theta.numel() != numel_of(shapes):
            raise ValueError(f"theta has {theta.numel()} parameters, and its shapes {numel_of(shapes)}")
        self._theta = theta
        self._shapes = shapes
        self._rule = rule
        self._steps = 0
        self._first = torch.zeros_like(theta) if rule.momentum or rule.optim == "adamw" else None
        self._second = torch.zeros_like(theta) if rule.optim == "adamw" else None

    def direction(self, seed: int, index: int) -> torch.Tensor:
        """Direction ``index`` of the step that has ``seed``: float32 [parameters]."""
        if self._rule.perturbation_rank is not None:
            return low_rank_direction(seed, index, self._shapes, self._rule.perturbation_rank, self._rule.distribution)
        return direction(seed, index, self._theta.numel(), self._rule.distribution)

    def step(self, directions: Sequence[torch.Tensor], projected_grads: Sequence[float], learning_rate: float) -> None:
        """One update from directions and the projected gradient along each."""
        rule, theta = self._rule, self._theta
        weights = [projected_grad / len(directions) for projected_grad in projected_grads]
        self._steps += 1
        if rule.weight_decay:
            theta.mul_(1.0 - learning_rate * rule.weight_decay)
        if rule.optim == "adamw":
            self._adamw(_weighted_sum(directions, weights), learning_rate)
        elif rule.momentum:
            self._first.mul_(rule.momentum).add_(_weighted_sum(directions, weights))
            theta.add_(self._first, alpha=-learning_rate)
        else:
            for z, weight in zip(directions, weights, strict=True):
                theta.add_(z, alpha=-learning_rate * weight)

    def replay(self, seed: int, projected_grads: Sequence[float], learning_rate: float) -> None:
        """Repeat, bit for bit, a step that is known only by its seed and its projected gradients."""
        self.step([self.direction(seed, k) for k in range(len(projected_grads))], projected_grads, learning_rate)

    def _adamw(self, estimate: torch.Tensor, learning_rate: float) -> None:
        rule, t = self._rule, self._steps
        self._first.mul_(rule.adam_beta1).add_(estimate, alpha=1.0 - rule.adam_beta1)
        self._second.mul_(rule.adam_beta2).addcmul_(estimate, estimate, value=1.0 - rule.adam_beta2)
        scale = self._second.sqrt().div_(math.sqrt(1.0 - rule.adam_beta2**t)).add_(rule.adam_epsilon)
        self._theta.addcdiv_(self._first, scale, value=-learning_rate / (1.0 - rule.adam_beta1**t))


def _weighted_sum(directions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(directions[0])
    for z, weight in zip(directions, weights, strict=True):
        total.add_(z, alpha=weight)
    return total


def round_to_log(projected_grad: float) -> float:
    """The nearest number that the seed log can hold: a float32."""
    return struct.unpack("<f", struct.pack("<f", projected_grad))[0]
