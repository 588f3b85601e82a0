"""Loss and scores at one point on a set of planned examples."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang.srt.mezo.core.noise import step_seed
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.points import Point
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.scoring.plan import ExamplePlan


def evaluation_passes(
    measure: Measure,
    plans: Sequence[ExamplePlan],
    point: Point,
    batch_size: int,
    seed: int,
    told: list[dict[str, Any]] | None = None,
) -> Passes[dict[str, float]]:
    """Measure ``plans`` under one point.

    Args:
        seed: of what is drawn by chance.
        told: to which what was read or written of each plan is added.

    Returns:
        ``loss``, and the means of the measure's scores, such as ``accuracy`` of the examples with options to choose
        from.
    """
    total, weight = 0.0, 0
    scores: Counter[str] = Counter()
    examples: Counter[str] = Counter()
    for start in range(0, len(plans), batch_size):
        batch = plans[start : start + batch_size]
        measured = yield from measure.passes(batch, [(point,)], step_seed(seed, start), keep=False)
        total += measured.loss.total.item()
        weight += measured.loss.weight
        scores.update({name: score.total.item() for name, score in measured.scores.items()})
        examples.update({name: score.examples for name, score in measured.scores.items()})
        if told is not None:
            told += measured.told()
    return {"loss": total / weight, **{name: score / examples[name] for name, score in scores.items()}}
