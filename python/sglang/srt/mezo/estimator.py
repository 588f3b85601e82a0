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
        scale_by_loss_std: put the standard deviation of the losses beside theta in the place of ``zo_eps`` (FZOO,
            arXiv 2506.09034, there one-sided): steps of one length, whatever the slope. Zero where all losses are equal.
    """
    two_sided = estimator == "two_sided"
    differences = [plus - minus for plus, minus in zip(loss_plus, loss_minus, strict=True)]
    radius = (statistics.stdev([*loss_plus, *(loss_minus if two_sided else ())]) or math.inf) if scale_by_loss_std else zo_eps
    return [difference / (2 * radius if two_sided else radius) for difference in differences]
