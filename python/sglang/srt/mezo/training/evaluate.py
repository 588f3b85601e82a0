"""Loss and accuracy of an adapter, or of the base model, on the rows of a data set."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from sglang.srt.mezo.adapters.adapter import Adapter
from sglang.srt.mezo.adapters.architectures import is_masked
from sglang.srt.mezo.adapters.foreign import ForeignAdapter, read_given
from sglang.srt.mezo.adapters.peft_adapter import PeftAdapter
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.objective import Generation, Objective, ObjectiveSettings
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.data.calibration import CalibrationEncoder
from sglang.srt.mezo.data.checks import OnBadRow
from sglang.srt.mezo.data.examples import Example, default_objective
from sglang.srt.mezo.data.named import Named, is_text, named_data
from sglang.srt.mezo.data.rows import SourceRow, has_splits
from sglang.srt.mezo.data.sampling import permuted
from sglang.srt.mezo.data.selection import with_demonstrations
from sglang.srt.mezo.data.splits import written_test
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.engine.layers import adapted_sites
from sglang.srt.mezo.engine.points import BASE, Point
from sglang.srt.mezo.engine.prefix_points import held_prefix
from sglang.srt.mezo.engine.ranks import Rank, other_ranks
from sglang.srt.mezo.engine.slots import Slot, SlotLayout
from sglang.srt.mezo.scoring.calibration import Calibrated
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments, adapted_model, chat_settings, encoder_kind, max_length_of
from sglang.srt.mezo.training.rewards import Writer, measure_of
from sglang.srt.mezo.training.usable import require_choices


@dataclass(frozen=True)
class EvaluateArguments(ObjectiveSettings):
    """What is evaluated, and on which rows; ConfigError names the field at fault."""

    adapter: Optional[str] = setting(None, "PEFT folder of the adapter; the base model by default.")
    task: Optional[str] = setting(
        None, "Task that renders the rows; text: they are whole texts, in a column text; none for files of prompts."
    )
    dataset: Optional[str] = setting(None, "Hub name, folder or file; the task's own by default.")
    dataset_config: Optional[str] = setting(None, "Configuration of a hub data set; the task's own by default.")
    split: Optional[str] = setting(
        None, "Split of the data set; the task's for tests by default, or test. A file has none."
    )
    rows: Optional[int] = setting(
        None,
        "Rows to use; all by default. Of a task with splits those that the paper's code draws, else from the first.",
        at_least=1,
    )
    max_length: Optional[int] = setting(None, "As of a run: most tokens of an example.", at_least=2)
    num_demonstrations: int = setting(
        0,
        "Of a task: training rows that are shown with their answers before each row, other ones for each, as the "
        "paper's code draws them; what is too long loses its first.",
        at_least=0,
    )
    calibrated: bool = setting(
        False, "Of a task: options count by how much likelier the row makes them than a prompt that says nothing of it."
    )
    predictions: Optional[str] = setting(
        None, "File to write: of each row its source, what was read or written, and whether that is right."
    )
    on_bad_row: OnBadRow = setting("raise", "raise: stop; skip: leave the row out.")
    max_tokens_per_batch: int = setting(4096, "Most tokens run through the model in one forward pass.", at_least=1)
    per_device_eval_batch_size: int = setting(64, "Examples in a batch.", at_least=1)
    seed: int = setting(42, "Of sampled completions.", at_least=0, below=2**64, words="an unsigned 64-bit number")

    def __post_init__(self):
        super().__post_init__()
        renders = self.task is not None and not is_text(self.task)
        for name in ("num_demonstrations", "calibrated"):
            self._require(name, renders or not getattr(self, name), "nothing without a task that renders rows")
        chosen = self.objective in (None, "classification", "accuracy")
        self._require("calibrated", chosen or not self.calibrated, "false but for a choice between options")


def evaluate(model: ModelArguments, arguments: EvaluateArguments) -> dict[str, Any]:
    """``examples``, ``loss``, and the scores of the objective, such as ``accuracy`` where there are options to choose
    from.

    Raises:
        ConfigError, DataError, CapacityError: before the engine starts but for what only an engine can tell.
    """
    with other_ranks(model.tp_size, _evaluate, model, arguments) as rank:
        return _evaluate(rank, model, arguments)


def _evaluate(rank: Rank, model: ModelArguments, arguments: EvaluateArguments) -> dict[str, Any]:
    """The work of one rank."""
    asked = read_evaluation(model, arguments)
    metrics, told = measure_on(evaluation_engine(model, asked.adapter, rank), model.model, asked, arguments)
    if rank.is_first:
        write_predictions(arguments, told)
    return metrics


def write_predictions(arguments: EvaluateArguments, told: Sequence[dict[str, Any]]) -> None:
    """Where a file for them is named."""
    if arguments.predictions is not None:
        lines = [json.dumps(one, ensure_ascii=False) for one in told]
        Path(arguments.predictions).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Asked:
    """An evaluation, read and checked.

    Attributes:
        examples: each with the row that it is of.
        nothing: the same after a prompt that says nothing of the row, where the options are calibrated by it.
        writer: where the model writes its answers.
    """

    adapter: ForeignAdapter | None
    examples: list[tuple[SourceRow, Example]]
    nothing: list[Example]
    objective: Objective
    writer: Writer | None


def read_evaluation(model: ModelArguments, arguments: EvaluateArguments, rows: list[SourceRow] | None = None) -> Asked:
    """Everything that needs no engine; raises what ``evaluate`` does.

    Args:
        rows: in the place of those that ``arguments`` say.
    """
    model_config, tokenizer = read_checkpoint(model.model)
    adapter = None
    if arguments.adapter is not None:
        fitting = adapted_model(model.model, model_config)
        adapter = read_given("adapter", arguments.adapter, arguments.adapter, fitting)
    _require_writable(arguments.predictions)
    named = named_data(arguments.task, arguments.dataset, arguments.dataset_config)
    wanted = arguments.objective or (named.task.objective if named.task else None)
    generation = arguments.generation or (None if arguments.objective else written_test(named.task, wanted))
    kind = encoder_kind(model_config, generation, arguments.task)
    _require_askable(arguments, is_masked(model_config), generation)
    if arguments.calibrated and adapter is not None and adapter.invocation:
        allowed = "false beside an activated adapter: a prompt that says nothing of the row does not activate it"
        raise ConfigError("calibrated", True, allowed)
    rows = _rows(named, arguments) if rows is None else rows
    longest = max_length_of(model_config, arguments.max_length, _virtual_tokens(adapter))
    chat = ChatRenderer(tokenizer, chat_settings(model))
    encoder = kind(tokenizer, longest, named.task, adapter.invocation if adapter else (), chat, generation)
    examples = encoder.encode_from(rows, arguments.on_bad_row)
    objective = generation.objective if generation else wanted or default_objective([one for _, one in examples])
    require_choices(objective, (len(example.options) for _, example in examples))
    nothing: list[Example] = []
    if arguments.calibrated:
        nothing = CalibrationEncoder(tokenizer, longest, named.task).encode_rows([row for row, _ in examples])
    return Asked(adapter, examples, nothing, objective, Writer.of(generation, tokenizer))


def _require_writable(predictions: str | None) -> None:
    """Raise ConfigError where they could not be written in the end."""
    if predictions is not None and (Path(predictions).is_dir() or not Path(predictions).parent.is_dir()):
        raise ConfigError("predictions", predictions, "a file to write, in a folder that is there")


def _require_askable(arguments: EvaluateArguments, masked: bool, generation: Generation | None) -> None:
    """Raise ConfigError for what a model or a task cannot be asked."""
    if arguments.calibrated and generation is not None:
        raise ConfigError("calibrated", True, "false where the model writes its answers")
    for name in ("num_demonstrations", "calibrated"):
        if masked and getattr(arguments, name):
            raise ConfigError(name, getattr(arguments, name), "nothing of a masked language model")


def measure_on(
    engine: MezoEngine, model: str, asked: Asked, arguments: EvaluateArguments
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What ``evaluate`` returns, and of each row its source and what was read or written."""
    adapter = asked.adapter
    invocation = adapter.invocation if adapter else ()
    planner = Planner("alora" if invocation else "prefix" if _virtual_tokens(adapter) else "lora", invocation)
    plans = [planner.plan(example) for _, example in asked.examples]
    scorer = Scorer(engine.handle, planner.scope, arguments.max_tokens_per_batch)
    point = _point(engine, model, adapter)
    measure: Measure = measure_of(engine.handle, scorer, asked.objective, asked.writer)
    if asked.nothing:
        measure = Calibrated(scorer, {id(plan): planner.plan(one) for plan, one in zip(plans, asked.nothing)})
    told: list[dict[str, Any]] = []
    metrics = drain(
        evaluation_passes(measure, plans, point, arguments.per_device_eval_batch_size, arguments.seed, told)
    )
    sources = [f"{row.source}:{row.line}" for row, _ in asked.examples]
    return {"examples": len(plans), **metrics}, [{"source": source, **one} for source, one in zip(sources, told)]


def _virtual_tokens(adapter: ForeignAdapter | None) -> int:
    return adapter.spec.virtual_tokens if isinstance(adapter, PrefixAdapter) else 0


def _rows(named: Named, arguments: EvaluateArguments) -> list[SourceRow]:
    if arguments.split is not None and not has_splits(named.path):
        raise ConfigError("split", arguments.split, f"none for {named.path}, which has no splits")
    rows = named.rows(arguments.split or (named.task.eval_split if named.task else "test"))
    if named.task is None:
        return rows[: arguments.rows]
    if has_splits(named.path):
        rows = permuted(rows, 0)
    return with_demonstrations(named, rows[: arguments.rows], arguments.num_demonstrations, arguments.on_bad_row)


def evaluation_engine(model: ModelArguments, adapter: ForeignAdapter | None, rank: Rank) -> MezoEngine:
    """One that has room for the adapter."""
    of_layers = adapter if isinstance(adapter, PeftAdapter) else None
    return MezoEngine(
        model.model,
        r=1 if of_layers is None else of_layers.r,
        target_modules=() if of_layers is None else of_layers.target_modules,
        num_slots=1,
        dtype=model.dtype,
        max_total_tokens=model.max_total_tokens,
        log_level="error",
        tp_size=model.tp_size,
        rank=rank,
    )


def _point(engine: MezoEngine, model: str, adapter: ForeignAdapter | None) -> Point:
    """Where the engine has what is evaluated."""
    if adapter is None:
        return BASE
    if isinstance(adapter, PrefixAdapter):
        return held_prefix(engine.handle, adapter)
    return _slot(engine, model, adapter).point


def _slot(engine: MezoEngine, model: str, adapter: PeftAdapter) -> Slot:
    """A slot of the engine that holds the adapter."""
    spec = adapter.spec(model)
    held = Adapter(spec, adapted_sites(engine.handle, spec.target_modules))
    for site, a, b in held.matrices():
        if site.path in adapter.matrices:  # in the other layers the adapter changes nothing
            for matrix, values in zip((a, b), adapter.matrices[site.path]):
                matrix.copy_(values)
    slot = Slot(engine.handle, spec, SlotLayout(engine.handle, held), "evaluated")
    slot.write(held.theta)
    return slot
