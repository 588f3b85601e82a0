"""Loss and accuracy of an adapter, or of the base model, on the rows of a data set."""

from dataclasses import dataclass
from typing import Any, Optional

from sglang.srt.mezo.adapters.adapter import Adapter
from sglang.srt.mezo.adapters.architectures import longest_text
from sglang.srt.mezo.adapters.foreign import ForeignAdapter, read_foreign
from sglang.srt.mezo.adapters.peft_adapter import PeftAdapter
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.objective import ObjectiveSettings
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.data.examples import OnBadRow, default_objective
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.rows import has_splits
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.engine.layers import adapted_sites
from sglang.srt.mezo.engine.points import BASE, Point
from sglang.srt.mezo.engine.prefix_points import held_prefix
from sglang.srt.mezo.engine.ranks import Rank, other_ranks
from sglang.srt.mezo.engine.slots import Slot, SlotLayout
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments, adapted_model, chat_settings, encoder_kind
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
    rows: Optional[int] = setting(None, "Rows to use, from the first; all by default.", at_least=1)
    on_bad_row: OnBadRow = setting("raise", "raise: stop; skip: leave the row out.")
    max_tokens_per_batch: int = setting(4096, "Most tokens run through the model in one forward pass.", at_least=1)
    per_device_eval_batch_size: int = setting(64, "Examples in a batch.", at_least=1)
    seed: int = setting(42, "Of sampled completions.", at_least=0, below=2**64, words="an unsigned 64-bit number")


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
    model_config, tokenizer = read_checkpoint(model.model)
    adapter = (
        None if arguments.adapter is None else read_foreign(arguments.adapter, adapted_model(model.model, model_config))
    )
    named = named_data(arguments.task, arguments.dataset, arguments.dataset_config)
    if arguments.split is not None and not has_splits(named.path):
        raise ConfigError("split", arguments.split, f"none for {named.path}, which has no splits")
    rows = named.rows(arguments.split or (named.task.eval_split if named.task else "test"))[: arguments.rows]
    invocation = () if adapter is None else adapter.invocation
    chat = ChatRenderer(tokenizer, chat_settings(model))
    virtual_tokens = adapter.spec.virtual_tokens if isinstance(adapter, PrefixAdapter) else 0
    longest = longest_text(model_config) - virtual_tokens
    generation = arguments.generation
    writer = Writer.of(generation, tokenizer)
    kind = encoder_kind(model_config, generation, arguments.task)
    encoder = kind(tokenizer, longest, named.task, invocation, chat, generation)
    examples = encoder.encode_rows(rows, arguments.on_bad_row)
    objective = arguments.objective or default_objective(examples)
    require_choices(objective, (len(example.options) for example in examples))
    of_layers = adapter if isinstance(adapter, PeftAdapter) else None
    engine = MezoEngine(
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
    planner = Planner("alora" if invocation else "prefix" if virtual_tokens else "lora", invocation)
    plans = [planner.plan(example) for example in examples]
    scorer = Scorer(engine.handle, planner.scope, arguments.max_tokens_per_batch)
    point = _point(engine, model.model, adapter)
    measure = measure_of(engine.handle, scorer, objective, writer)
    passes = evaluation_passes(measure, plans, point, arguments.per_device_eval_batch_size, arguments.seed)
    return {"examples": len(examples), **drain(passes)}


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
