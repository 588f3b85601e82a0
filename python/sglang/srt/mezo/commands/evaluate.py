"""``sglang-mezo evaluate``: loss and accuracy of an adapter, or of the base model, as a JSON object.

sglang-mezo evaluate --model facebook/opt-125m --task sst2
sglang-mezo evaluate --model facebook/opt-125m --adapter runs/mine/adapter --dataset rows.jsonl
sglang-mezo evaluate --model facebook/opt-125m --adapter runs/mine/adapter --task sst2 --with transformers
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang.srt.mezo.commands.train import end
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.experiments.reference import measure_by_transformers
from sglang.srt.mezo.training.arguments import build, read
from sglang.srt.mezo.training.evaluate import EvaluateArguments, evaluate, read_evaluation, write_predictions
from sglang.srt.mezo.training.finetune import ModelArguments


@dataclass(frozen=True)
class EngineArguments:
    """By what the model is run; ConfigError names the field at fault."""

    engine: Literal["sglang", "transformers"] = setting(
        "sglang", "Or transformers, for Transformers and PEFT alone, as a check; --with means the same."
    )

    def __post_init__(self):
        require_settings(self)


KINDS = (ModelArguments, EvaluateArguments, EngineArguments)


def main(arguments: Sequence[str]) -> None:
    end(lambda: print(json.dumps(evaluated(*build(KINDS, read(_named(arguments), KINDS, __doc__))))))


def evaluated(model: ModelArguments, arguments: EvaluateArguments, by: EngineArguments) -> dict[str, Any]:
    """What ``evaluate`` returns, by an engine or by Transformers and PEFT alone."""
    if by.engine == "sglang":
        return evaluate(model, arguments)
    metrics, told = measure_by_transformers(model, read_evaluation(model, arguments), arguments)
    write_predictions(arguments, told)
    return metrics


def _named(arguments: Sequence[str]) -> list[str]:
    """``--with`` is ``--engine``: no field can be called so."""
    return [f"--engine{one.removeprefix('--with')}" if one.partition("=")[0] == "--with" else one for one in arguments]
