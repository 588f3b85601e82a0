"""What a step along several directions costs beside a step along one, SST-2 lengths, aLoRA.

    python benchmarks/directions.py --json benchmarks/results/directions.json

All take turns, each in a process of its own. Two-sided, n directions are 2 n points at which the batch is evaluated;
one-sided they share the one at theta, and compared with each other they need no more than theirs.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth import growth, measure_side_by_side
from step_time import MODELS, Case, machine, settings

CASES = (
    ("two_sided", 1),
    ("two_sided", 8),
    ("two_sided", 32),
    ("one_sided", 8),
    ("one_sided", 32),
    ("leave_one_out", 8),
    ("leave_one_out", 32),
)
EPOCH_STEPS = 4  # as several engines keep the prefixes of an epoch at the same time
TARGETS = {8: 6.5, 32: 24.0}  # times as long as one direction, at most
OVER_LIMIT = 1.4  # and as often as long as the limit grows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="opt-125m", help="shape of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    common = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "epoch_steps": EPOCH_STEPS,
    }
    rows = measure_side_by_side([Case("sst2", "alora", n, estimator, **common) for estimator, n in CASES])
    if arguments.json:
        report = {"rows": rows, "machine": machine(os.cpu_count()), "settings": settings()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for row, (ours, limit) in list(zip(rows, growth(rows)))[1:]:
        passed = ours <= TARGETS[row["num_perturbations"]] and ours <= OVER_LIMIT * limit
        print(
            f"{'pass' if passed else 'FAIL'}  {row['estimator']}, {row['num_perturbations']} directions: {ours:.1f}x "
            "one, at most "
            f"{TARGETS[row['num_perturbations']]}; the limit {limit:.1f}x"
        )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| estimator | directions | tokens | step, median (min to max) | limit, share reached | of one direction, "
        "measured and limit |",
        "|---|---|---|---|---|---|",
    ]
    for row, (ours, limit) in zip(rows, growth(rows)):
        step, *ends = (1000 * pick(row["ours_s"]) for pick in (statistics.median, min, max))
        lines.append(
            f"| {row['estimator']} | {row['num_perturbations']} | {row['work']['tokens']} | {step:.0f} ms "
            f"({ends[0]:.0f} to {ends[1]:.0f}) "
            f"| {1000 * row['limit_s']:.0f} ms, {row['limit_share']:.0%} | {ours:.1f}x and {limit:.1f}x |"
        )
    return lines


if __name__ == "__main__":
    main()
