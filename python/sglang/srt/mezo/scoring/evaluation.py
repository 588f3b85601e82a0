"""Loss and accuracy at one point on a set of planned examples."""

from collections.abc import Sequence

from sglang.srt.mezo.core.config import Objective
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.points import Point
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import batch_loss, predictions
from sglang.srt.mezo.scoring.scorer import Scorer


def evaluation_passes(
    scorer: Scorer, plans: Sequence[ExamplePlan], point: Point, objective: Objective, batch_size: int
) -> Passes[dict[str, float]]:
    """Score ``plans`` under one point.

    Returns:
        ``loss``, and ``accuracy`` where there are options to choose from.
    """
    total, weight, right = 0.0, 0, 0
    for start in range(0, len(plans), batch_size):
        batch = plans[start : start + batch_size]
        values = yield from scorer.passes(batch, [(point,)], objective, keep=False)
        loss = batch_loss(batch, values, objective)
        total += loss.total.item()
        weight += loss.weight
        if objective == "classification":
            right += sum(int(p) == plan.label for p, plan in zip(predictions(batch, values)[0], batch))
    metrics = {"loss": total / weight}
    if objective == "classification":
        metrics["accuracy"] = right / len(plans)
    return metrics
