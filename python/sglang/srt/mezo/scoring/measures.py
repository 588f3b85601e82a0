"""What the loss of a run is: of what the model says of given texts, or of what it writes itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.points import PointGroup
from sglang.srt.mezo.scoring.generator import Generator
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import BatchLoss, batch_loss, choices, right_predictions

Grade = Callable[[Sequence[ExamplePlan], Sequence[str]], list[float]]
"""Of a completion of each plan; more is better."""


class Scores(NamedTuple):
    """float64 [points] sums over the examples that have such a score, and how many these are."""

    total: torch.Tensor
    examples: int


@dataclass(frozen=True)
class Measured:
    """Of examples at points.

    Attributes:
        loss: summed.
        scores: by the name of a metric; more is better.
        told: what was read or written of each example at the first point, as JSON has it.
    """

    loss: BatchLoss
    scores: dict[str, Scores]
    told: Callable[[], list[dict[str, Any]]]


class Measure(Protocol):
    """What the loss of a run is.

    Attributes:
        objective: by name.
    """

    @property
    def objective(self) -> Objective: ...

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[Measured]:
        """Measure every plan at every point, in the order of ``groups``.

        Args:
            seed: of what is drawn by chance.
            keep: base-model prefixes may stay locked afterwards.
        """
        ...

    @property
    def held_tokens(self) -> int:
        """Places of the KV pool that it holds between passes."""
        ...

    def release(self) -> None:
        """Give them back; what is under way is lost."""
        ...


class Reader(Protocol):
    """What reads the scored tokens of plans off a model, as ``Scorer`` does."""

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], objective: Objective, keep: bool = True
    ) -> Passes[torch.Tensor]: ...


@dataclass(frozen=True)
class Reading:
    """What the model says of the texts of the plans."""

    scorer: Reader
    objective: Objective
    held_tokens = 0

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[Measured]:
        values = yield from self.scorer.passes(plans, groups, self.objective, keep)
        asked = sum(bool(plan.right) for plan in plans)
        scores = {"accuracy": Scores(right_predictions(plans, values), asked)} if asked else {}
        return Measured(batch_loss(plans, values, self.objective), scores, partial(choices, plans, values))

    def release(self) -> None:
        """It holds none."""


@dataclass(frozen=True)
class Writing:
    """What the model writes after the plans, graded; the loss is the grade with its sign changed.

    Attributes:
        grade: called on the leader, once for all points that the engine holds at a time, point after point.
    """

    handle: EngineHandle
    generator: Generator
    objective: Objective
    grade: Grade

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[Measured]:
        texts = yield from self.generator.passes(plans, groups, seed, keep)
        grades = self.handle.on_leader(self.grade, list(plans) * len(texts), sum(texts, []))
        total = torch.tensor(grades, dtype=torch.float64).view(len(texts), len(plans)).sum(dim=1)
        told = partial(_written, self.objective, texts[0], grades)
        return Measured(BatchLoss(-total, len(plans)), {self.objective: Scores(total, len(plans))}, told)

    @property
    def held_tokens(self) -> int:
        return self.generator.held_tokens

    def release(self) -> None:
        self.generator.release()


def _written(objective: Objective, texts: Sequence[str], grades: Sequence[float]) -> list[dict[str, Any]]:
    return [{"completion": text, objective: grade} for text, grade in zip(texts, grades)]
