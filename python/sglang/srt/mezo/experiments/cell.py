"""One cell of an experiment: it runs, and has a result."""

import json
import os
import platform
import subprocess
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.integrity import write_json
from sglang.srt.mezo.core.objective import SCORE_METRICS
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.selection import drawn_rows, with_demonstrations
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.engine.ranks import Rank, other_ranks
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments, first_order
from sglang.srt.mezo.experiments.linear_probing import linear_probing
from sglang.srt.mezo.experiments.spec import Cell, arguments_of
from sglang.srt.mezo.training.evaluate import EvaluateArguments, evaluation_engine, measure_on, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments, finetune
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.run_directory import has_run

_PACKAGES = ("sglang-mezo", "sglang", "torch", "transformers", "peft", "datasets", "scikit-learn")
SCORES = (*SCORE_METRICS.values(),)
"""What a result may be told by beside a loss."""


def run_cell(cell: Cell, experiment: str, folder: Path) -> None:
    """Run it and write its result, whole or not at all; a MeZO run that was cut short goes on.

    Args:
        folder: of the experiment.
    """
    began, started = time.time(), time.perf_counter()
    run = folder / "runs" / cell.id
    model, data, arguments = arguments_of(cell)
    if isinstance(arguments, MezoConfig):
        measured = _mezo(model, data, arguments, run)
    elif isinstance(arguments, FirstOrderArguments):
        measured = _trained(first_order(model, data, arguments, str(run)))
    elif isinstance(arguments, EvaluateArguments):
        measured = _evaluated(model, data, arguments)
    else:
        measured = _trained(linear_probing(model, data, cell.seed))
    result = {
        "run_info": {
            "experiment": experiment,
            "cell": cell.id,
            "task": cell.task,
            "label": cell.label,
            "method": cell.method,
            "seed": cell.seed,
            "point": cell.point,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "total_time": time.perf_counter() - started,
            "settings": {"model": cell.model, "data": cell.data, "method": cell.settings},
        },
        **measured,
        "meta_info": meta_info(),
    }
    for name in {"adapter_dir", "model_dir"} & measured["train_info"].keys():
        measured["train_info"][name] = os.path.relpath(measured["train_info"][name], folder)  # wherever that is moved
    path = result_path(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def result_path(folder: Path, cell: Cell) -> Path:
    return folder / "results" / f"{cell.id}.json"


def meta_info() -> dict[str, Any]:
    """The machine, the packages, and the commit where this is a checkout."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "package_info": {name: found for name in _PACKAGES if (found := _version(name))},
        "system_info": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerators": cards,
        },
        "commit": _commit(),
    }


def _mezo(model: ModelArguments, data: DataArguments, config: MezoConfig, run: Path) -> dict[str, Any]:
    begun = has_run(run)
    config = replace(
        config, output_dir=str(run), resume_from_checkpoint=begun, overwrite_output_dir=not begun, disable_tqdm=True
    )
    summary = finetune(model, data, config)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    evaluations = [record for record in history if "eval_loss" in record]
    return _trained(summary | {"evaluations": evaluations, "forward_passes": config.forward_passes * summary["steps"]})


def _trained(summary: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result, of what a run tells at its end."""
    scores = [name for name in SCORES if summary.get(name) is not None]
    best = next((one for one in summary.get("evaluations", []) if one["step"] == summary.get("best_step")), {})
    known = {"loss", *scores, *(f"zero_shot_{name}" for name in ("loss", *scores)), "evaluations", "losses", "plot"}
    if "train_tokens" in summary:
        summary = {**summary, "tokens_computed": summary["train_tokens"] + summary["eval_tokens"]}
    return {
        "test": {name: summary[name] for name in ("loss", *scores) if summary.get(name) is not None},
        "zero_shot": {
            name: summary[f"zero_shot_{name}"]
            for name in ("loss", *scores)
            if summary.get(f"zero_shot_{name}") is not None
        },
        "dev": {name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")},
        "train_info": {name: value for name, value in summary.items() if name not in known},
        "evaluations": summary.get("evaluations", []),
    }


def _evaluated(model: ModelArguments, data: DataArguments, arguments: EvaluateArguments) -> dict[str, Any]:
    with other_ranks(model.tp_size, _evaluated_by, model, data, arguments) as rank:
        return _evaluated_by(rank, model, data, arguments)


def _evaluated_by(
    rank: Rank, model: ModelArguments, data: DataArguments, arguments: EvaluateArguments
) -> dict[str, Any]:
    """The work of one rank."""
    if data.streaming:
        raise ConfigError("streaming", True, "false where nothing is trained")
    named = named_data(data.task, data.dataset, data.dataset_config)
    rows = with_demonstrations(named, drawn_rows(named, data)[2], arguments.num_demonstrations, arguments.on_bad_row)
    memory = MemoryMeter()
    asked = read_evaluation(model, arguments, rows)
    engine = evaluation_engine(model, asked.adapter, rank)
    started = time.perf_counter()
    metrics, _ = measure_on(engine, model.model, asked, arguments)
    counted = engine.handle.counted
    return {
        "test": {name: value for name, value in metrics.items() if name != "examples"},
        "zero_shot": {},
        "dev": {},
        "train_info": {
            "train_seconds": 0.0,
            "eval_seconds": time.perf_counter() - started,
            "engine_passes": counted.passes,
            "tokens_computed": counted.tokens,
            "peak_rss_bytes": memory.total.host,
        },
        "evaluations": [],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
