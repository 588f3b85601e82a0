"""Training with a KV pool of a tenth of the training set's prefixes, against one with room for all of them.

    python benchmarks/small_pool.py --json benchmarks/results/small_pool.json

BoolQ lengths, aLoRA, OPT-125m shape with random weights, float32. Two engines in processes of their own take turns of
some steps, after the large pool's first epoch; the small pool's steps are whole windows, with the computation of their
prefixes. Losses of both are compared on the same examples with nothing reused.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from cost_model import meter_of_next_steps
from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.core.tokens import distinct_tokens
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.trainer import MezoTrainer
from step_time import ALPHA, LEARNING_RATE, TARGETS, ZO_EPS, machine
from turns import Operations, Worker
from workloads import WORKLOADS

WORKLOAD = WORKLOADS["boolq"]
BATCH_SIZE, RANK = 16, 8
POOLS = {"all": 1.5, "tenth": 0.1}  # of the tokens of all prefixes
TARGET = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--turns", type=int, default=5, help="windows of the small pool that are measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as model:
        OPTForCausalLM(OPTConfig()).save_pretrained(model)  # the default is OPT-125m
        trainers = {pool: Worker(open_trainer, model, share, arguments.examples) for pool, share in POOLS.items()}
        report = {"rows": compare(trainers, arguments.turns), "machine": machine(int(os.environ["OMP_NUM_THREADS"]))}
        report["settings"] = {
            "examples": arguments.examples,
            "batch_size": BATCH_SIZE,
            "r": RANK,
            "echoes": MezoConfig.echoes,
        }
    show(report["rows"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def compare(trainers: dict[str, Worker], turns: int) -> dict[str, Any]:
    described = {pool: trainer.call("describe") for pool, trainer in trainers.items()}
    window = described["tenth"]["window"]
    steps = window * MezoConfig.echoes // BATCH_SIZE
    trainers["all"].call("steps", -(-described["all"]["examples"] // BATCH_SIZE))  # the first epoch
    times: dict[str, list[float]] = {pool: [] for pool in trainers}
    for _ in range(turns):
        for pool, trainer in trainers.items():
            times[pool].append(trainer.call("steps", steps) / steps)
            trainer.call("sweep")
    differences = {pool: trainer.call("difference") for pool, trainer in trainers.items()}
    limits = {pool: trainer.call("limit") for pool, trainer in trainers.items()}
    medians = {pool: statistics.median(values) for pool, values in times.items()}
    return {
        "pools": described,
        "window": window,
        "steps_a_turn": steps,
        "step_s": times,
        "limit_s": limits,
        "slowdown": medians["tenth"] / medians["all"],
        "loss_difference_without_reuse": differences,
    }


def open_trainer(model: str, share: float, count: int) -> Operations:
    """A trainer on a pool of ``share`` of the tokens of all prefixes."""
    examples = WORKLOAD.examples(count, vocab_size=50_000)
    cut = len(WORKLOAD.invocation_tokens)
    tokens = distinct_tokens({example.prompt[:-cut] for example in examples})
    config = MezoConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS["alora"]),
        per_device_train_batch_size=BATCH_SIZE,
        num_perturbations=1,
        estimator="two_sided",
        scale_by_loss_std=False,
        zo_eps=ZO_EPS,
        learning_rate=LEARNING_RATE,
        max_steps=10_000,
    )
    engine = MezoEngine(
        model,
        r=RANK,
        target_modules=TARGETS["alora"],
        num_slots=config.num_slots,
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="error",
        max_total_tokens=int(share * tokens),
    )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    spec = AdapterSpec.of(config, model, WORKLOAD.invocation_tokens)
    trainer = MezoTrainer(engine.handle, config, spec, examples)
    meter = meter_of_next_steps(trainer)
    return {
        "describe": lambda: {
            "kv_tokens": engine.handle.kv_capacity,
            "prefix_tokens": tokens,
            "examples": count,
            "window": trainer.source.window,
        },
        "steps": lambda number: run(trainer, number),
        "difference": lambda: difference(trainer),
        "sweep": meter.sweep,
        "limit": lambda: meter.limit,
    }


def run(trainer: MezoTrainer, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        drain(trainer.step_passes(trainer.batch(trainer.global_step)))
    return time.perf_counter() - started


def difference(trainer: MezoTrainer) -> float:
    """Of a batch's losses with reuse and without it, the larger."""
    batch = trainer.batch(trainer.global_step)
    z = trainer.optimizer.directions(1, 1)
    reused = drain(trainer.probe.loss_passes(batch, z, ZO_EPS))
    kept, trainer.scorer = (
        trainer.scorer,
        Scorer(trainer.handle, trainer.planner.scope, trainer.config.max_tokens_per_batch, prefix_reuse=False),
    )
    computed = drain(trainer.probe.loss_passes(batch, z, ZO_EPS))
    trainer.scorer = kept
    return max(abs(a[0] - b[0]) for a, b in zip(reused, computed))


def show(row: dict[str, Any]) -> None:
    for pool, described in row["pools"].items():
        values = [1000 * value for value in row["step_s"][pool]]
        print(
            f"pool of {described['kv_tokens']} tokens for {described['prefix_tokens']}: "
            f"{statistics.median(values):.0f} ms a step "
            f"({min(values):.0f} to {max(values):.0f}; limit without prefixes {1000 * row['limit_s'][pool]:.0f} ms), "
            f"losses without reuse differ by {row['loss_difference_without_reuse'][pool]:.1e}"
        )
    print(f"{'pass' if row['slowdown'] <= TARGET else 'FAIL'}  {row['slowdown']:.2f}x, at most {TARGET}")


if __name__ == "__main__":
    main()
