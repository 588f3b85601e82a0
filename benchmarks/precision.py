"""How much of the gradient estimate survives lower precision: projected_grad of the same directions, in bfloat16 and in
float32.

    python benchmarks/precision.py --model models/smollm2-135m --json benchmarks/results/precision.json

The model's weights and activations are of the type, master weights and losses always of float32. Both the two-sided
estimate and the default one, which compares directions with each other, are held against the float32 one of their kind
at the smallest zo_eps. A correlation of 1 means that nothing is lost; of c, that the estimate's signal is worth c
squared as many directions.
"""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.estimator import Estimator, projected_grads, with_baselines
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.training.finetune import open_trainer
from step_time import machine
from study import settings, write_rows
from turns import Operations, Worker

DTYPES = ("float32", "bfloat16")
EPSILONS = (1e-3, 3e-3, 1e-2, 3e-2)
ESTIMATORS: tuple[Estimator, ...] = ("two_sided", MezoConfig().estimator)
TRAINED_STEPS = 20  # so that both matrices of the adapter matter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--steps", type=int, default=8, help="whose directions are compared, eight each")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write_rows(arguments.task, arguments.runs / "data" / arguments.task)
    workers = {dtype: Worker(open_losses, arguments.model, dtype, arguments.task, arguments.runs) for dtype in DTYPES}
    theta = workers["float32"].call("train")
    losses = {
        (dtype, zo_eps): worker.call("losses", theta, arguments.steps, zo_eps)
        for dtype, worker in workers.items()
        for zo_eps in EPSILONS
    }
    rows = []
    for estimator in ESTIMATORS:
        reference = estimates(losses["float32", EPSILONS[0]], EPSILONS[0], estimator)
        for (dtype, zo_eps), steps in losses.items():
            values = estimates(steps, zo_eps, estimator)
            rows.append(
                {
                    "estimator": estimator,
                    "dtype": dtype,
                    "zo_eps": zo_eps,
                    "correlation": float(np.corrcoef(values, reference)[0, 1]),
                    "relative_rms_error": float(np.sqrt(np.mean((values - reference) ** 2)) / np.std(reference)),
                }
            )
    print("\n".join(table(rows)))
    if arguments.json:
        report = {
            "model": Path(arguments.model).name,
            "task": arguments.task,
            "steps": arguments.steps,
            "rows": rows,
            "machine": machine(os.cpu_count()),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def estimates(steps: list[tuple[list[float], list[float]]], zo_eps: float, estimator: Estimator) -> np.ndarray:
    """Of all directions of all steps, from their losses on both sides of theta."""
    sides = steps if estimator == "two_sided" else [with_baselines(plus, estimator) for plus, _ in steps]
    return np.concatenate([projected_grads(plus, other, zo_eps, estimator) for plus, other in sides])


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| estimator | dtype | zo_eps | correlation with float32 at 1e-3 | error, of the spread |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['estimator']} | {row['dtype']} | {row['zo_eps']:g} | {row['correlation']:.4f} | "
            f"{row['relative_rms_error']:.1%} |"
        )
    return lines


def open_losses(model: str, dtype: str, task: str, runs: Path) -> Operations:
    run = {"task": task, "variant": "two-sided", "seed": 0, "learning_rate": MezoConfig().learning_rate}
    trainer, _ = open_trainer(*settings(SimpleNamespace(model=model, dtype=dtype, runs=runs), run))
    batch = trainer.batch(0)

    def train() -> list[float]:
        for step in range(TRAINED_STEPS):
            drain(trainer.step_passes(trainer.batch(step)))
        return trainer.trainable.theta.tolist()

    def losses(theta: list[float], steps: int, zo_eps: float) -> list[tuple[list[float], list[float]]]:
        trainer.trainable.theta.copy_(torch.tensor(theta))
        return [
            drain(trainer.probe.loss_passes(batch, drain(trainer.probe.directions(seed)), zo_eps))
            for seed in range(steps)
        ]

    return {"train": train, "losses": losses}


if __name__ == "__main__":
    main()
