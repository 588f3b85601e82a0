"""Time of one MeZO step, side by side: this engine against two Transformers + PEFT loops (see baselines.py) and against
the limit of the arithmetic (see cost_model.py).

    python benchmarks/step_time.py --workload sst2 boolq multirc copa icl16 --tuning alora lora --json
    benchmarks/results/step_time.json

Same model shape (random weights), data, dtype, device and threads in one process. All take turns, one step each, so
that a drift of the machine hits all of them; ratios are of medians. Our steps are those after the first epoch, where
prefixes are kept; each comes after one that is not counted, as a loop before it may have run for a minute and ours
takes a tenth of a second.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from baselines import OfficialStyleMezo, StrongMezo, build_peft_model
from cost_model import CeilingMeter, mean_work, synchronize, work
from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.estimator import Estimator
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.training.trainer import MezoTrainer
from workloads import WORKLOADS, Workload

LOOPS = {"strong": StrongMezo, "official": OfficialStyleMezo}
IN_BFLOAT16 = "_bfloat16"  # after a loop's name: in that type, whatever ours is
STEPS_OF_A_TURN = 2  # the last is timed
MODELS: dict[str, dict[str, int]] = {
    "opt-125m": {},
    "opt-1.3b": {
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
    },
    "opt-13b": {
        "hidden_size": 5120,
        "word_embed_proj_dim": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 20480,
    },
}
TARGETS = {"alora": ("q_proj", "k_proj", "v_proj", "out_proj"), "lora": ("q_proj", "v_proj"), "full": ()}
ALPHA, ZO_EPS, LEARNING_RATE = 16, 1e-3, 1e-6


@dataclass(frozen=True)
class Case:
    """What is measured. ``workload`` names one, or is the length of every prompt; ``loops`` are measured beside."""

    workload: str
    tuning: str
    num_perturbations: int = 1
    estimator: Estimator = "two_sided"
    batch_size: int = 16
    r: int = 8
    model: str = "opt-125m"
    layers: int | None = None  # in place of the model's own
    dtype: str = "float32"
    loops: tuple[str, ...] = ()
    repeats: int = 7
    epoch_steps: int = 10
    threads: int = os.cpu_count()

    @property
    def shape(self) -> Workload:
        return WORKLOADS.get(self.workload) or Workload(self.workload, {int(self.workload): 1}, invocation=2)

    @property
    def model_config(self) -> OPTConfig:
        layers = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return OPTConfig(**{**MODELS[self.model], **layers}, dtype=self.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--tuning", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", choices=MODELS, default="opt-125m", help="shape of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    loops = [*LOOPS, *(name + IN_BFLOAT16 for name in LOOPS)]
    parser.add_argument("--loops", nargs="*", choices=loops, default=list(LOOPS), help="loops to measure beside")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print("ROW " + json.dumps(measure(Case(**json.loads(arguments.case)))), flush=True)
        os._exit(0)  # the engine's threads are of no further use
    cases = [
        Case(
            workload,
            tuning,
            model=arguments.model,
            dtype=arguments.dtype,
            loops=tuple(arguments.loops),
            repeats=arguments.repeats,
            threads=arguments.threads,
        )
        for workload, tuning in itertools.product(arguments.workload, arguments.tuning)
    ]
    rows = []
    for case in cases:
        rows += run_cases([case])
        if arguments.json:
            report = {
                "rows": add_rows(arguments.json, rows),
                "machine": machine(arguments.threads),
                "settings": settings(),
            }
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print()
    show(rows)


def add_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file, with ``rows`` in the place of those of the same cases: not all cases need all loops."""
    names = ("workload", "tuning", "model", "dtype")
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    return list({tuple(row[name] for name in names): row for row in old + rows}.values())


def run_cases(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Every case in a process of its own, as a process holds one engine."""
    rows = []
    for case in cases:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(next(line for line in output.splitlines() if line.startswith("ROW "))[4:]))
        show(rows[-1:])
    return rows


def measure(case: Case) -> dict[str, Any]:
    measurement = Measurement(case)
    for _ in range(case.repeats + 1):
        measurement.turn()
    return measurement.row()


class Measurement:
    """A case in this process: our engine, the loops beside it, and the ceiling."""

    def __init__(self, case: Case):
        self._case = case
        with tempfile.TemporaryDirectory() as model:
            OPTForCausalLM(case.model_config).to(getattr(torch, case.dtype)).save_pretrained(model)
            examples = case.shape.examples(case.epoch_steps * case.batch_size, vocab_size=50_000)
            trainer = our_trainer(case, model, examples)
            self._loops = {name: peft_loop(name, case, model, trainer.handle.device) for name in case.loops}
        torch.set_num_threads(case.threads)
        batches = [[Plain(examples[i]) for i in trainer.drawn.stream.batch(step)] for step in range(case.epoch_steps)]
        self._batches = itertools.cycle(batches)
        self._trainer = trainer
        for _ in range(case.epoch_steps if case.tuning == "alora" else 1):
            self._step()
        stats = trainer.scorer.prefix_stats
        self._before = (stats.reused, stats.total)
        timed = [trainer.global_step + STEPS_OF_A_TURN * turn - 1 for turn in range(2, case.repeats + 2)]
        self._work = mean_work([work(trainer, trainer.batch(step)) for step in timed])
        self._meter = CeilingMeter(trainer, self._work)
        self._times: dict[str, list[float]] = {"ours": [], **{kind: [] for kind in self._loops}}

    def turn(self) -> None:
        """Times one step of each; the first turn only warms up."""
        for _ in range(STEPS_OF_A_TURN - 1):
            self._step()
        self._times["ours"].append(seconds(self._step))
        self._meter.sweep()
        batch = next(self._batches)
        for kind, loop in self._loops.items():
            self._times[kind].append(seconds(lambda: loop.step(batch)))

    def row(self) -> dict[str, Any]:
        times = {kind: values[1:] for kind, values in self._times.items()}
        median = {kind: statistics.median(values) for kind, values in times.items()}
        stats = self._trainer.scorer.prefix_stats
        return {
            **asdict(self._case),
            **{f"{kind}_s": values for kind, values in times.items()},
            **{f"ratio_{kind}": median[kind] / median["ours"] for kind in self._loops},
            "limit_s": self._meter.limit,
            "limit_share": self._meter.limit / median["ours"],
            "work": asdict(self._work),
            "ceiling": asdict(self._meter.ceiling),
            "gemm_seconds": self._meter.gemm_seconds,
            "prefix_tokens_reused": stats.reused - self._before[0],
            "prefix_tokens_total": stats.total - self._before[1],
        }

    def _step(self) -> None:
        drain(self._trainer.step_passes(self._trainer.batch(self._trainer.global_step)))


class Plain:
    """An example as the baselines take it."""

    def __init__(self, example: Example):
        self.prompt = list(example.prompt)
        self.options = [list(option) for option in example.options]
        self.label = example.label


def our_trainer(case: Case, model: str, examples: list[Example]) -> MezoTrainer:
    adapter = {"r": case.r, "lora_alpha": ALPHA, "target_modules": list(TARGETS[case.tuning])}
    config = MezoConfig(
        tuning=case.tuning,
        **({} if case.tuning == "full" else adapter),
        per_device_train_batch_size=case.batch_size,
        num_perturbations=case.num_perturbations,
        estimator=case.estimator,
        scale_by_loss_std=case.num_perturbations > 1,
        zo_eps=ZO_EPS,
        learning_rate=LEARNING_RATE,
        max_steps=10_000,
    )
    engine = MezoEngine(
        model,
        r=case.r,
        target_modules=TARGETS[case.tuning],
        num_slots=config.num_slots,
        dtype=case.dtype,
        skip_tokenizer_init=True,
        log_level="error",
        max_running_requests=4 * case.batch_size * case.num_perturbations,
        max_total_tokens=3 * sum(len(example.prompt) for example in examples) // 2 + 2 * config.max_tokens_per_batch,
    )
    invocation = case.shape.invocation_tokens if case.tuning == "alora" else ()
    return MezoTrainer(engine.handle, config, spec_of(config, model, invocation), examples)


def spec_of(config: MezoConfig, model: str, invocation: Sequence[int] = ()) -> AdapterSpec | WeightsSpec:
    return WeightsSpec(model) if config.tuning == "full" else AdapterSpec.of(config, model, invocation)


def peft_loop(name: str, case: Case, model: str, device: torch.device):
    dtype = "bfloat16" if name.endswith(IN_BFLOAT16) else case.dtype
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    invocation = case.shape.invocation_tokens if case.tuning == "alora" else ()
    adapted = build_peft_model(base, case.tuning, case.r, ALPHA, TARGETS[case.tuning], invocation)
    return LOOPS[name.removesuffix(IN_BFLOAT16)](
        adapted, zo_eps=ZO_EPS, learning_rate=LEARNING_RATE, seed=0, pad_token_id=1
    )


def seconds(step) -> float:
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def machine(threads: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "processor": platform.processor() or platform.machine(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {name: version(name) for name in ("sglang", "sglang-mezo", "torch", "transformers", "peft")},
    }


def settings() -> dict[str, Any]:
    return {"models": "random weights", "target_modules": TARGETS}


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'workload':<10}{'tuning':<8}{'dtype':<10}{'n':>3} {'tokens':>7} {'ours ms':>22} {'limit ms':>9} "
        f"{'share':>6} "
        f"{'strong ms':>10} {'official ms':>12} {'/strong':>8} {'/official':>10} {'reused':>8}"
    )
    for row in rows:
        ours = [1000 * value for value in row["ours_s"]]
        spread = f"{statistics.median(ours):.0f} ({min(ours):.0f} to {max(ours):.0f})"
        times = [f"{1000 * statistics.median(row[f'{kind}_s']):.0f}" if f"{kind}_s" in row else "-" for kind in LOOPS]
        ratios = [f"{row[f'ratio_{kind}']:.1f}x" if f"{kind}_s" in row else "-" for kind in LOOPS]
        total = row["prefix_tokens_total"]
        reused = f"{row['prefix_tokens_reused'] / total:.1%}" if total else "-"
        print(
            f"{row['workload']:<10}{row['tuning']:<8}{row['dtype']:<10}{row['num_perturbations']:>3} "
            f"{row['work']['tokens']:>7} {spread:>22} "
            f"{1000 * row['limit_s']:>9.1f} {row['limit_share']:>6.1%} {times[0]:>10} {times[1]:>12} {ratios[0]:>8} "
            f"{ratios[1]:>10} {reused:>8}",
            flush=True,
        )
        for name in row["loops"]:
            if name.endswith(IN_BFLOAT16):
                print(
                    f"{name}: {1000 * statistics.median(row[f'{name}_s']):.0f} ms, {row[f'ratio_{name}']:.1f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
