"""What makes an example one that a run can score."""

from collections.abc import Iterable, Sequence

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.objective import SCORES, Objective, metric_name, metrics_of
from sglang.srt.mezo.scoring.plan import ExamplePlan


def require_usable(plans: Sequence[ExamplePlan], config: MezoConfig, objective: Objective, context_length: int) -> None:
    """Raise ConfigError or DataError for an example that a run of these settings cannot score.

    Args:
        context_length: most tokens of a sequence.
    """
    require_objective(config, objective, (len(plan.option_lengths) for plan in plans))
    for plan in plans:
        longest = max(len(row.prefix) + len(row.suffix) for row in plan.rows)
        if longest > context_length:
            raise DataError(f"a sequence of {longest} tokens is longer than the engine's context of {context_length}")


def require_objective(config: MezoConfig, objective: Objective, option_counts: Iterable[int]) -> None:
    """Raise ConfigError where ``objective`` is not one for examples of so many options, or has no such metric."""
    require_choices(objective, option_counts)
    require_metric(config.metric_for_best_model, objective)


def require_metric(metric: str | None, objective: Objective) -> None:
    """Raise ConfigError where evaluations have no such metric."""
    if metric_name(metric) not in metrics_of(objective):
        raise ConfigError("metric_for_best_model", metric, f"one of {', '.join(metrics_of(objective))} for {objective}")


def require_choices(objective: Objective, option_counts: Iterable[int]) -> None:
    """Raise ConfigError where there is nothing to choose from in an example that is to be classified."""
    if "accuracy" in SCORES[objective] and any(count < 2 for count in option_counts):
        raise ConfigError(
            "objective", objective, "completion, as an example has one option only: nothing to choose from"
        )
