"""Time of one MeZO step, side by side: this engine against two Transformers + PEFT loops (see baselines.py).

    python benchmarks/step_time.py --workload sst2 --tuning alora lora --json benchmarks/results/step_time.json

Same model shape (OPT-125m, random weights), data, dtype and threads in one process. The three take turns, one step each,
so that a drift of the machine hits all of them; ratios are of medians. Our steps are those after the first epoch.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from baselines import OfficialStyleMezo, StrongMezo, build_peft_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from workloads import WORKLOADS, Workload

from sglang.srt.mezo.adapter import AdapterSpec
from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.data import Example
from sglang.srt.mezo.engine import MezoEngine
from sglang.srt.mezo.trainer import MezoTrainer

BATCH_SIZE = 16
NUM_EXAMPLES = 160
TARGETS = {"alora": ("q_proj", "k_proj", "v_proj", "out_proj"), "lora": ("q_proj", "v_proj")}
R, ALPHA, ZO_EPS, LEARNING_RATE = 8, 16, 1e-3, 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--tuning", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num_perturbations", type=int, default=1, help="directions of our step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is not None:
        print("ROW " + json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # the engine's threads are of no further use
    report = {"rows": run_rows(arguments), "machine": machine(arguments.threads), "settings": settings(arguments)}
    show(report["rows"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def run_rows(arguments: argparse.Namespace) -> list[dict]:
    """Every row in a process of its own, as a process holds one engine."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        OPTForCausalLM(OPTConfig(dtype=arguments.dtype)).to(getattr(torch, arguments.dtype)).save_pretrained(folder)  # the default is OPT-125m
        for workload in arguments.workload:
            for tuning in arguments.tuning:
                command = [sys.executable, __file__, "--model", folder, "--workload", workload, "--tuning", tuning, "--dtype", arguments.dtype,
                           "--num_perturbations", str(arguments.num_perturbations), "--repeats", str(arguments.repeats),
                           "--threads", str(arguments.threads)]  # fmt: skip
                environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
                output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                rows.append(json.loads(next(line for line in output.splitlines() if line.startswith("ROW "))[4:]))
    return rows


def measure(arguments: argparse.Namespace) -> dict:
    (name,), (tuning,) = arguments.workload, arguments.tuning
    workload = WORKLOADS[name]
    examples = workload.examples(NUM_EXAMPLES, vocab_size=50_000)
    trainer = our_trainer(arguments, workload, tuning, examples)
    loops = {kind.__name__: peft_loop(kind, arguments, workload, tuning) for kind in (StrongMezo, OfficialStyleMezo)}
    batches = [[Plain(examples[i]) for i in trainer.stream.batch(step)] for step in range(NUM_EXAMPLES // BATCH_SIZE)]
    for step in range(len(batches)):  # the first epoch
        trainer.train_step(trainer.batch(step))
    stats = trainer.scorer.prefix_stats
    before = (stats.reused, stats.total)
    times: dict[str, list[float]] = {"ours": [], **{kind: [] for kind in loops}}
    torch.set_num_threads(arguments.threads)
    for repeat in range(arguments.repeats + 1):
        step = trainer.global_step
        times["ours"].append(seconds(lambda: trainer.train_step(trainer.batch(step))))
        batch = batches[repeat % len(batches)]
        for kind, loop in loops.items():
            times[kind].append(seconds(lambda: loop.step(batch)))
    ours, strong, official = (times[kind][1:] for kind in ("ours", "StrongMezo", "OfficialStyleMezo"))  # the first warms up
    return {
        "workload": name,
        "tuning": tuning,
        "dtype": arguments.dtype,
        "num_perturbations": arguments.num_perturbations,
        "ours_s": ours,
        "strong_s": strong,
        "official_s": official,
        "ratio_strong": statistics.median(strong) / statistics.median(ours),
        "ratio_official": statistics.median(official) / statistics.median(ours),
        "prefix_tokens_reused": stats.reused - before[0],
        "prefix_tokens_total": stats.total - before[1],
    }


class Plain:
    """An example as the baselines take it."""

    def __init__(self, example: Example):
        self.prompt = list(example.prompt)
        self.options = [list(option) for option in example.options]
        self.label = example.label


def our_trainer(arguments: argparse.Namespace, workload: Workload, tuning: str, examples: list[Example]) -> MezoTrainer:
    engine = MezoEngine(
        arguments.model, r=R, target_modules=TARGETS[tuning], num_slots=2 * arguments.num_perturbations + 1, dtype=arguments.dtype,
        skip_tokenizer_init=True, log_level="error",
    )  # fmt: skip
    torch.set_num_threads(arguments.threads)
    config = MezoConfig(
        tuning=tuning, per_device_train_batch_size=BATCH_SIZE, num_perturbations=arguments.num_perturbations, zo_eps=ZO_EPS,
        learning_rate=LEARNING_RATE, max_steps=10_000,
    )  # fmt: skip
    spec = AdapterSpec(arguments.model, R, ALPHA, TARGETS[tuning], workload.invocation_tokens if tuning == "alora" else ())
    return MezoTrainer(engine.handle, config, spec, examples)


def peft_loop(kind: type, arguments: argparse.Namespace, workload: Workload, tuning: str):
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    invocation = workload.invocation_tokens if tuning == "alora" else ()
    model = build_peft_model(base, tuning, R, ALPHA, TARGETS[tuning], invocation)
    return kind(model, zo_eps=ZO_EPS, learning_rate=LEARNING_RATE, seed=0, pad_token_id=1)


def seconds(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def machine(threads: int) -> dict:
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": threads,
            "versions": {name: version(name) for name in ("sglang", "sglang-mezo", "torch", "transformers", "peft")}}  # fmt: skip


def settings(arguments: argparse.Namespace) -> dict:
    return {"model": "OPT-125m shape, random weights", "batch_size": BATCH_SIZE, "r": R, "target_modules": TARGETS,
            "num_examples": NUM_EXAMPLES, "repeats": arguments.repeats}  # fmt: skip


def show(rows: list[dict]) -> None:
    print(f"{'workload':<10}{'tuning':<8}{'dtype':<10}{'n':>3} {'ours ms':>22} {'strong ms':>10} {'official ms':>12} {'/strong':>8} {'/official':>10} {'reused':>8}")
    for row in rows:
        ours = [1000 * value for value in row["ours_s"]]
        spread = f"{statistics.median(ours):.0f} ({min(ours):.0f} to {max(ours):.0f})"
        strong, official = (1000 * statistics.median(row[key]) for key in ("strong_s", "official_s"))
        total = row["prefix_tokens_total"]
        reused = f"{row['prefix_tokens_reused'] / total:.1%}" if total else "-"
        print(f"{row['workload']:<10}{row['tuning']:<8}{row['dtype']:<10}{row['num_perturbations']:>3} {spread:>22} {strong:>10.0f} {official:>12.0f} "
              f"{row['ratio_strong']:>7.1f}x {row['ratio_official']:>9.1f}x {reused:>8}")  # fmt: skip


if __name__ == "__main__":
    main()
