"""Projected gradients from losses: central differences (SPSA), or one-sided ones that share the loss at theta."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

Estimator = Literal["two_sided", "one_sided"]


def projected_grads(
    loss_plus: Sequence[float], loss_minus: Sequence[float], zo_eps: float, estimator: Estimator = "two_sided", scale_by_loss_std: bool = False
) -> list[float]:
    """The estimate of z_k . grad L along every direction.

    Args:
        loss_plus: at theta + zo_eps z_k.
        loss_minus: at theta - zo_eps z_k, or with "one_sided" at theta.
        scale_by_loss_std: divide the differences by the standard deviation of ``loss_plus`` in place of the distance
            (FZOO, arXiv 2506.09034): steps of one length, whatever the slope. Zero where all losses are equal.
    """
    differences = [plus - minus for plus, minus in zip(loss_plus, loss_minus, strict=True)]
    distance = 2 * zo_eps if estimator == "two_sided" else zo_eps
    if scale_by_loss_std:
        distance = statistics.stdev(loss_plus) or math.inf
    return [difference / distance for difference in differences]
