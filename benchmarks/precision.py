"""How much of the gradient estimate survives lower precision: projected_grad of the same directions, in bfloat16 and in float32.

    python benchmarks/precision.py --model models/smollm2-135m --json benchmarks/results/precision.json

The model's weights and activations are of the type, master weights and losses always of float32. The reference is float32 at
the smallest zo_eps. A correlation of 1 means that nothing is lost; of c, that the estimate's signal is worth c squared as many
directions.
"""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from step_time import machine
from study import PLAIN, settings, write_rows
from turns import Operations, Worker

from sglang.srt.mezo.finetune import open_trainer

DTYPES = ("float32", "bfloat16")
EPSILONS = (1e-3, 3e-3, 1e-2, 3e-2)
TRAINED_STEPS = 20  # so that both matrices of the adapter matter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write_rows(arguments.task, arguments.runs / "data" / arguments.task)
    workers = {dtype: Worker(open_estimates, arguments.model, dtype, arguments.task, arguments.runs) for dtype in DTYPES}
    theta = workers["float32"].call("train")
    estimates = {
        (dtype, zo_eps): worker.call("estimates", theta, arguments.directions, zo_eps) for dtype, worker in workers.items() for zo_eps in EPSILONS
    }
    reference = estimates["float32", EPSILONS[0]]
    rows = []
    for (dtype, zo_eps), values in estimates.items():
        error = float(np.sqrt(np.mean(np.subtract(values, reference) ** 2)) / np.std(reference))
        rows.append({"dtype": dtype, "zo_eps": zo_eps, "correlation": float(np.corrcoef(values, reference)[0, 1]), "relative_rms_error": error})
        print("{dtype:<10} zo_eps {zo_eps:<7} correlation {correlation:.4f}, error {relative_rms_error:.1%} of the spread".format(**rows[-1]))
    if arguments.json:
        report = {"model": Path(arguments.model).name, "task": arguments.task, "directions": arguments.directions, "rows": rows, "machine": machine(os.cpu_count())}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def open_estimates(model: str, dtype: str, task: str, runs: Path) -> Operations:
    run = {"task": task, "variant": PLAIN, "seed": 0, "learning_rate": 2e-3}
    trainer, _ = open_trainer(*settings(SimpleNamespace(model=model, dtype=dtype, runs=runs), run))
    batch = trainer.batch(0)

    def train() -> list[float]:
        for step in range(TRAINED_STEPS):
            trainer.train_step(trainer.batch(step))
        return trainer.adapter.theta.tolist()

    def estimates(theta: list[float], directions: int, zo_eps: float) -> list[float]:
        trainer.adapter.theta.copy_(torch.tensor(theta))
        pairs = (trainer.paired_losses(batch, [trainer.optimizer.direction(seed, 0)], zo_eps) for seed in range(directions))
        return [(plus[0] - minus[0]) / (2 * zo_eps) for plus, minus in pairs]

    return {"train": train, "estimates": estimates}


if __name__ == "__main__":
    main()
