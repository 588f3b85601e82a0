"""Accuracy of MeZO, or its F1 or reward, on a real model and real data, several seeds; one row of results per seed.

    python benchmarks/accuracy.py --model models/smollm2-135m --dtype float32 --task sst2 --dataset data/sst2 \\
        --json benchmarks/results/sst2-alora.json --seeds 0 1 2 --max_steps 2000

Takes every flag of the main example. Resumable: a seed whose row is in the results file is skipped, and one that was
cut short goes on from its seed log. Scores are those of the test split; the adapter to keep is chosen on rows held
out of the training split.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.integrity import write_json
from sglang.srt.mezo.core.objective import GENERATED
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.training.arguments import build, read, status_of
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, finetune

_MEASURED = (
    "steps",
    "best_step",
    "zero_shot_loss",
    "loss",
    "steps_per_second",
    "train_seconds",
    "prefix_tokens_reused",
    "prefix_tokens_total",
    "peak_rss_bytes",
)


@dataclass(frozen=True)
class AccuracyArguments:
    json: Path = setting(help="Results file; a row is added to it per seed.")
    seeds: Optional[list[int]] = setting(None, "Seeds to run; 0, 1 and 2 by default.")


def main() -> None:
    kinds = (ModelArguments, DataArguments, MezoConfig, AccuracyArguments)
    model, data, config, arguments = build(kinds, read(sys.argv[1:], kinds, __doc__))
    for seed in arguments.seeds or (0, 1, 2):
        if all(row["seed"] != seed for row in load(arguments.json)["rows"]):
            run_in_new_process(model, data, config_of_seed(config, seed, arguments.json), arguments.json)
    show(load(arguments.json)["rows"])


def config_of_seed(config: MezoConfig, seed: int, results: Path) -> MezoConfig:
    output_dir = Path(config.output_dir) / f"{results.stem}-seed{seed}"
    started = (output_dir / "seed_log").is_file()
    return replace(config, seed=seed, output_dir=str(output_dir), resume_from_checkpoint=started)


def run_in_new_process(*arguments) -> None:
    """A process holds one engine."""
    process = multiprocessing.get_context("spawn").Process(target=run_seed, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def run_seed(model: ModelArguments, data: DataArguments, config: MezoConfig, path: Path) -> None:
    summary = finetune(model, data, config)
    results = load(path)
    results["rows"].append(
        {
            "model": Path(model.model).name,
            "task": data.task,
            "tuning": config.tuning,
            "seed": config.seed,
            **{name: summary[name] for name in (*_scores(summary), *_MEASURED)},
            "settings": {
                **config.to_dict(),
                "dtype": model.dtype,
                "num_train": data.num_train,
                "num_dev": data.num_dev,
            },
            "versions": {name: version(name) for name in ("sglang", "sglang-mezo", "torch", "transformers", "peft")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    os._exit(0)  # the engine's threads are of no further use


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def show(rows: list[dict]) -> None:
    _, score = _scores(rows[0])
    print(f"{'seed':>6} {'zero-shot':>10} {score:>11} {'best step':>10} {'steps/s':>8}")
    for row in rows:
        print(
            f"{row['seed']:>6} {row[f'zero_shot_{score}']:>10.4f} {row[score]:>11.4f} {row['best_step']:>10} "
            f"{row['steps_per_second']:>8.2f}"
        )
    values = [row[score] for row in rows]
    print(f"mean of {len(rows)} seeds: {statistics.mean(values):.4f} (min {min(values):.4f}, max {max(values):.4f})")


def _scores(summary: dict) -> tuple[str, str]:
    """Names of what the objective is told by, of the base model and trained."""
    score = next(name for name in ("accuracy", *GENERATED) if name in summary)
    return f"zero_shot_{score}", score


if __name__ == "__main__":
    sys.exit(status_of(main))
