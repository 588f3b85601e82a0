"""Options scored by how much likelier a row makes them than a prompt that says nothing of it (surface form competition,
arXiv 2104.08315), as the MeZO paper's code calibrates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.points import PointGroup
from sglang.srt.mezo.scoring.measures import Measured, Reader, Scores
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import batch_loss, choices, right_predictions


@dataclass(frozen=True)
class Calibrated:
    """A choice between options by their summed log-probabilities less those after the prompt that says nothing.

    Attributes:
        prompts: of each plan, by its identity, the same options after that prompt.
    """

    scorer: Reader
    prompts: Mapping[int, ExamplePlan]
    objective: Objective = "classification"
    held_tokens = 0

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[Measured]:
        nothing = [self.prompts[id(plan)] for plan in plans]
        given = yield from self.scorer.passes(plans, groups, "completion", keep)
        without = yield from self.scorer.passes(nothing, groups, "completion", keep)
        # One read an option, as the sums of theirs.
        gains = _sums(plans, given) - _sums(nothing, without)
        single = [
            replace(plan, option_of_read=tuple(range(count)), option_lengths=(1,) * count)
            for plan in plans
            if (count := len(plan.option_lengths))
        ]
        right = right_predictions(single, gains)
        loss = batch_loss(single, gains, self.objective)
        return Measured(loss, {"accuracy": Scores(right, len(plans))}, partial(choices, single, gains))

    def release(self) -> None:
        """It holds none."""


def _sums(plans: Sequence[ExamplePlan], values: torch.Tensor) -> torch.Tensor:
    """Of the reads of each option: float64 [points, options]."""
    lengths = torch.tensor([length for plan in plans for length in plan.option_lengths])
    option_of_read = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(values), len(lengths), dtype=torch.float64).index_add_(1, option_of_read, values.double())
