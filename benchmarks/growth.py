"""How the time of a step grows with batch, prompt length, directions, rank and layers, beside what the cost model says.

    python benchmarks/growth.py --tuning alora --repeats 15 --json benchmarks/results/growth.json
    python benchmarks/growth.py --tuning lora --repeats 5 --json benchmarks/results/growth.json

One quantity changes at a time; the others stay at a batch of 16, one direction, rank 8, OPT-125m's 12 layers and
prompts of 64 tokens, with ordinary LoRA of 16, as it runs them all. All values of a quantity take turns, each in a
process of its own. The last column is the growth of the measured time over the growth of the limit, from the smallest
value on: above 1 something grows faster than the work does.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from step_time import Case, Measurement, machine, settings, show
from turns import Operations, Worker

COMMON = {"batch_size": (4, 16, 64), "r": (4, 16, 64), "layers": (3, 12, 24)}
VALUES = {  # "workload" is the prompt length
    "alora": {**COMMON, "workload": ("16", "64", "256", "512"), "num_perturbations": (1, 4, 16)},
    "lora": {**COMMON, "workload": ("16", "64", "128"), "num_perturbations": (1, 4, 8)},
}
EPOCH_STEPS = 4  # as several engines keep the prefixes of an epoch at the same time
PROMPTS = {"alora": "64", "lora": "16"}
NAMES = {
    "batch_size": "batch",
    "workload": "prompt length",
    "num_perturbations": "directions",
    "r": "rank",
    "layers": "layers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--quantity", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    old = json.loads(arguments.json.read_text())["series"] if arguments.json and arguments.json.is_file() else []
    series = {(one["tuning"], one["quantity"]): one for one in old}
    for tuning in arguments.tuning:
        for quantity in arguments.quantity:
            base = Case(PROMPTS[tuning], tuning, repeats=arguments.repeats, epoch_steps=EPOCH_STEPS)
            rows = measure_side_by_side([replace(base, **{quantity: value}) for value in VALUES[tuning][quantity]])
            series[tuning, quantity] = {"tuning": tuning, "quantity": quantity, "rows": rows}
            if arguments.json:
                report = {"series": list(series.values()), "machine": machine(os.cpu_count()), "settings": settings()}
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
                plot(report["series"], arguments.json.with_suffix(".png"))
    print("\n".join(table(list(series.values()))))


def measure_side_by_side(cases: Sequence[Case]) -> list[dict[str, Any]]:
    workers = [Worker(open_measurement, case) for case in cases]
    for _ in range(cases[0].repeats + 1):
        for worker in workers:
            worker.call("turn")
    rows = [worker.call("row") for worker in workers]
    for worker in workers:
        worker.stop()
    show(rows)
    return rows


def open_measurement(case: Case) -> Operations:
    measurement = Measurement(case)
    return {"turn": measurement.turn, "row": measurement.row}


def table(series: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each quantity and value."""
    lines = [
        "| tuning | grows | step, median (min to max) | limit, share reached | growth, measured and limit | one over "
        "the other |",
        "|---|---|---|---|---|---|",
    ]
    for one in series:
        for row, (ours, limit) in zip(one["rows"], growth(one["rows"])):
            step, *ends = (1000 * pick(row["ours_s"]) for pick in (statistics.median, min, max))
            lines.append(
                f"| {one['tuning']} | {NAMES[one['quantity']]} {row[one['quantity']]} | {step:.0f} ms ({ends[0]:.0f} "
                f"to {ends[1]:.0f}) "
                f"| {1000 * row['limit_s']:.0f} ms, {row['limit_share']:.0%} | {ours:.1f}x and {limit:.1f}x | "
                f"{ours / limit:.2f} |"
            )
    return lines


def growth(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(measured, limit) of every row over those of the first."""
    times = [(statistics.median(row["ours_s"]), row["limit_s"]) for row in rows]
    return [(ours / times[0][0], limit / times[0][1]) for ours, limit in times]


def plot(series: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib")
        return
    tunings = list(dict.fromkeys(one["tuning"] for one in series))
    figure = Figure(figsize=(3 * len(NAMES), 2.8 * len(tunings)), layout="constrained")
    panels = figure.subplots(len(tunings), len(NAMES), squeeze=False)
    for one in series:
        panel = panels[tunings.index(one["tuning"])][list(NAMES).index(one["quantity"])]
        values = [float(row[one["quantity"]]) for row in one["rows"]]
        panel.loglog(
            values, [1000 * statistics.median(row["ours_s"]) for row in one["rows"]], marker="o", label="measured"
        )
        panel.loglog(
            values,
            [1000 * row["limit_s"] for row in one["rows"]],
            marker=".",
            linestyle="--",
            color="grey",
            label="limit",
        )
        panel.set(xlabel=NAMES[one["quantity"]], ylabel=f"{one['tuning']} step, ms")
    panels[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
