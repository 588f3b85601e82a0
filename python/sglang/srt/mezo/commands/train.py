"""``sglang-mezo train``: fit an adapter, or a model's own parameters, to rows, with forward passes only.

    sglang-mezo train --model facebook/opt-125m --task sst2
    sglang-mezo train --model facebook/opt-125m --dataset rows.jsonl --invocation " It was"
    sglang-mezo train --model facebook/opt-125m --task sst2 --tuning full --dtype float32
    sglang-mezo train --model facebook/opt-125m --task sst2 --tuning prefix --num_virtual_tokens 5
    sglang-mezo train --model facebook/opt-125m --task text --dataset texts --streaming --tuning lora --max_steps 500
    sglang-mezo train --config run.yaml --learning_rate 0.01

Every field of ModelArguments, DataArguments and MezoConfig is a flag, and MeZO's, PEFT's and TRL's names for the same
things are too. --config names a YAML file of fields; flags go before it. The run directory receives the adapter (PEFT
format) or the model (Transformers' format), the seed log, metrics.jsonl, the plot and summary.json.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sglang.srt.mezo.adapters.architectures import is_masked
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.objective import GENERATED
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.engine.accelerator import serving_flags
from sglang.srt.mezo.training.arguments import build, read, status_of
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments, finetune

KINDS = (ModelArguments, DataArguments, MezoConfig)


def main(arguments: Sequence[str]) -> None:
    end(lambda: train(read(arguments, KINDS, __doc__)))


def train(given: Mapping[str, Any]) -> None:
    """A run with these fields; the others have their defaults. Says what came of it."""
    run: dict[str, Any] = {"output_dir": f"runs/{datetime.now():%Y%m%d-%H%M%S}"}
    model, data, config = build(KINDS, {**run, **given})
    report(model, config, finetune(model, data, config))


def end(work: Callable[[], None]) -> None:
    """Do the work of a program that starts an engine, and leave: the engine's threads are of no further use."""
    status = status_of(work)
    sys.stdout.flush()
    os._exit(status)


def report(model: ModelArguments, config: MezoConfig, summary: dict) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    score = next((name for name in ("accuracy", *GENERATED) if summary.get(name) is not None), "loss")
    told = shown if score in ("loss", "reward") else percent
    total, trained = summary["prefix_tokens_total"], summary.get("adapter_dir") or summary["model_dir"]
    shared = "".join(f"; {count} examples: {where}" for where, count in summary["shared_examples"].items())
    kind = "model" if config.tuning == "full" else "adapter"
    best = f"({kind} of step {summary['best_step']} of {summary['steps']})"
    lines = {
        f"zero-shot {score}": told(summary[f"zero_shot_{score}"]),
        f"trained {score}": f"{told(summary[score])}   {best}{shared}",
        "speed": f"{summary['steps_per_second']:.1f} steps/s, {summary['train_seconds']:.0f} s of training",
        "prefix tokens reused": f"{percent(summary['prefix_tokens_reused'] / total if total else None)} of {total}",
        "peak memory": f"{summary['peak_rss_bytes'] / 2**20:.0f} MiB",
        kind: trained,
        "plot": summary["plot"] or "not drawn: pip install 'sglang-mezo[plots]'",
    }
    print("", *(f"{title:<22} {value}" for title, value in lines.items()), sep="\n")
    if config.tuning != "prefix" and not is_masked(read_checkpoint(model.model)[0]):
        print(f"\nServe it:\n  python -m sglang.launch_server {_serving(model, config, trained)}\n")


def _serving(model: ModelArguments, config: MezoConfig, trained: str) -> str:
    """Flags of a server of SGLang's for what a run has trained."""
    if config.tuning == "full":
        return f"--model-path {trained} --dtype {model.dtype}"
    flags = "".join(f" {flag}" for flag in serving_flags(config.tuning == "alora", model.dtype))
    name = Path(config.output_dir).name
    return f"--model-path {model.model} --dtype {model.dtype} --enable-lora --lora-paths {name}={trained}{flags}"
