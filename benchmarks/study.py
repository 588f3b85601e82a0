"""Accuracy of estimators and optimizers against forward passes and wall time, on a real model and real data.

    python benchmarks/study.py --model models/smollm2-135m --tasks sst2 trec --tune --json benchmarks/results/study.json
    python benchmarks/study.py --model models/smollm2-135m --tasks sst2 trec --seeds 0 1 2 --json benchmarks/results/study.json

First every variant's learning rate is chosen, on a seed of its own, by the accuracy on development rows; then the seeds are
run with it. All runs have the same number of forward passes. Rows are added to the results one by one, and what is there is
not run again; a run that was cut short goes on. The curves are those of the development rows.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.finetune import DataArguments, ModelArguments, finetune
from sglang.srt.mezo.run_directory import write_json

DATA = Path(__file__).resolve().parents[2] / "shared/data"
STEPS = 2000
PASSES = 2 * STEPS  # of the plain variant, and of all others
NUM_TRAIN, NUM_DEV, NUM_TEST = 700, 200, 500
TUNING_SEED = 100
PLAIN = "two-sided"

VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    PLAIN: ({}, (1e-3, 2e-3, 4e-3)),
    "rademacher": ({"perturbation": "rademacher"}, (1e-3, 2e-3, 4e-3)),
    "4 directions": ({"num_perturbations": 4}, (3e-3, 1e-2, 3e-2)),
    "one-sided, 8 directions": ({"estimator": "one_sided", "num_perturbations": 8}, (3e-3, 1e-2, 3e-2)),
    "FZOO, 8 directions": (
        {"estimator": "one_sided", "num_perturbations": 8, "perturbation": "rademacher", "scale_by_loss_std": True},
        (1e-4, 3e-4, 1e-3),
    ),
    "low rank": ({"perturbation_rank": 1, "perturbation_interval": 50}, (1e-3, 2e-3, 4e-3)),
    "momentum": ({"momentum": 0.9}, (1e-4, 3e-4, 1e-3)),
    "adamw": ({"optim": "adamw"}, (3e-4, 1e-3, 3e-3)),
}
"""Settings of each variant, and the learning rates to choose from."""

COMMON = {"zo_eps": 3e-3, "lr_scheduler_type": "linear", "per_device_train_batch_size": 16, "logging_steps": 50, "disable_tqdm": True}
LABELS = {
    "sst2": (" terrible", " great"),
    "trec": (" abbreviation", " entity", " description", " human", " location", " number"),
    "boolq": (" no", " yes"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", choices=LABELS, default=["sst2", "trec"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="choose the learning rates")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    for task in arguments.tasks:
        write_rows(task, arguments.runs / "data" / task)
    for run in planned(arguments):
        if not any(all(row[name] == run[name] for name in ("task", "variant", "seed", "learning_rate")) for row in load(arguments.json)):
            run_in_new_process(arguments, run)
    show(load(arguments.json))


def planned(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of this call, seed by seed, so that what is there early can be compared early."""
    runs = []
    for seed in [TUNING_SEED] if arguments.tune else arguments.seeds:
        for task in arguments.tasks:
            for variant in arguments.variants:
                rates = VARIANTS[variant][1] if arguments.tune else [best_rate(load(arguments.json), task, variant)]
                runs += [{"task": task, "variant": variant, "seed": seed, "learning_rate": rate} for rate in rates]
    return runs


def best_rate(rows: Sequence[dict[str, Any]], task: str, variant: str) -> float:
    tried = [row for row in rows if (row["task"], row["variant"], row["seed"]) == (task, variant, TUNING_SEED)]
    if not tried:
        raise SystemExit(f"no learning rate was chosen for {variant} on {task} yet: run with --tune first")
    return max(tried, key=lambda row: (row["dev_accuracy"], -row["learning_rate"]))["learning_rate"]


def run_in_new_process(arguments: argparse.Namespace, run: dict[str, Any]) -> None:
    """A process holds one engine."""
    process = multiprocessing.get_context("spawn").Process(target=run_one, args=(arguments, run))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def run_one(arguments: argparse.Namespace, run: dict[str, Any]) -> None:
    name = "-".join(str(value).replace(" ", "_").replace(",", "") for value in (run["task"], run["variant"], run["seed"], run["learning_rate"]))
    folder = arguments.runs / name
    settings = {**COMMON, **VARIANTS[run["variant"]][0], "learning_rate": run["learning_rate"], "seed": run["seed"]}
    passes = MezoConfig(**settings).forward_passes
    max_steps = PASSES // passes
    config = MezoConfig(
        **settings, max_steps=max_steps, eval_steps=max(1, max_steps // 10), invocation=invocation(run["task"]), output_dir=str(folder),
        metric_for_best_model="eval_accuracy", resume_from_checkpoint=(folder / "seed_log").is_file(),
    )  # fmt: skip
    data = DataArguments(
        dataset=str(arguments.runs / "data" / run["task"]), dev_split="dev", test_split="test", num_train=NUM_TRAIN, num_dev=NUM_DEV,
        num_test=NUM_TEST if run["seed"] != TUNING_SEED else 1,
    )  # fmt: skip
    summary = finetune(ModelArguments(arguments.model, arguments.dtype), data, config)
    curve = curve_of(folder)
    row = {**run, "dtype": arguments.dtype, "settings": settings, "steps": max_steps, "forward_passes": passes * max_steps,
           "train_seconds": summary["train_seconds"], "zero_shot_accuracy": summary["zero_shot_accuracy"],
           "accuracy": summary["accuracy"], "dev_accuracy": max(point["eval_accuracy"] for point in curve), "curve": curve}  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.json, {"rows": [*load(arguments.json), row]})
    os._exit(0)  # the engine's threads are of no further use


def curve_of(folder: Path) -> list[dict[str, float]]:
    """Accuracy on the development rows, with the passes and the seconds of training that it took."""
    curve, seconds = [], 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        seconds = point.get("train_seconds", seconds)
        if "eval_accuracy" in point:
            curve.append({name: point[name] for name in ("step", "forward_passes", "eval_accuracy", "eval_loss")} | {"train_seconds": seconds})
    return curve


def invocation(task: str) -> str:
    return {"sst2": " It was", "trec": "\nType:", "boolq": "?\nAnswer:"}[task]


def prompt(task: str, row: dict[str, Any]) -> str:
    if task == "sst2":
        return row["sentence"].strip() + invocation(task)
    if task == "trec":
        return row["text"].strip() + invocation(task)
    return f"{row['passage'].strip()}\n{row['question'].strip()}{invocation(task)}"


def write_rows(task: str, folder: Path) -> None:
    """Rows of prompts and options; training and development rows are parts of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {split: [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "validation")}
    parts = {"train": splits["train"][:NUM_TRAIN], "dev": splits["train"][NUM_TRAIN : NUM_TRAIN + NUM_DEV], "test": splits["validation"]}
    for part, rows in parts.items():
        lines = (
            json.dumps({"prompt": prompt(task, row), "options": LABELS[task], "label": row["coarse_label" if task == "trec" else "label"]}) for row in rows
        )
        (folder / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'task':<8}{'variant':<26}{'rate':>8} {'seeds':>6} {'accuracy':>10} {'dev':>8} {'seconds':>8} {'to plain':>9}")
    measured = [row for row in rows if row["seed"] != TUNING_SEED]
    for task in dict.fromkeys(row["task"] for row in measured):
        for variant in dict.fromkeys(row["variant"] for row in measured if row["task"] == task):
            own = [row for row in measured if (row["task"], row["variant"]) == (task, variant)]
            accuracy, dev, seconds = (statistics.mean(row[name] for row in own) for name in ("accuracy", "dev_accuracy", "train_seconds"))
            reached = seconds_to(measured, task, variant)
            print(f"{task:<8}{variant:<26}{own[0]['learning_rate']:>8.0e} {len(own):>6} {accuracy:>10.1%} {dev:>8.1%} {seconds:>8.0f} "
                  f"{'-' if reached is None else f'{reached:.0f} s':>9}")  # fmt: skip


def seconds_to(rows: Sequence[dict[str, Any]], task: str, variant: str) -> float | None:
    """Training time after which the variant's mean accuracy is that of the plain variant at its end; None if it never is."""
    def mean_curve(name: str) -> list[tuple[float, float]]:
        curves = [row["curve"] for row in rows if (row["task"], row["variant"]) == (task, name)]
        return [tuple(statistics.mean(point[key] for point in points) for key in ("train_seconds", "eval_accuracy")) for points in zip(*curves)]

    plain = mean_curve(PLAIN)
    return next((seconds for seconds, accuracy in mean_curve(variant) if plain and accuracy >= plain[-1][1]), None)


if __name__ == "__main__":
    main()
