"""The update of MeZO (arXiv 2305.17333, algorithm 1) from the drawn directions: SGD, with momentum if wanted, or
AdamW."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sglang.srt.mezo.core.errors import DivergedError, shown
from sglang.srt.mezo.core.noise import Distribution, Shapes, direction, low_rank_direction, numel_of

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

    Momentum and AdamW keep one or two vectors like theta. They are never stored: replaying the log makes them anew. A
    step that would not end in finite numbers, or in too large ones, is not taken: theta and these vectors stay as they
    are.

    Args:
        theta: float32 [parameters], the master copy; changed in place.
        shapes: of the matrices that theta holds.
        largest: number that theta may hold.
    """

    def __init__(
        self, theta: torch.Tensor, shapes: Shapes, rule: UpdateRule, largest: float = torch.finfo(torch.float32).max
    ):
        if theta.numel() != numel_of(shapes):
            raise ValueError(f"theta has {theta.numel()} parameters, and its shapes {numel_of(shapes)}")
        self._theta = theta
        self._shapes = shapes
        self._rule = rule
        self._largest = largest
        self._steps = 0
        moments = 2 if rule.optim == "adamw" else 1 if rule.momentum else 0
        self._moments = [torch.zeros_like(theta) for _ in range(moments)]
        self._next = [torch.zeros_like(theta) for _ in range(1 + moments)]  # theta and moments after the step

    def direction(self, seed: int, index: int) -> torch.Tensor:
        """Direction ``index`` of the step that has ``seed``: float32 [parameters]."""
        if self._rule.perturbation_rank is not None:
            return low_rank_direction(seed, index, self._shapes, self._rule.perturbation_rank, self._rule.distribution)
        return direction(seed, index, self._theta.numel(), self._rule.distribution)

    def step(self, directions: Sequence[torch.Tensor], projected_grads: Sequence[float], learning_rate: float) -> None:
        """One update from directions and the projected gradient along each; raises DivergedError as ``prepare``."""
        self.prepare(directions, projected_grads, learning_rate)
        self.commit()

    def replay(self, seed: int, projected_grads: Sequence[float], learning_rate: float) -> None:
        """Repeat, bit for bit, a step that is known only by its seed and its projected gradients."""
        self.prepare_replay(seed, projected_grads, learning_rate)
        self.commit()

    def prepare_replay(self, seed: int, projected_grads: Sequence[float], learning_rate: float) -> None:
        """``prepare`` with the directions of ``seed``."""
        self.prepare([self.direction(seed, k) for k in range(len(projected_grads))], projected_grads, learning_rate)

    def prepare(
        self, directions: Sequence[torch.Tensor], projected_grads: Sequence[float], learning_rate: float
    ) -> None:
        """Work an update out, which ``commit`` takes then.

        Raises:
            DivergedError: it does not end in finite numbers, none of theta's beyond ``largest``.
        """
        rule = self._rule
        for vector, current in zip(self._next, (self._theta, *self._moments), strict=True):
            vector.copy_(current)
        theta, *moments = self._next
        weights = [projected_grad / len(directions) for projected_grad in projected_grads]
        if rule.weight_decay:
            theta.mul_(1.0 - learning_rate * rule.weight_decay)
        if rule.optim == "adamw":
            self._adamw(theta, moments[0], moments[1], _weighted_sum(directions, weights), learning_rate)
        elif rule.momentum:
            moments[0].mul_(rule.momentum).add_(_weighted_sum(directions, weights))
            theta.add_(moments[0], alpha=_float32(-learning_rate))
        else:
            for z, weight in zip(directions, weights, strict=True):
                theta.add_(z, alpha=_float32(-learning_rate * weight))
        if not (is_finite(theta, self._largest) and all(map(is_finite, moments))):
            raise DivergedError(
                f"a step with learning_rate={learning_rate:g} and projected_grad={shown(list(projected_grads))} does "
                "not end in finite numbers "
                f"of at most {self._largest:.3g}: lower learning_rate"
            )

    def commit(self) -> None:
        """Take the step that was prepared last."""
        self._steps += 1
        self._theta.copy_(self._next[0])
        self._moments, self._next[1:] = self._next[1:], self._moments

    def _adamw(
        self,
        theta: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        estimate: torch.Tensor,
        learning_rate: float,
    ) -> None:
        rule, t = self._rule, self._steps + 1
        first.mul_(rule.adam_beta1).add_(estimate, alpha=1.0 - rule.adam_beta1)
        second.mul_(rule.adam_beta2).addcmul_(estimate, estimate, value=1.0 - rule.adam_beta2)
        scale = second.sqrt().div_(math.sqrt(1.0 - rule.adam_beta2**t)).add_(rule.adam_epsilon)
        theta.addcdiv_(first, scale, value=_float32(-learning_rate / (1.0 - rule.adam_beta1**t)))


def is_finite(numbers: torch.Tensor, largest: float = torch.finfo(torch.float32).max) -> bool:
    """Whether all numbers are at most ``largest``, up and down; what is no number is not."""
    return numbers.numel() == 0 or all(abs(bound.item()) <= largest for bound in numbers.aminmax())


def _float32(number: float) -> float:
    """For PyTorch, which takes no factor that does not fit."""
    return number if abs(number) <= torch.finfo(torch.float32).max else math.copysign(math.inf, number)


def _weighted_sum(directions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(directions[0])
    for z, weight in zip(directions, weights, strict=True):
        total.add_(z, alpha=_float32(weight))
    return total


def to_logged_float32(projected_grad: float) -> float:
    """The nearest number that the seed log can hold: a float32."""
    return struct.unpack("<f", struct.pack("<f", projected_grad))[0]
