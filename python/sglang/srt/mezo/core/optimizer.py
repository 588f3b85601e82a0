"""The update of MeZO (arXiv 2305.17333, algorithm 1) from the drawn directions: SGD, with momentum if wanted, or
AdamW."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sglang.srt.mezo.core.directions import Directions, DrawnDirections, LowRankDirections
from sglang.srt.mezo.core.errors import DivergedError, shown
from sglang.srt.mezo.core.noise import Distribution, Shapes, numel_of

Optim = Literal["sgd", "adamw"]
SchedulerType = Literal["constant", "linear", "cosine"]

_STRETCH, _STRETCH_ON_DEVICE = 1 << 20, 1 << 26  # numbers that are worked out at a time


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
        weight_decay: decoupled, as in AdamW; of matrices, not of vectors.
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
    are. Beside them a step needs the room of some stretches only.

    Args:
        theta: float32 [parameters], the master copy; changed in place.
        shapes: of the matrices and vectors that theta holds.
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
        self._moments = [torch.zeros_like(theta) for _ in range(2 if rule.optim == "adamw" else bool(rule.momentum))]
        self._prepared: _Step | None = None

    def directions(self, seed: int, count: int) -> Directions:
        """Those of the step that has ``seed``."""
        rule = self._rule
        if rule.perturbation_rank is None:
            return DrawnDirections(seed, count, rule.distribution)
        return LowRankDirections(seed, count, self._shapes, rule.perturbation_rank, rule.distribution)

    def step(self, directions: Directions, projected_grads: Sequence[float], learning_rate: float) -> None:
        """One update from directions and the projected gradient along each; raises DivergedError as ``prepare``."""
        self.prepare(directions, projected_grads, learning_rate)
        self.commit()

    def replay(self, seed: int, projected_grads: Sequence[float], learning_rate: float) -> None:
        """Repeat, bit for bit, a step that is known only by its seed and its projected gradients."""
        self.prepare_replay(seed, projected_grads, learning_rate)
        self.commit()

    def prepare_replay(self, seed: int, projected_grads: Sequence[float], learning_rate: float) -> None:
        """``prepare`` with the directions of ``seed``."""
        self.prepare(self.directions(seed, len(projected_grads)), projected_grads, learning_rate)

    def prepare(self, directions: Directions, projected_grads: Sequence[float], learning_rate: float) -> None:
        """Make sure of an update, which ``commit`` takes then.

        Raises:
            DivergedError: it does not end in finite numbers, none of theta's beyond ``largest``.
        """
        if len(directions) != len(projected_grads):
            raise ValueError(f"{len(directions)} directions have {len(projected_grads)} projected gradients")
        step = _Step(directions, [grad / len(directions) for grad in projected_grads], learning_rate)
        if not (self._is_surely_finite(step) or self._ends_finite(step)):
            raise DivergedError(
                f"a step with learning_rate={learning_rate:g} and projected_grad={shown(list(projected_grads))} does "
                "not end in finite numbers "
                f"of at most {self._largest:.3g}: lower learning_rate"
            )
        self._prepared = step

    def commit(self) -> None:
        """Take the step that was prepared last."""
        step, self._prepared = self._prepared, None
        assert step is not None, "commit follows prepare"
        for first in self._firsts():
            self._move(step, first, *self._stretch(first))
        self._steps += 1

    def _is_surely_finite(self, step: "_Step") -> bool:
        """Whether the largest numbers that there are leave no doubt, so that the step need not be worked out twice."""
        rule = self._rule
        if rule.optim == "adamw":
            return False
        theta, *moments = (_largest_of(vector) for vector in (self._theta, *self._moments))
        along = sum(map(abs, step.weights)) * step.directions.largest
        if moments:
            along += rule.momentum * moments[0]
        kept = abs(1.0 - step.learning_rate * rule.weight_decay) * theta
        bound = 1.001 * (kept + abs(step.learning_rate) * along)  # more than rounding adds
        return 1.001 * along <= torch.finfo(torch.float32).max and bound <= self._largest

    def _ends_finite(self, step: "_Step") -> bool:
        """Work a step out on copies, a stretch at a time."""
        for first in self._firsts():
            theta, *moments = (numbers.clone() for numbers in self._stretch(first))
            self._move(step, first, theta, *moments)
            if not (is_finite(theta, self._largest) and all(map(is_finite, moments))):
                return False
        return True

    def _firsts(self) -> range:
        return range(0, self._theta.numel(), _STRETCH if self._theta.device.type == "cpu" else _STRETCH_ON_DEVICE)

    def _stretch(self, first: int) -> list[torch.Tensor]:
        """Of theta and its moments, from ``first`` on."""
        end = first + self._firsts().step
        return [vector[first:end] for vector in (self._theta, *self._moments)]

    def _move(self, step: "_Step", first: int, theta: torch.Tensor, *moments: torch.Tensor) -> None:
        """The step itself, on the stretch from ``first`` on."""
        rule, rate = self._rule, step.learning_rate
        if rule.weight_decay:
            for decayed in self._matrices_in(first, theta):
                decayed.mul_(1.0 - rate * rule.weight_decay)
        if rule.optim == "adamw":
            self._adamw(theta, moments[0], moments[1], step.estimate(first, theta), rate)
        elif rule.momentum:
            moments[0].mul_(rule.momentum).add_(step.estimate(first, theta))
            theta.add_(moments[0], alpha=_float32(-rate))
        else:
            for k, weight in enumerate(step.weights):
                step.directions.add(k, _float32(-rate * weight), theta, theta, first)

    def _matrices_in(self, first: int, stretch: torch.Tensor) -> Iterator[torch.Tensor]:
        """What of a stretch of theta that begins at ``first`` belongs to matrices."""
        begin = 0
        for shape in self._shapes:
            end = begin + math.prod(shape)
            if len(shape) == 2 and end > first and begin < first + stretch.numel():
                yield stretch[max(0, begin - first) : end - first]
            begin = end

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


@dataclass(frozen=True)
class _Step:
    """weights: of the directions in the estimate of the gradient."""

    directions: Directions
    weights: list[float]
    learning_rate: float

    def estimate(self, first: int, theta: torch.Tensor) -> torch.Tensor:
        """Of the gradient, on the stretch of ``theta`` that begins at ``first``."""
        total = torch.zeros_like(theta)
        for k, weight in enumerate(self.weights):
            self.directions.add(k, _float32(weight), total, total, first)
        return total


def is_finite(numbers: torch.Tensor, largest: float = torch.finfo(torch.float32).max) -> bool:
    """Whether all numbers are at most ``largest``, up and down; what is no number is not."""
    return numbers.numel() == 0 or all(abs(bound.item()) <= largest for bound in numbers.aminmax())


def _largest_of(numbers: torch.Tensor) -> float:
    """Up or down; NaN where one is."""
    low, high = (bound.item() for bound in numbers.aminmax()) if numbers.numel() else (0.0, 0.0)
    return max(-low, high)


def _float32(number: float) -> float:
    """For PyTorch, which takes no factor that does not fit."""
    return number if abs(number) <= torch.finfo(torch.float32).max else math.copysign(math.inf, number)


def to_logged_float32(projected_grad: float) -> float:
    """The nearest number that the seed log can hold: a float32."""
    return struct.unpack("<f", struct.pack("<f", projected_grad))[0]
