"""Step times of one shape in one process: every tuning, length of prompts and number of directions by one engine,
beside a strong Transformers + PEFT loop on the same device, and the limit that is measured there.

    python benchmarks/gpu/steps.py --shape opt-13b --json steps.json

Ours take turns, a step each; the loop follows, as it needs the memory. A loop's step is one direction from both sides,
two forward passes of the batch; its time is told for as many passes as ours makes. Rows are written as they are
measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

import shapes
from baselines import StrongMezo, build_peft_model
from cost_model import CeilingMeter, mean_work, synchronize, work
from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.training.trainer import MezoTrainer
from workloads import WORKLOADS

BATCH, EPOCH_STEPS, R, ALPHA, ZO_EPS = 16, 2, 8, 16, 1e-2
DIRECTIONS = (16, 1, 8, 32)  # the most wanted first


@dataclass(frozen=True)
class Case:
    tuning: str
    workload: str
    directions: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tuning", nargs="+", choices=["alora", "lora", "full"], default=["alora", "lora"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["sst2", "multirc"])
    parser.add_argument("--directions", nargs="+", type=int, default=list(DIRECTIONS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        rows = []
        for case in cases(arguments):
            rows.append(bench.row(case))
            arguments.json.write_text(json.dumps(rows))
            print(told(rows[-1]), flush=True)
    os._exit(0)  # the engine's threads are of no further use


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for tuning in arguments.tuning:
        for workload in arguments.workload:
            for directions in arguments.directions if tuning == "alora" else arguments.directions[:2]:
                yield Case(tuning, workload, directions)


class Bench:
    """An engine, and beside it a loop's model for the tuning and the prompts that are measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self._arguments = arguments
        self._model = shapes.save(arguments.shape, folder, arguments.dtype)
        whole = "full" in arguments.tuning
        if whole:  # which writes into weights that a checkpoint names
            shapes.on_device(arguments.shape, arguments.dtype, torch.device("cpu")).save_pretrained(folder)
        tokens = max(sum(len(one.prompt) for one in self._examples(name)) for name in arguments.workload)
        most = max(self._config(case).max_tokens_per_batch for case in cases(arguments))
        self._engine = MezoEngine(
            self._model,
            r=R,
            target_modules=() if whole else shapes.targets(arguments.shape),
            num_slots=max(self._config(case).num_slots for case in cases(arguments)),
            dtype=arguments.dtype,
            log_level="error",
            max_running_requests=4 * BATCH * max(arguments.directions),
            max_total_tokens=3 * tokens // 2 + 2 * most,
            mem_fraction_static=0.6,
            **({"skip_tokenizer_init": True} if whole else shapes.DUMMY),
        )
        self._loop: tuple[tuple[str, str], float] | None = None

    def row(self, case: Case) -> dict[str, Any]:
        trainer = self.trainer(case)
        try:

            def step() -> None:
                drain(trainer.step_passes(trainer.batch(trainer.global_step)))

            first = seconds(step)
            for _ in range(EPOCH_STEPS + 1):
                step()
            upcoming = range(trainer.global_step, trainer.global_step + EPOCH_STEPS)
            meter = CeilingMeter(trainer, mean_work([work(trainer, trainer.batch(at)) for at in upcoming]))
            times = []
            for _ in range(self._arguments.repeats):
                times.append(seconds(step))
                meter.sweep()
            passes, limit = trainer.config.forward_passes, meter.limit
        finally:
            trainer.close()
        loop = self._loop_seconds(case)
        ours = statistics.median(times)
        return {
            "shape": self._arguments.shape,
            "dtype": self._arguments.dtype,
            "tuning": case.tuning,
            "workload": case.workload,
            "directions": case.directions,
            "forward_passes": passes,
            "first_s": first,
            "ours_s": times,
            "loop_s_of_two_passes": loop,
            "ratio_at_equal_passes": loop / 2 * passes / ours,
            "limit_s": limit,
            "limit_share": limit / ours,
        }

    def _examples(self, workload: str):
        return WORKLOADS[workload].examples(EPOCH_STEPS * BATCH, vocab_size=50_000)

    def _config(self, case: Case) -> MezoConfig:
        own = shapes.targets(self._arguments.shape) if case.tuning == "alora" else ("q_proj", "v_proj")
        adapter = {} if case.tuning == "full" else {"r": R, "lora_alpha": ALPHA, "target_modules": list(own)}
        return MezoConfig(
            tuning=case.tuning,
            **adapter,
            per_device_train_batch_size=BATCH,
            num_perturbations=case.directions,
            estimator="two_sided" if case.directions == 1 else "leave_one_out",
            scale_by_loss_std=case.directions > 2,
            zo_eps=ZO_EPS,
            learning_rate=1e-6,
            max_steps=10_000,
        )

    def trainer(self, case: Case) -> MezoTrainer:
        config = self._config(case)
        invocation = WORKLOADS[case.workload].invocation_tokens if case.tuning == "alora" else ()
        whole = case.tuning == "full"
        spec = WeightsSpec(self._model) if whole else AdapterSpec.of(config, self._model, invocation)
        return MezoTrainer(self._engine.handle, config, spec, self._examples(case.workload))

    def _loop_seconds(self, case: Case) -> float:
        """Of a step of the loop, which does not depend on how many directions ours has."""
        key = (case.tuning, case.workload)
        if self._loop is None or self._loop[0] != key:
            device = torch.device(self._engine.handle.device)
            base = shapes.on_device(self._arguments.shape, self._arguments.dtype, device)
            config = self._config(case)
            invocation = WORKLOADS[case.workload].invocation_tokens if case.tuning == "alora" else ()
            adapted = build_peft_model(base, case.tuning, R, ALPHA, config.target_modules or (), invocation)
            loop = StrongMezo(adapted, zo_eps=ZO_EPS, learning_rate=1e-6, seed=0, pad_token_id=1)
            batch = [Plain(one) for one in self._examples(case.workload)[:BATCH]]
            loop.step(batch)
            times = [seconds(lambda: loop.step(batch)) for _ in range(max(2, self._arguments.repeats // 3))]
            self._loop = (key, statistics.median(times))
            del base, adapted, loop
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self._loop[1]


class Plain:
    """An example as the loop takes it."""

    def __init__(self, example):
        self.prompt = list(example.prompt)
        self.options = [list(option) for option in example.options]
        self.label = example.label


def seconds(step: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def told(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']} {row['tuning']} {row['workload']} {row['directions']:>2} directions: "
        f"{1000 * statistics.median(row['ours_s']):.1f} ms ({1000 * row['first_s']:.0f} the first), "
        f"{row['limit_share']:.0%} of the limit, {row['ratio_at_equal_passes']:.1f}x the loop"
    )


if __name__ == "__main__":
    main()
