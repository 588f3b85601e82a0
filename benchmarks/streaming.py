"""A run over streamed text: host memory as it goes, the held-out loss before and after, how fast a stream is read.

    nice python benchmarks/streaming.py --model models/smollm2-135m --json benchmarks/results/streaming.json

Texts are packed into blocks of 1,024 tokens, a block a step, along one direction. ``--dataset`` is a folder with
train.jsonl and validation.jsonl, 3 million characters by default. Memory is what metrics.jsonl has of it: the
high-water mark of each ``--sampled`` th step; its spread is that after the warm-up. The loss is that of the first
blocks of validation.jsonl, each before and after: the noise is the standard error of the mean of their differences.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared/data/lm_text"
LENGTH = 1024
WARM_UP = 40  # steps, within which texts have been tokenised for a second time: a group of them is some thirty blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", default=str(DATA))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tuning", default="lora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=12, help="held-out blocks")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--sampled", type=int, default=5, help="steps between samples of memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        report = run(arguments, Path(folder) / "run")
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from sglang.srt.mezo.core.config import MezoConfig
    from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, open_trainer
    from step_time import machine

    config = MezoConfig(
        output_dir=str(folder),
        tuning=arguments.tuning,
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        num_perturbations=1,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=arguments.sampled,
    )
    data = DataArguments(
        task="text",
        dataset=arguments.dataset,
        streaming=True,
        pack=True,
        max_length=LENGTH,
        num_dev=0,
        test_split="validation",
        num_test=arguments.blocks,
    )
    trainer, splits = open_trainer(
        ModelArguments(arguments.model, arguments.dtype, max_total_tokens=8192), data, config
    )
    with closing(trainer):
        losses = [trainer.evaluate([block])["eval_loss"] for block in splits.test]
        result = trainer.train()
        trained = [trainer.evaluate([block])["eval_loss"] for block in splits.test]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": losses,
        "losses_trained": trained,
        "host_bytes": [[line["step"], line["host_memory_bytes"]] for line in lines if "loss" in line],
        "seconds_per_step": result.train_seconds / result.global_step,
        "reading": reading(splits.train),
        "settings": {
            "model": Path(arguments.model).name,
            "dtype": arguments.dtype,
            "length": LENGTH,
            "warm_up": WARM_UP,
            "data": vars(data) | {"dataset": Path(arguments.dataset).name},
            "config": config.to_dict() | {"output_dir": None},
        },
        "machine": machine(int(os.environ["OMP_NUM_THREADS"])),
    }


def reading(stream: Any) -> dict[str, float]:
    """Of the whole stream once more, as a run that resumes reads it up to where it was."""
    started = time.perf_counter()
    blocks = sum(1 for _ in stream)
    return {"blocks": blocks, "seconds": time.perf_counter() - started}


def spread(report: dict[str, Any]) -> float:
    """Of host memory after the warm-up: how far the largest sample is above the smallest."""
    samples = [size for step, size in report["host_bytes"] if step > report["settings"]["warm_up"]]
    return max(samples) / min(samples) - 1


def fall(report: dict[str, Any]) -> tuple[float, float]:
    """Of the held-out loss, and its noise."""
    falls = [before - after for before, after in zip(report["losses"], report["losses_trained"])]
    return statistics.mean(falls), statistics.stdev(falls) / len(falls) ** 0.5


def table(report: dict[str, Any]) -> list[str]:
    """Of docs/benchmarks.md."""
    settings, (mean, noise), read = report["settings"], fall(report), report["reading"]
    samples = [size / 2**20 for step, size in report["host_bytes"] if step > settings["warm_up"]]
    tokens = read["blocks"] * settings["length"]
    run = f"{settings['model']}, {settings['config']['tuning']}, {settings['dtype']}"
    size = f"{settings['config']['max_steps']} steps of {settings['length']} tokens"
    return [
        "| streamed | resident memory, min to max | spread | held-out loss | falls by (noise) | a step | reading |",
        "|---|---|---|---|---|---|---|",
        f"| {run}, {size} | {min(samples):.0f} to {max(samples):.0f} MiB | {spread(report):.2%} "
        f"| {statistics.mean(report['losses']):.4f} | {mean:.4f} ({noise:.4f}) "
        f"| {report['seconds_per_step']:.1f} s | {tokens / read['seconds']:.0f} tokens/s |",
    ]


def show(report: dict[str, Any]) -> None:
    (mean, noise), read = fall(report), report["reading"]
    print(f"host memory   within {spread(report):.2%} over {len(report['host_bytes'])} samples")
    print(f"held-out loss {statistics.mean(report['losses']):.4f}, falls by {mean:.4f} (noise {noise:.4f})")
    print(f"speed         {report['seconds_per_step']:.2f} s a step")
    print(f"reading       {read['blocks'] * report['settings']['length'] / read['seconds']:.0f} tokens/s")


if __name__ == "__main__":
    main()
