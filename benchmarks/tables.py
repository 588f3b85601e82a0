"""The tables of docs/benchmarks.md, from the JSON files in benchmarks/results.

python benchmarks/tables.py
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import directions
import growth
import idle_server
import precision
import streaming
import study
from step_time import IN_BFLOAT16

RESULTS = Path(__file__).parent / "results"
LOOPS = ("strong", "official")


def main() -> None:
    serving = [serve_while_train(path.name) for path in sorted(RESULTS.glob("serve_while_train*.json"))]
    steps = [step_time(path.name) for path in sorted(RESULTS.glob("step_time*.json"))]
    starts = [startup()] if (RESULTS / "startup.json").is_file() else []
    validations = [validation()] if (RESULTS / "validation_load.json").is_file() else []
    for table in (
        *steps,
        step_time("limit_share.json"),
        directions.table(load("directions.json")),
        growth.table(load("growth.json", "series")),
        small_pool(),
        study.table(study.load(RESULTS / "study.json")),
        accuracy(),
        precision.table(load("precision.json")),
        memory(),
        streaming.table(json.loads((RESULTS / "streaming.json").read_text())),
        *starts,
        idle_server.table(load("idle_server.json")),
        *serving,
        *validations,
    ):
        print("\n".join(table), end="\n\n")


def step_time(name: str) -> list[str]:
    lines = [
        "| one step, median | ours | limit, share reached | strong loop | official-style loop | speed-up over strong "
        "| over official | prefix tokens reused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in load(name):
        ours = 1000 * statistics.median(row["ours_s"])
        loops = [
            of_loop(row, kind, lambda name: f"{1000 * statistics.median(row[f'{name}_s']):.0f} ms") for kind in LOOPS
        ]
        ratios = [of_loop(row, kind, lambda name: f"{row[f'ratio_{name}']:.1f}x") for kind in LOOPS]
        total = row["prefix_tokens_total"]
        reused = f"{row['prefix_tokens_reused'] / total:.0%}" if total else "-"
        label = f"{row['workload']} lengths, {row['tuning']}, {row['dtype']}"
        lines.append(
            f"| {label} | {ours:.0f} ms | {1000 * row['limit_s']:.0f} ms, {row['limit_share']:.0%} | "
            f"{' | '.join(loops + ratios)} | {reused} |"
        )
    return lines


def of_loop(row: dict, loop: str, show: Callable[[str], str]) -> str:
    """Of a loop in our type, or of the same loop in bfloat16, which says so; each where it was measured."""
    shown = [
        show(name) + ("" if name == loop else " in bfloat16")
        for name in (loop, loop + IN_BFLOAT16)
        if f"{name}_s" in row
    ]
    return ", ".join(shown) or "-"


def small_pool() -> list[str]:
    rows = load("small_pool.json")
    lines = [
        "| BoolQ lengths, alora, KV pool | examples at a time | one step with its share of the prefixes, median | "
        "losses differ from those without reuse by |",
        "|---|---|---|---|",
    ]
    for pool, described in rows["pools"].items():
        share = described["kv_tokens"] / described["prefix_tokens"]
        lines.append(
            f"| {share:.0%} of all prefixes | {described['window'] or described['examples']} | "
            f"{1000 * statistics.median(rows['step_s'][pool]):.0f} ms "
            f"| {rows['loss_difference_without_reuse'][pool]:.0e} |"
        )
    return lines


def accuracy() -> list[str]:
    lines = [
        "| model, task, tuning | dtype | steps | zero-shot | accuracy, mean (min to max) | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*-sst2-*.json")):
        rows = json.loads(path.read_text())["rows"]
        first, values = rows[0], [row["accuracy"] for row in rows]
        lines.append(
            f"| {first['model']}, {first['task']}, {first['tuning']} | {first['settings']['dtype']} | {first['steps']} "
            f"| {first['zero_shot_accuracy']:.1%} | {statistics.mean(values):.1%} ({min(values):.1%} to "
            f"{max(values):.1%}) | {len(rows)} |"
        )
    return lines


def memory() -> list[str]:
    lines = ["| peak resident memory | serving | training | ratio |", "|---|---|---|---|"]
    for row in load("memory.json"):
        serving, training = (f"{row[key] / 2**20:.0f} MiB" for key in ("serving_bytes", "training_bytes"))
        lines.append(f"| OPT-125m shape, {row['tuning']}, float32 | {serving} | {training} | {row['ratio']:.3f} |")
    return lines


def startup() -> list[str]:
    lines = ["| start, median (min to max) | with us | without | we add, median difference |", "|---|---|---|---|"]
    for row in load("startup.json"):
        ours, theirs = (
            f"{statistics.median(row[key]):.1f} s ({min(row[key]):.1f} to {max(row[key]):.1f})"
            for key in ("with_s", "without_s")
        )
        lines.append(f"| {row['what']} | {ours} | {theirs} | {row['added_s']:+.1f} s |")
    return lines


def serve_while_train(name: str) -> list[str]:
    lines = [
        "| model, load, share | requests | p99 time to first token, off and on | p99 time per output token, off and "
        "on | throughput, on / off | training steps/s |",
        "|---|---|---|---|---|---|",
    ]
    model = json.loads((RESULTS / name).read_text())["settings"]["model"]
    for row in load(name):
        off, on = row["off"], row["on"]
        ttft, tpot = (
            f"{1000 * off[key]:.0f} and {1000 * on[key]:.0f} ms, {row[f'{key}_ratio']:.2f}x "
            f"({' to '.join(f'{end:.2f}' for end in row['intervals'][f'{key}_ratio'])})"
            for key in ("ttft_p99", "tpot_p99")
        )
        lines.append(
            f"| {model}, {row['load']} ({on['requests_per_s']:.1f} requests/s), {row['share']} | {off['requests']} + "
            f"{on['requests']}, {off['failed'] + on['failed']} failed "
            f"| {ttft} | {tpot} | {row['throughput_ratio']:.1%} | {on['steps_per_s']:.2f} |"
        )
    return lines


def validation() -> list[str]:
    lines = [
        "| model, file validated meanwhile | requests | p99 time per output token, without and with | rows a second, "
        "alone and beside requests | cancelled within |",
        "|---|---|---|---|---|",
    ]
    settings = json.loads((RESULTS / "validation_load.json").read_text())["settings"]
    for row in load("validation_load.json"):
        off, on = row["off"], row["on"]
        beside = f"{statistics.median(row['rows_per_s_beside']):.0f}" if row["rows_per_s_beside"] else "-"
        low, high = row["tpot_p99_interval"]
        lines.append(
            f"| {settings['model']}, {settings['rows']} rows, {row['file_bytes'] / 1e6:.0f} MB | {off['requests']} + "
            f"{on['requests']}, {off['failed'] + on['failed']} failed "
            f"| {1000 * off['tpot_p99']:.0f} and {1000 * on['tpot_p99']:.0f} ms, {row['tpot_p99_ratio']:.2f}x "
            f"({low:.2f} to {high:.2f}) "
            f"| {row['rows_per_s_alone']:.0f} and {beside} | {max(row['cancel_seconds']):.2f} s |"
        )
    return lines


def load(name: str, part: str = "rows") -> list[dict]:
    return json.loads((RESULTS / name).read_text())[part]


if __name__ == "__main__":
    main()
