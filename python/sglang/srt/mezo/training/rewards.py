"""What completions that the model writes are worth: SQuAD's metrics, or what a function of the user's makes of them."""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.mezo.core.errors import ConfigError, RewardError, one_line, shown
from sglang.srt.mezo.core.objective import GENERATED, Generation, Objective
from sglang.srt.mezo.core.user_code import user_object
from sglang.srt.mezo.data.metrics import exact_match, f1
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.scoring.generator import Completions, Generator
from sglang.srt.mezo.scoring.measures import Grade, Measure, Reading, Writing
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reward = Callable[..., Sequence[float]]

_METRICS = {"f1": f1, "exact_match": exact_match}


class Writer(NamedTuple):
    """What an objective takes for which the model writes completions."""

    generation: Generation
    tokenizer: "PreTrainedTokenizerBase"
    grade: Grade

    @classmethod
    def of(cls, generation: Generation | None, tokenizer: "PreTrainedTokenizerBase") -> "Writer | None":
        """None where the model writes nothing; raises ConfigError where there is no such reward."""
        return None if generation is None else cls(generation, tokenizer, _grade_of(generation))


def measure_of(handle: EngineHandle, scorer: Scorer, objective: Objective, writer: Writer | None) -> Measure:
    """What an objective makes of examples."""
    if objective not in GENERATED:
        return Reading(scorer, objective)
    if writer is None:
        raise ConfigError("objective", objective, "one for which the model writes nothing, or a writer beside it")
    generation = writer.generation
    ends = handle.model_runner.model_config.hf_eos_token_id or ()
    generator = Generator(handle, scorer, generation, Completions(writer.tokenizer, generation, tuple(ends)))
    return Writing(handle, generator, generation.objective, writer.grade)


def _grade_of(generation: Generation) -> Grade:
    if generation.reward is not None:
        return _Rewarded(generation.reward, *resolve(generation.reward))
    metric = _METRICS[generation.objective]
    return lambda plans, texts: [metric(text, (plan.columns or {})["answers"]) for plan, text in zip(plans, texts)]


def resolve(name: str) -> tuple[Reward, inspect.Signature]:
    """What ``module:function`` names, and what it takes; raises ConfigError where there is none."""
    return user_object("reward", name, "module:function", lambda found: (found, inspect.signature(found)))


class _Rewarded:
    """Calls a user's function with what it takes by name: ``prompts``, ``completions``, and columns of the rows."""

    def __init__(self, name: str, function: Reward, signature: inspect.Signature):
        self._name = name
        self._function = function
        parameters = signature.parameters.values()
        self._takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        self._taken = {one.name for one in parameters}

    def __call__(self, plans: Sequence[ExamplePlan], texts: Sequence[str]) -> list[float]:
        rows = [plan.columns or {} for plan in plans]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        given = columns | {"prompts": [row["prompt"] for row in rows], "completions": list(texts)}
        try:
            rewards = self._function(**{name: given[name] for name in given if self._takes_all or name in self._taken})
            return self._checked(rewards, len(texts))
        except RewardError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"{self._name} failed in {where.filename}:{where.lineno}: {type(error).__name__}: {one_line(error)}"
            ) from error

    def _checked(self, rewards: Sequence[float], count: int) -> list[float]:
        values = list(rewards)
        if len(values) != count:
            raise RewardError(f"{self._name} returned {len(values)} rewards for {count} completions")
        numbers = [float(value) for value in values]
        for value, number in zip(values, numbers):
            if not math.isfinite(number):
                raise RewardError(f"{self._name} returned {shown(value)}, which is no finite number")
        return numbers
