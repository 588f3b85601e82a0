"""Loss and accuracy of one adapter, or of the base model, on a set of planned examples."""

from collections.abc import Sequence

from sglang.srt.mezo.core.config import Objective
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import batch_loss, predictions
from sglang.srt.mezo.scoring.scorer import Scorer


def evaluation_passes(
    scorer: Scorer, plans: Sequence[ExamplePlan], lora_id: str | None, objective: Objective, batch_size: int
) -> Passes[dict[str, float]]:
    """Score ``plans`` under one adapter (None: the base model).

    Returns:
        ``loss``, and ``accuracy`` where there are options to choose from.
    """
    total, weight, right = 0.0, 0, 0
    for start in range(0, len(plans), batch_size):
        batch = plans[start : start + batch_size]
        values = yield from scorer.passes(batch, [(lora_id,)], objective, keep=False)
        loss = batch_loss(batch, values, objective)
        total += loss.total.item()
        weight += loss.weight
        if objective == "classification":
            right += sum(int(p) == plan.label for p, plan in zip(predictions(batch, values)[0], batch))
    metrics = {"loss": total / weight}
    if objective == "classification":
        metrics["accuracy"] = right / len(plans)
    return metrics
