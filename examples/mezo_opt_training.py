"""Fine-tune an OPT model (or any causal language model that SGLang serves with LoRA) with forward passes only.

    python examples/mezo_opt_training.py                                           # embedded model and task, minutes
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2      # the real thing
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2 --tuning lora --learning_rate 1e-4

Every field of MezoConfig is a flag. The run directory receives the adapter (PEFT format), the seed log, metrics.jsonl, the
plot and summary.json.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from transformers import HfArgumentParser

from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.errors import MezoError
from sglang.srt.mezo.finetune import DataArguments, ModelArguments, finetune

ASSETS = Path(__file__).parent / "assets"

EMBEDDED = {
    "model": str(ASSETS / "opt-reviews"),
    "dtype": "float32",
    "task": "sst2",
    "dataset": str(ASSETS / "reviews"),
    "dev_split": "validation",
    "test_split": "test",
    "max_steps": "250",
}
"""Flags for the model and the task that the repository carries; the command line may override each."""


def main(arguments: list[str]) -> int:
    parser = HfArgumentParser((ModelArguments, DataArguments, MezoConfig), description=__doc__)
    parser.set_defaults(output_dir=f"runs/{datetime.now():%Y%m%d-%H%M%S}")
    if not any(argument.split("=")[0] in ("--model", "-h", "--help") for argument in arguments):
        arguments = [f"--{name}={value}" for name, value in EMBEDDED.items()] + arguments
    try:
        model, data, config = parser.parse_args_into_dataclasses(arguments)
        summary = finetune(model, data, config)
    except MezoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(model, config, summary)
    return 0


def report(model: ModelArguments, config: MezoConfig, summary: dict) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    total = summary["prefix_tokens_total"]
    name = Path(config.output_dir).name
    print(
        f"""
zero-shot accuracy     {percent(summary["zero_shot_accuracy"])}
trained accuracy       {percent(summary["accuracy"])}   (adapter of step {summary["best_step"]} of {summary["steps"]})
speed                  {summary["steps_per_second"]:.1f} steps/s, {summary["train_seconds"]:.0f} s of training
prefix tokens reused   {percent(summary["prefix_tokens_reused"] / total if total else None)} of {total}
peak memory            {summary["peak_rss_bytes"] / 2**20:.0f} MiB
adapter                {summary["adapter_dir"]}
plot                   {summary["plot"] or "not drawn: pip install 'sglang-mezo[plots]'"}

Serve it:
  python -m sglang.launch_server --model-path {model.model} --dtype {model.dtype} --enable-lora --lora-paths {name}={summary["adapter_dir"]}
"""
    )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # the engine's threads are of no further use
