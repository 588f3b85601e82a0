"""A whole run, from a model's name and a data set's to an adapter and its accuracy: what the examples call."""

import resource
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from sglang.srt.mezo.adapter import AdapterSpec
from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.data import Encoder, Example, OnBadRow, default_objective, get_task
from sglang.srt.mezo.engine import MezoEngine
from sglang.srt.mezo.errors import ConfigError, DataError
from sglang.srt.mezo.evaluate import evaluate
from sglang.srt.mezo.plots import plot_run
from sglang.srt.mezo.rows import SourceRow, read_rows, sample_rows
from sglang.srt.mezo.run_directory import RunDirectory, write_json
from sglang.srt.mezo.trainer import MezoTrainer, TrainResult

_DATA_SEED = 0  # which rows are drawn is the same in every run, as in the MeZO paper


@dataclass(frozen=True)
class ModelArguments:
    """The base model and the engine that runs it."""

    model: str = field(metadata={"help": "Hub name or folder of the base model."})
    dtype: str = field(default="auto", metadata={"help": "Weights and activations; float32 for the smallest zo_eps."})
    max_total_tokens: Optional[int] = field(default=None, metadata={"help": "KV tokens to keep; the machine's default if absent."})


@dataclass(frozen=True)
class DataArguments:
    """Where examples come from, and how many are used."""

    task: Optional[str] = field(default=None, metadata={"help": "Task that renders the rows; none for files of prompts."})
    dataset: Optional[str] = field(default=None, metadata={"help": "Hub name, folder or file; the task's own by default."})
    dev_split: Optional[str] = field(default=None, metadata={"help": "Split to choose the adapter on; held out of train by default."})
    test_split: Optional[str] = field(default=None, metadata={"help": "Split to report; the task's by default, held out of a single file."})
    num_train: Optional[int] = field(default=1000, metadata={"help": "Training rows to use."})
    num_dev: int = field(default=500, metadata={"help": "Development rows to use."})
    num_test: Optional[int] = field(default=1000, metadata={"help": "Test rows to use."})
    on_bad_row: OnBadRow = field(default="raise", metadata={"help": "raise: stop before training; skip: leave the row out."})


@dataclass(frozen=True)
class Splits:
    """Tokenised examples of a run."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    objective: str


def finetune(model: ModelArguments, data: DataArguments, config: MezoConfig) -> dict[str, Any]:
    """Run ``config`` and write ``summary.json`` beside the adapter.

    Raises:
        ConfigError, DataError, CapacityError: bad input is found before training, most of it before the engine starts.

    Returns:
        The content of ``summary.json``.
    """
    trainer, splits = open_trainer(model, data, config)
    with closing(trainer):
        tests = [trainer.planner.plan(example) for example in splits.test]
        zero_shot = evaluate(trainer.scorer, tests, None, trainer.objective, config.per_device_eval_batch_size) if tests else {}
        result = trainer.train()
        summary = _summary(trainer, result, zero_shot, trainer.evaluate(tests) if tests else {})
    write_json(RunDirectory(config).path / "summary.json", summary)
    return summary


def open_trainer(model: ModelArguments, data: DataArguments, config: MezoConfig) -> tuple[MezoTrainer, Splits]:
    """Read and check everything, then start an engine; raises what ``finetune`` does."""
    tokenizer, max_length, target_modules = _inspect_model(model.model, config)
    invocation = _invocation_tokens(tokenizer, data, config)
    splits = load_splits(tokenizer, max_length, invocation, data)
    engine = MezoEngine(
        model.model,
        r=config.r,
        target_modules=target_modules,
        num_slots=config.num_slots,
        dtype=model.dtype,
        max_total_tokens=model.max_total_tokens,
        log_level="error",
    )
    spec = AdapterSpec(model.model, config.r, config.lora_alpha, target_modules, invocation)
    return MezoTrainer(engine.handle, config, spec, splits.train, splits.dev, splits.objective), splits


def load_splits(tokenizer, max_length: int, invocation: Sequence[int], data: DataArguments) -> Splits:
    """Read and tokenise; DataError names the file and line of the first bad row."""
    task = get_task(data.task) if data.task else None
    dataset = data.dataset or (task.dataset[0] if task else None)
    if dataset is None:
        raise ConfigError("dataset", None, "a hub name, folder or file; or name a task")
    train = sample_rows(read_rows(dataset, "train", task), None, _DATA_SEED)
    test_split = data.test_split or (task.eval_split if task and not Path(dataset).is_file() else None)
    if test_split:
        test = sample_rows(read_rows(dataset, test_split, task), data.num_test, _DATA_SEED)
    else:
        train, test = _hold_out(train, data.num_test)
    if data.dev_split:
        dev = sample_rows(read_rows(dataset, data.dev_split, task), data.num_dev, _DATA_SEED)
    else:
        wanted = None if data.num_train is None else data.num_train + data.num_dev
        train, dev = _hold_out(train[:wanted], data.num_dev)
    encoder = Encoder(tokenizer, max_length, task, invocation)
    examples = [encoder.encode_rows(rows, data.on_bad_row) if rows else [] for rows in (train[: data.num_train], dev, test)]
    if not examples[0]:
        raise DataError("no training row is left", dataset)
    return Splits(*examples, objective=default_objective(examples[0], train))


def _hold_out(rows: list[SourceRow], count: int | None) -> tuple[list[SourceRow], list[SourceRow]]:
    """All but the last ``count`` rows, and those; at most a fifth is held out."""
    most = len(rows) // 5
    kept = len(rows) - (most if count is None else min(count, most))
    return rows[:kept], rows[kept:]


def _inspect_model(model: str, config: MezoConfig) -> tuple[Any, int, tuple[str, ...]]:
    """Tokenizer, longest sequence and the modules to adapt, from the model's files alone."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        model_config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError("model", model, f"a hub name or a folder with a model ({error})") from error
    output = "out_proj" if model_config.model_type == "opt" else "o_proj"
    defaults = ("q_proj", "k_proj", "v_proj", output) if config.tuning == "alora" else ("q_proj", "v_proj")
    return tokenizer, model_config.max_position_embeddings, tuple(config.target_modules or defaults)


def _invocation_tokens(tokenizer, data: DataArguments, config: MezoConfig) -> tuple[int, ...]:
    """Token ids from which an aLoRA adapter acts; none for ordinary LoRA."""
    if config.tuning == "lora":
        if config.invocation is not None:
            raise ConfigError("invocation", config.invocation, "nothing, as ordinary LoRA acts on every token")
        return ()
    text = config.invocation if config.invocation is not None or not data.task else get_task(data.task).invocation
    if not text:
        raise ConfigError("invocation", text, "the text from which activated LoRA acts, such as ' It was'")
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _summary(trainer: MezoTrainer, result: TrainResult, zero_shot: dict[str, float], trained: dict[str, float]) -> dict[str, Any]:
    stats = trainer.scorer.prefix_stats
    directory = RunDirectory(trainer.config)
    return {
        "zero_shot_accuracy": zero_shot.get("accuracy"),
        "accuracy": trained.get("eval_accuracy"),
        "zero_shot_loss": zero_shot.get("loss"),
        "loss": trained.get("eval_loss"),
        "steps": result.global_step,
        "best_step": result.best_step,
        "train_seconds": result.train_seconds,
        "steps_per_second": result.steps_per_second,
        "prefix_tokens_reused": stats.reused,
        "prefix_tokens_total": stats.total,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "adapter_dir": str(directory.adapter),
        "plot": plot_run(directory.path),
    }
