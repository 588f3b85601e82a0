"""From the values that were read off the model to losses and predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.scoring.losses import option_cross_entropy, option_scores, split_options
from sglang.srt.mezo.scoring.plan import ExamplePlan


@dataclass(frozen=True)
class BatchLoss:
    """Summed losses, so that batches can be pooled.

    Attributes:
        total: float64 [slots].
        weight: what to divide by: tokens of completions, else examples.
    """

    total: torch.Tensor
    weight: int

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.weight


def batch_loss(plans: Sequence[ExamplePlan], values: torch.Tensor, objective: Objective) -> BatchLoss:
    """Loss of a batch in every slot.

    Classification: mean over examples of the cross-entropy over options. Accuracy: the share of right predictions, with
    the sign changed. Otherwise: mean over all tokens of the batch's right options of their negative log-probability, as
    the MeZO paper's code does.

    Args:
        values: [slots, reads], from ``Scorer.passes``.
    """
    if objective == "accuracy":
        return BatchLoss(-right_predictions(plans, values), len(plans))
    if objective == "classification":
        labels = torch.tensor([plan.label for plan in plans])
        return BatchLoss(option_cross_entropy(_scores(plans, values), labels).sum(dim=1), len(plans))
    right = torch.tensor([option == plan.label for plan in plans for option in plan.option_of_read])
    return BatchLoss(-values[:, right].double().sum(dim=1), int(right.sum()))


def predictions(plans: Sequence[ExamplePlan], values: torch.Tensor) -> torch.Tensor:
    """Index of the option with the best score: int64 [slots, examples]."""
    return _scores(plans, values).argmax(dim=-1)


def right_predictions(plans: Sequence[ExamplePlan], values: torch.Tensor) -> torch.Tensor:
    """How many examples have a right option as their best; NaN in a slot with values that are no numbers: float64
    [slots]."""
    right = torch.zeros(len(plans), max(len(plan.option_lengths) for plan in plans), dtype=torch.bool)
    for row, plan in enumerate(plans):
        right[row, list(plan.right)] = True
    found = right[torch.arange(len(plans)), predictions(plans, values)].sum(dim=1).double()
    return found.where((values < math.inf).all(dim=1), math.nan)  # which NaN is not, either


def choices(plans: Sequence[ExamplePlan], values: torch.Tensor) -> list[dict[str, Any]]:
    """Of each example at the first point: the scores of its options, and of several the best one and whether that is
    right."""
    scores, best = _scores(plans, values)[0], predictions(plans, values)[0].tolist()
    return [
        {"scores": own[: len(plan.option_lengths)].tolist()}
        | ({"prediction": found, "correct": found in plan.right} if plan.right else {})
        for plan, own, found in zip(plans, scores, best)
    ]


def _scores(plans: Sequence[ExamplePlan], values: torch.Tensor) -> torch.Tensor:
    """Scores float64 [slots, examples, options], -inf where an example has fewer options."""
    option_of_read, lengths = [], []
    for plan in plans:
        option_of_read += [len(lengths) + option for option in plan.option_of_read]
        lengths += plan.option_lengths
    scores = option_scores(values, torch.tensor(option_of_read), torch.tensor(lengths))
    return split_options(scores, [len(plan.option_lengths) for plan in plans])
