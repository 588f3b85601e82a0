"""Fine-tune an OPT model, or one of another family of docs/models.md, with forward passes only.

    python examples/mezo_opt_training.py                                           # embedded model and task, minutes
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2      # the real thing
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2 --tuning lora --learning_rate 1e-4

Every field of ModelArguments, DataArguments and MezoConfig is a flag, and MeZO's, PEFT's and TRL's names for the same
things are too. The run directory receives the adapter (PEFT format), the seed log, metrics.jsonl, the
plot and summary.json.
"""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.engine.accelerator import serving_flags
from sglang.srt.mezo.training.arguments import build, read, status_of
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, finetune

KINDS = (ModelArguments, DataArguments, MezoConfig)
ASSETS = Path(__file__).parent / "assets"
MODEL = {"model": str(ASSETS / "opt-reviews"), "dtype": "float32"}
TASK = {"task": "sst2", "dataset": str(ASSETS / "reviews"), "dev_split": "validation", "test_split": "test"}
"""The model and the task that the repository carries: what a command line gets that names none."""
STEPS = {"max_steps": 250}


def main(arguments: list[str]) -> None:
    given = {"output_dir": f"runs/{datetime.now():%Y%m%d-%H%M%S}"} | completed(read(arguments, KINDS, __doc__))
    model, data, config = build(KINDS, given)
    report(model, config, finetune(model, data, config))


def completed(given: dict[str, Any]) -> dict[str, Any]:
    """The fields on the command line, and those of what the repository carries where they leave that open."""
    if "model" in given:
        return given
    task = {} if "dataset" in given else TASK
    steps = {} if {"max_steps", "num_train_epochs"} & given.keys() else STEPS
    return MODEL | task | steps | given


def report(model: ModelArguments, config: MezoConfig, summary: dict) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    total = summary["prefix_tokens_total"]
    name = Path(config.output_dir).name
    flags = "".join(f" {flag}" for flag in serving_flags(config.tuning == "alora", model.dtype))
    shared = "".join(f"; {count} examples: {where}" for where, count in summary["shared_examples"].items())
    print(
        f"""
zero-shot accuracy     {percent(summary["zero_shot_accuracy"])}
trained accuracy       {percent(summary["accuracy"])}   (adapter of step {summary["best_step"]} of
{summary["steps"]}){shared} speed                  {summary["steps_per_second"]:.1f} steps/s,
{summary["train_seconds"]:.0f} s of training prefix tokens reused   {
            percent(summary["prefix_tokens_reused"] / total if total else None)
        } of {total} peak memory            {summary["peak_rss_bytes"] / 2**20:.0f} MiB
adapter                {summary["adapter_dir"]}
plot                   {summary["plot"] or "not drawn: pip install 'sglang-mezo[plots]'"}

Serve it:
  python -m sglang.launch_server --model-path {model.model} --dtype {model.dtype} --enable-lora --lora-paths
  {name}={summary["adapter_dir"]}{flags}
"""
    )


if __name__ == "__main__":
    status = status_of(lambda: main(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(status)  # the engine's threads are of no further use
