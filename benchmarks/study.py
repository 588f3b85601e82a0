"""Accuracy of estimators and optimizers against forward passes and wall time, on a real model and real data.

    python benchmarks/study.py tune --model models/smollm2-135m --json benchmarks/results/study.json
    python benchmarks/study.py run --model models/smollm2-135m --json benchmarks/results/study.json
    python benchmarks/study.py time --model models/smollm2-135m --json benchmarks/results/study.json

`tune` chooses every variant's learning rate, on a seed of its own, by the accuracy on development rows; `run` trains
all seeds with it. Rows are added to the results one by one, and what is there is not run again; a run that was cut
short goes on. `time` measures one step of every variant, in turns, and makes wall time of passes: a run of its own
would measure the machine's day. Curves are those of the development rows.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cost_model import meter_of_next_steps
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.integrity import write_json
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, finetune, open_trainer
from study_variants import PLAIN, VARIANTS
from subsets import move_only
from turns import Operations, Worker

DATA = Path(__file__).resolve().parents[2] / "shared/data"
NUM_TRAIN, NUM_DEV, NUM_TEST = 700, 200, 500
KV_TOKENS = 65_536  # more than all prompts have
TUNING_SEED = 100


SETTINGS = (
    "estimator",
    "num_perturbations",
    "perturbation",
    "perturbation_rank",
    "scale_by_loss_std",
    "zo_eps",
    "optim",
    "momentum",
    "lr_scheduler_type",
    "per_device_train_batch_size",
)
"""Of a run, that are kept with its results."""
COMMON = {"logging_steps": 50, "disable_tqdm": True}
LABELS = {
    "sst2": (" terrible", " great"),
    "sst5": (" terrible", " bad", " okay", " good", " great"),
    "trec": (" abbreviation", " entity", " description", " human", " location", " number"),
    "boolq": (" no", " yes"),
}
INVOCATIONS = {"sst2": " It was", "sst5": " It was", "trec": " Type:", "boolq": "?\nAnswer:"}

Run = dict[str, Any]
"""task, variant, seed and learning_rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tune", "run", "time", "show"])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", choices=LABELS, default=["sst2", "trec"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=9, help="steps of each variant that are measured")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    if arguments.part != "show":
        for task in arguments.tasks:
            write_rows(task, arguments.runs / "data" / task)
    if arguments.part == "time":
        measure_steps(arguments)
    elif arguments.part != "show":
        for run in planned(arguments):
            if not any(all(row[name] == run[name] for name in run) for row in load(arguments.json)["rows"]):
                run_in_new_process(arguments, run)
    print("\n".join(table(load(arguments.json))))
    plot(load(arguments.json), arguments.json.with_suffix(".png"))


def planned(arguments: argparse.Namespace) -> Iterator[Run]:
    """All runs of this call, seed by seed, so that what is there early can be compared early."""
    tune = arguments.part == "tune"
    for seed in [TUNING_SEED] if tune else arguments.seeds:
        for task in arguments.tasks:
            for variant in arguments.variants:
                rates = VARIANTS[variant].rates if tune else [best_rate(load(arguments.json)["rows"], task, variant)]
                for rate in rates if not tune or len(rates) > 1 else ():
                    yield {"task": task, "variant": variant, "seed": seed, "learning_rate": rate}


def best_rate(rows: Sequence[dict[str, Any]], task: str, variant: str) -> float:
    if len(VARIANTS[variant].rates) == 1:
        return VARIANTS[variant].rates[0]
    tried = [row for row in rows if (row["task"], row["variant"], row["seed"]) == (task, variant, TUNING_SEED)]
    if not tried:
        raise SystemExit(f"no learning rate was chosen for {variant} on {task} yet: `tune` comes first")
    return max(tried, key=lambda row: (row["dev_accuracy"], -row["learning_rate"]))["learning_rate"]


def run_in_new_process(arguments: argparse.Namespace, run: Run) -> None:
    """A process holds one engine."""
    process = multiprocessing.get_context("spawn").Process(target=run_one, args=(arguments, run))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def run_one(arguments: argparse.Namespace, run: Run) -> None:
    if (moved := VARIANTS[run["variant"]].moved) is not None:
        move_only(moved)
    summary = finetune(*settings(arguments, run))
    config = settings(arguments, run)[2]
    curve = curve_of(Path(config.output_dir))
    row = {
        **run,
        "dtype": arguments.dtype,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "steps": config.max_steps,
        "passes_a_step": config.forward_passes,
        "zero_shot_accuracy": summary["zero_shot_accuracy"],
        "accuracy": summary["accuracy"],
        "dev_accuracy": max(point["eval_accuracy"] for point in curve),
        "curve": curve,
    }
    add(arguments.json, row=row)
    os._exit(0)  # the engine's threads are of no further use


def settings(arguments: argparse.Namespace, run: Run) -> tuple[ModelArguments, DataArguments, MezoConfig]:
    name = "-".join(str(value).replace(" ", "_").replace(",", "") for value in run.values())
    folder = arguments.runs / name
    variant = {
        **COMMON,
        **VARIANTS[run["variant"]].settings,
        "learning_rate": run["learning_rate"],
        "seed": run["seed"],
    }
    max_steps = VARIANTS[run["variant"]].steps
    config = MezoConfig(
        **variant,
        max_steps=max_steps,
        eval_steps=max_steps // 20,
        invocation=INVOCATIONS[run["task"]],
        output_dir=str(folder),
        metric_for_best_model="eval_accuracy",
        resume_from_checkpoint=(folder / "seed_log").is_file(),
    )
    data = DataArguments(
        dataset=str(arguments.runs / "data" / run["task"]),
        dev_split="dev",
        test_split="test",
        num_train=NUM_TRAIN,
        num_dev=NUM_DEV,
        num_test=NUM_TEST if run["seed"] != TUNING_SEED else 1,
    )
    return ModelArguments(arguments.model, arguments.dtype, KV_TOKENS), data, config


def curve_of(folder: Path) -> list[dict[str, float]]:
    points = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: point[name] for name in ("step", "forward_passes", "eval_accuracy", "eval_loss")}
        for point in points
        if "eval_accuracy" in point
    ]


def measure_steps(arguments: argparse.Namespace) -> None:
    """Seconds of a step of every variant, and of computing all prefixes, which a run does once."""
    for task in arguments.tasks:
        runs = [{"task": task, "variant": variant, "seed": 0, "learning_rate": 1e-6} for variant in arguments.variants]
        workers = {run["variant"]: Worker(open_timed, arguments, run) for run in runs}
        prefixes = {variant: worker.call("prefixes") for variant, worker in workers.items()}
        for worker in workers.values():
            worker.call("step")  # the first warms up
        times: dict[str, list[float]] = {variant: [] for variant in workers}
        for _ in range(arguments.turns):
            for variant, worker in workers.items():
                times[variant].append(worker.call("step"))
                worker.call("sweep")
        limits = {variant: worker.call("limit") for variant, worker in workers.items()}
        for worker in workers.values():
            worker.stop()
        measured = {
            variant: {"step_s": times[variant], "limit_s": limits[variant], "prefixes_s": prefixes[variant]}
            for variant in workers
        }
        add(arguments.json, times={task: measured})


def open_timed(arguments: argparse.Namespace, run: Run) -> Operations:
    if (moved := VARIANTS[run["variant"]].moved) is not None:
        move_only(moved)
    trainer, _ = open_trainer(*settings(arguments, run))
    meter = meter_of_next_steps(trainer)

    def timed(function) -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return {
        "prefixes": lambda: timed(
            lambda: drain(
                trainer.scorer.prefix_passes(
                    trainer.source.plans, trainer.points.rounds(trainer.config.num_perturbations)[0].groups
                )
            )
        ),
        "step": lambda: timed(lambda: drain(trainer.step_passes(trainer.batch(trainer.global_step)))),
        "sweep": meter.sweep,
        "limit": lambda: meter.limit,
    }


def prompt(task: str, row: dict[str, Any]) -> str:
    if task == "sst2":
        return row["sentence"].strip() + INVOCATIONS[task]
    if task in ("sst5", "trec"):
        return row["text"].strip() + INVOCATIONS[task]
    return f"{row['passage'].strip()}\n{row['question'].strip()}{INVOCATIONS[task]}"


def write_rows(task: str, folder: Path) -> None:
    """Rows of prompts and options; training and development rows are parts of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        split: [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    parts = {
        "train": splits["train"][:NUM_TRAIN],
        "dev": splits["train"][NUM_TRAIN : NUM_TRAIN + NUM_DEV],
        "test": splits["validation"],
    }
    for part, rows in parts.items():
        lines = (
            json.dumps(
                {
                    "prompt": prompt(task, row),
                    "options": LABELS[task],
                    "label": row["coarse_label" if task == "trec" else "label"],
                }
            )
            for row in rows
        )
        (folder / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "times": {}}


def add(path: Path, row: dict[str, Any] | None = None, times: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report = load(path)
    write_json(path, {"rows": report["rows"] + ([row] if row else []), "times": report["times"] | (times or {})})


def table(report: dict[str, Any]) -> list[str]:
    """A row for each variant that seeds were run of. Times are of the steps that `time` has measured, prefixes
    included."""
    lines = [
        "| task | variant | learning rate | seeds | accuracy, mean (min to max) | one step, median, and its share of "
        "the limit | a run | to the development accuracy that plain ends with |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = [row for row in report["rows"] if row["seed"] != TUNING_SEED]
    for task in dict.fromkeys(row["task"] for row in measured):
        for variant in dict.fromkeys(row["variant"] for row in measured if row["task"] == task):
            own = rows_of(report, task, variant)
            accuracies = [row["accuracy"] for row in own]
            accuracy = f"{statistics.mean(accuracies):.1%} ({min(accuracies):.1%} to {max(accuracies):.1%})"
            cells = [
                task,
                variant,
                f"{own[0]['learning_rate']:g}",
                str(len(own)),
                accuracy,
                *times_of(report, task, variant),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def times_of(report: dict[str, Any], task: str, variant: str) -> tuple[str, str, str]:
    """Of a step, of a run, and until the plain variant's development accuracy is reached."""
    if variant not in report["times"].get(task, {}):
        return "-", "-", "-"
    times, run = report["times"][task][variant], seconds_of(report, task, variant)
    step = statistics.median(times["step_s"])
    passes = passes_to_plain(report, task, variant)
    reached = "never"
    if passes is not None:
        seconds = seconds_of(report, task, variant, passes)
        reached = f"{seconds:.0f} s, {seconds / seconds_of(report, task, PLAIN):.0%} of plain's run"
    return f"{1000 * step:.0f} ms, {times['limit_s'] / step:.0%}", f"{run:.0f} s", reached


def rows_of(report: dict[str, Any], task: str, variant: str) -> list[dict[str, Any]]:
    return [
        row for row in report["rows"] if (row["task"], row["variant"]) == (task, variant) and row["seed"] != TUNING_SEED
    ]


def mean_curve(report: dict[str, Any], task: str, variant: str) -> list[tuple[float, float]]:
    """(forward passes, mean accuracy on development rows) over the seeds."""
    curves = [row["curve"] for row in rows_of(report, task, variant)]
    return [
        (points[0]["forward_passes"], statistics.mean(point["eval_accuracy"] for point in points))
        for points in zip(*curves)
    ]


def passes_to_plain(report: dict[str, Any], task: str, variant: str) -> float | None:
    """Forward passes after which the variant's mean accuracy is that of the plain variant at its end; None if it
    never is."""
    plain = mean_curve(report, task, PLAIN)
    return next(
        (passes for passes, accuracy in mean_curve(report, task, variant) if plain and accuracy >= plain[-1][1]), None
    )


def seconds_of(report: dict[str, Any], task: str, variant: str, passes: float | None = None) -> float:
    """Wall time of that many forward passes, of a whole run's if not given, with the computation of all prefixes
    before."""
    times, row = report["times"][task][variant], rows_of(report, task, variant)[0]
    steps = row["steps"] if passes is None else passes / row["passes_a_step"]
    return times["prefixes_s"] + statistics.median(times["step_s"]) * steps


def plot(report: dict[str, Any], path: Path) -> None:
    """Mean accuracy on development rows against forward passes and against wall time, a row of panels for each task."""
    measured = [row for row in report["rows"] if row["seed"] != TUNING_SEED]
    tasks = [task for task in dict.fromkeys(row["task"] for row in measured) if task in report["times"]]
    if not tasks:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(tasks)), layout="constrained")
    for task, panels in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False, sharey="row")):
        for variant in dict.fromkeys(
            row["variant"] for row in measured if row["task"] == task and row["variant"] in report["times"][task]
        ):
            curve = mean_curve(report, task, variant)
            accuracy = [100 * value for _, value in curve]
            panels[0].plot([passes for passes, _ in curve], accuracy, label=variant)
            panels[1].plot([seconds_of(report, task, variant, passes) for passes, _ in curve], accuracy, label=variant)
        panels[0].set(xlabel="forward passes", ylabel=f"{task}, accuracy in % (development rows)")
        panels[1].set(xlabel="wall time, s")
        panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
