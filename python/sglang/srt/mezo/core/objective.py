"""What a loss is made of: what the model says of given texts, or what it writes itself."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Optional, get_args

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.settings import LARGEST, require_settings, setting

GeneratedObjective = Literal["f1", "exact_match", "reward"]
Objective = Literal["classification", "completion", "accuracy", GeneratedObjective]
"""Losses of what the model says of given texts, or of what it writes itself. That of an accuracy, F1 score, exact match
or reward, which has no derivative, is its mean with the sign changed."""
OF_EARLIER_VERSIONS = {"objective": {"language_modeling": "completion"}}
"""Values that are called otherwise now, in configurations that an earlier version has stored."""
GENERATED: tuple[Objective, ...] = get_args(GeneratedObjective)
SCORES: dict[Objective, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "accuracy": ("accuracy",),
    "completion": (),
    **{objective: (objective,) for objective in GENERATED},
}
"""What evaluations tell beside the loss."""
SCORE_METRICS = {f"eval_{score}": score for scores in SCORES.values() for score in scores}
"""The name of each in a run's metrics -> its own."""
LOSS_METRIC = "eval_loss"
NEW_TEXT: dict[str, Any] = {"max_new_tokens": 50, "temperature": 0.0, "stop": None}
"""How a model writes for which nobody says it."""


def metric_name(given: str | None) -> str:
    """A metric of evaluations as a run has it, of one that is given with or without ``eval_``, as Transformers takes
    either; the loss where none is."""
    if given is None:
        return LOSS_METRIC
    return given if given.startswith("eval_") else f"eval_{given}"


def metrics_of(objective: Objective) -> tuple[str, ...]:
    """What an adapter can be chosen by."""
    return (LOSS_METRIC, *(metric_name(score) for score in SCORES[objective]))


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Strictly, of a metric of evaluations; of several that are alike the first is the best, and what is no number
    never."""
    if math.isnan(value):
        return False
    return best is None or (value < best if metric == LOSS_METRIC else value > best)


@dataclass(frozen=True)
class Generation:
    """How completions are written, and what is made of them; the fields are those of ``MezoConfig``."""

    objective: Objective
    reward: str | None
    max_new_tokens: int
    temperature: float
    stop: str | None


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What a loss is made of; ConfigError names the field at fault."""

    objective: Optional[Objective] = setting(
        None,
        "Loss; the one that the data suggests by default. accuracy, of options; f1 and exact_match, of completions "
        "that the model writes; reward: what a function makes of them.",
        job=True,
    )
    reward: Optional[str] = setting(
        None,
        "module:function, which gets prompts and completions, and returns a number for each; more is better. A job "
        "names one of --mezo-rewards.",
        job=True,
    )
    max_new_tokens: int = setting(
        None, "Of completions that the model writes: most tokens; 50 by default.", at_least=1, follows=True, job=True
    )
    temperature: float = setting(
        None,
        "Of completions that the model writes: 0, the default, for the likeliest token; else of sampling, by the "
        "step's seed.",
        at_least=0,
        at_most=LARGEST,
        follows=True,
        job=True,
    )
    stop: Optional[str] = setting(
        None,
        "Of completions that the model writes: text before which they end; their end-of-text token by default.",
        job=True,
    )

    def __post_init__(self):
        for name, renamed in OF_EARLIER_VERSIONS.items():
            if getattr(self, name) in renamed:
                object.__setattr__(self, name, renamed[getattr(self, name)])
        require_settings(self)
        if self.reward is not None:
            self._settle({"objective": "reward"})
        self._require(
            "reward", (self.reward is None) == (self.objective != "reward"), "module:function, with objective=reward"
        )
        self._require("stop", self.stop != "", "a text, or none")
        for name, value in NEW_TEXT.items():
            if self.objective in GENERATED:
                self._settle({name: value})
            self._require(
                name,
                self.objective in GENERATED or getattr(self, name) is None,
                f"nothing beside objective={self.objective}, for which the model writes nothing",
            )

    def _settle(self, values: dict[str, Any]) -> None:
        """Set what is open."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(name, getattr(self, name), allowed)

    @property
    def generation(self) -> Generation | None:
        """Of the objective, where the model writes completions for it."""
        if self.objective not in GENERATED:
            return None
        return Generation(self.objective, self.reward, self.max_new_tokens, self.temperature, self.stop)
