"""Where a step evaluates losses, and projected gradients from them."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

Estimator = Literal["two_sided", "one_sided", "leave_one_out"]
"""What the loss at theta + zo_eps z_k is compared with: that at theta - zo_eps z_k (SPSA), that at theta, which all
directions share (FZOO, arXiv 2506.09034), or the mean over the other directions of the step. The last needs no
further losses, and what all have in common falls out of it, curvature too: a baseline as in Kool et al., "Buy 4
REINFORCE Samples, Get a Baseline for Free!", 2019."""

SIGNS: dict[Estimator, tuple[int, ...]] = {"two_sided": (1, -1), "one_sided": (1,), "leave_one_out": (1,)}
"""Of the points theta + sign zo_eps z_k that a direction is evaluated at."""


def forward_passes(estimator: Estimator, num_perturbations: int) -> int:
    """Adapters that a step evaluates its batch under."""
    return num_perturbations * len(SIGNS[estimator]) + (1 if estimator == "one_sided" else 0)


def with_baselines(losses: Sequence[float], estimator: Estimator) -> tuple[list[float], list[float]]:
    """The loss at theta + zo_eps z_k of every direction, and what it is compared with, which is the loss at
    theta - zo_eps z_k with "two_sided" only.

    Args:
        losses: at the ``SIGNS`` of each direction in turn; with "one_sided" the one at theta comes first.
    """
    if estimator == "two_sided":
        return list(losses[0::2]), list(losses[1::2])
    if estimator == "one_sided":
        return list(losses[1:]), [losses[0]] * (len(losses) - 1)
    total = _total(losses)
    return list(losses), [(total - loss) / (len(losses) - 1) for loss in losses]


def _total(losses: Sequence[float]) -> float:
    """Not finite where it cannot be told, which ends a run."""
    try:
        return math.fsum(losses)
    except (OverflowError, ValueError):  # beyond all numbers, or the sum of both infinities
        return math.nan


def projected_grads(
    losses: Sequence[float],
    baselines: Sequence[float],
    zo_eps: float,
    estimator: Estimator = "two_sided",
    scale_by_loss_std: bool = False,
) -> list[float]:
    """The estimate of z_k . grad L along every direction; leaving one out, of its difference to the mean of the others.

    Args:
        losses, baselines: as ``with_baselines`` gives them.
        scale_by_loss_std: put the standard deviation of the losses beside theta in the place of ``zo_eps`` (FZOO):
            steps of one length, whatever the slope. Zero where all losses are equal.
    """
    two_sided = estimator == "two_sided"
    differences = [loss - baseline for loss, baseline in zip(losses, baselines, strict=True)]
    radius = (
        (statistics.stdev([*losses, *(baselines if two_sided else ())]) or math.inf) if scale_by_loss_std else zo_eps
    )
    return [difference / (2 * radius if two_sided else radius) for difference in differences]
