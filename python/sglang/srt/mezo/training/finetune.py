"""A whole run, from a model's name and a data set's to an adapter and its accuracy: what the examples call."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Optional

import torch

from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.architectures import is_masked, longest_text, task_type
from sglang.srt.mezo.adapters.families import (
    family_of,
    model_modules,
    model_parameters,
    require_modules,
    require_tuning,
)
from sglang.srt.mezo.adapters.foreign import AdaptedModel
from sglang.srt.mezo.adapters.peft_adapter import ModelLayers
from sglang.srt.mezo.adapters.peft_prefix import PrefixModel
from sglang.srt.mezo.adapters.prefix_adapter import KVShape, PrefixSpec, positions_of
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig, Tuning
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.integrity import write_json
from sglang.srt.mezo.core.objective import SCORES, Generation, Objective
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.examples import Encoder, Example
from sglang.srt.mezo.data.invocation import AUTO, invocation_tokens
from sglang.srt.mezo.data.masked import MaskedEncoder
from sglang.srt.mezo.data.named import is_text
from sglang.srt.mezo.data.splits import DataArguments, Splits, load_splits
from sglang.srt.mezo.data.tasks import Task, get_task
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.engine.points import BASE
from sglang.srt.mezo.engine.ranks import FIRST, Rank, other_ranks
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.plots import plot_run
from sglang.srt.mezo.training.reporting import integrations
from sglang.srt.mezo.training.results import TrainResult
from sglang.srt.mezo.training.rewards import Writer, measure_of
from sglang.srt.mezo.training.run_directory import RunDirectory
from sglang.srt.mezo.training.source import require_length
from sglang.srt.mezo.training.start import read_start, settled
from sglang.srt.mezo.training.trained import Spec
from sglang.srt.mezo.training.trainer import MezoTrainer
from sglang.srt.mezo.training.usable import require_objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
Dtype = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]


@dataclass(frozen=True)
class ModelArguments:
    """The base model and the engine that runs it; ConfigError names the field at fault."""

    model: str = setting(help="Hub name or folder of the base model.")
    dtype: Dtype = setting("auto", "Weights and activations; float32 for the smallest zo_eps.")
    max_total_tokens: Optional[int] = setting(None, "KV tokens to keep; the machine's default if absent.", at_least=1)
    chat_template: Optional[str] = setting(None, "As the server's: a .jinja file, or a name that SGLang knows.")
    default_chat_template_kwargs: Optional[str] = setting(None, "As the server's: JSON for the chat template.")
    tp_size: int = setting(1, "Tensor-parallel ranks: processes, each with a part of the model.", at_least=1)

    def __post_init__(self):
        require_settings(self)


def finetune(model: ModelArguments, data: DataArguments, config: MezoConfig) -> dict[str, Any]:
    """Run ``config`` and write ``summary.json`` beside the adapter.

    Raises:
        ConfigError, DataError, CapacityError: bad input is found before training, and before the engine starts but for
            what only an engine can tell: whether its pools have room.
        RankError: one of several tensor-parallel ranks has died.

    Returns:
        The content of ``summary.json``.
    """
    with other_ranks(model.tp_size, _finetune, model, data, config) as rank:
        return _finetune(rank, model, data, config)


def _finetune(rank: Rank, model: ModelArguments, data: DataArguments, config: MezoConfig) -> dict[str, Any]:
    """The work of one rank; the summary is the first's."""
    memory = MemoryMeter()
    with memory.phase("load"):
        trainer, splits = open_trainer(model, data, config, rank)
    trainer.memory = memory
    judge = _judge(trainer, splits, model)
    with closing(trainer):
        with memory.phase("evaluation"):
            zero_shot = _zero_shot(trainer, splits.test, judge)
        result = trainer.train()
        with memory.phase("evaluation"):
            trained = trainer.evaluate(splits.test, judge) if splits.test else {}
        if not rank.is_first:
            return {}
        summary = _summary(trainer, result, zero_shot, trained, judge.objective) | {
            "shared_examples": splits.shared,
            "peak_rss_bytes": memory.total.host,
            "peak_memory_bytes": memory.to_dict(),
        }
    write_json(RunDirectory(config).path / "summary.json", summary)
    return summary


def open_trainer(
    model: ModelArguments, data: DataArguments, config: MezoConfig, rank: Rank = FIRST
) -> tuple[MezoTrainer, Splits]:
    """Read and check everything, then start an engine; raises what ``finetune`` does."""
    integrations(config.report_to)  # before an engine is started for nothing
    model_config, tokenizer = read_checkpoint(model.model)
    origin = None if config.init_from is None else read_start(config, adapted_model(model.model, model_config))
    config = settled(config, origin, tokenizer)
    require_tuning(model_config, config.tuning)
    config, target_modules = _for_model(model_config, config)
    if rank.is_first:  # which makes it
        RunDirectory(config).check()
    if data.streaming:
        require_length(config)
    invocation = chosen_invocation(tokenizer, data.task, config.tuning, config.invocation)
    kind = encoder_kind(model_config, config.generation, data.task)
    writer = Writer.of(config.generation, tokenizer)
    max_length = max_length_of(model_config, data.max_length, config.num_virtual_tokens or 0)
    chat = ChatRenderer(tokenizer, chat_settings(model))
    splits = load_splits(tokenizer, max_length, invocation, data, chat, config.generation, kind, config.objective)
    spec = _spec(config, model.model, model_config, splits.invocation, target_modules)
    objective = config.objective or splits.objective
    require_objective(config, objective, (len(example.options) for example in splits.known))
    new_tokens = splits.written.max_new_tokens if splits.written else config.max_new_tokens or 0
    longest = max(example.longest for example in splits.known) + new_tokens
    if model.max_total_tokens is not None and model.max_total_tokens < longest:
        raise ConfigError(
            "max_total_tokens", model.max_total_tokens, f"at least {longest}, the tokens of the longest example"
        )
    engine = MezoEngine(
        model.model,
        r=config.r or 1,
        target_modules=target_modules,
        num_slots=config.num_slots,
        dtype=model.dtype,
        max_total_tokens=model.max_total_tokens,
        log_level="error",
        tp_size=model.tp_size,
        rank=rank,
    )
    trainer = MezoTrainer(
        engine.handle, config, spec, splits.train, splits.dev, splits.objective, start=origin, writer=writer
    )
    return trainer, splits


def max_length_of(model_config: "PretrainedConfig", max_length: int | None, virtual_tokens: int = 0) -> int:
    """Most tokens of an example beside those of a prefix; ConfigError where the model has no room for them."""
    room = longest_text(model_config) - virtual_tokens
    if max_length is not None and max_length > room:
        raise ConfigError("max_length", max_length, f"at most {room}, what the model has room for")
    return max_length or room


def encoder_kind(model_config: "PretrainedConfig", generation: Generation | None, task: str | None) -> type[Encoder]:
    """What makes a model's examples of rows; ConfigError where the model cannot be asked so."""
    if not is_masked(model_config):
        return Encoder
    if generation is not None:
        raise ConfigError(
            "objective", generation.objective, "classification or accuracy: a masked language model writes nothing"
        )
    if is_text(task):
        raise ConfigError("task", task, "one with options: a masked language model does not go on with a text")
    return MaskedEncoder


def _for_model(model_config: "PretrainedConfig", config: MezoConfig) -> tuple[MezoConfig, tuple[str, ...]]:
    """``config`` with the positions that it leaves open and PEFT's "all-linear" spelt out, and the modules to adapt, of
    what adapts any."""
    family = family_of(model_config)
    if config.tuning == "full":
        return config, ()
    if config.tuning == "prefix":
        return replace(config, prefix_positions=positions_of(config, model_config)), ()
    targets = config.target_modules or list(family.default_targets(config.tuning))
    if targets == [ALL_LINEAR]:
        targets = sorted({site.path.rpartition(".")[2] for site in model_modules(model_config)})
        config = replace(config, target_modules=targets)
    require_modules(family, targets)
    if config.r > model_config.hidden_size:
        raise ConfigError("r", config.r, f"at most {model_config.hidden_size}, the width of the model")
    return config, tuple(targets)


def _spec(
    config: MezoConfig,
    model: str,
    model_config: "PretrainedConfig",
    invocation: Sequence[int],
    target_modules: Sequence[str],
) -> Spec:
    """What a run of ``config`` trains."""
    if config.tuning == "prefix":
        return PrefixSpec.of(config, model, model_config)
    if config.tuning == "full":
        spec = WeightsSpec(model, config.parameters)
        spec.chosen(model_parameters(model_config))  # before an engine is started for nothing
        return spec
    return AdapterSpec.of(config, model, invocation, target_modules, task_type(model_config))


def adapted_model(model: str, model_config: "PretrainedConfig") -> AdaptedModel:
    """What an adapter of the model has to fit, before there is an engine."""
    sites = {site.path: site for site in model_modules(model_config)}
    text = model_config.get_text_config()
    layers = ModelLayers(sites, sites.keys(), None, torch.float32, text.vocab_size)
    return AdaptedModel(
        layers,
        PrefixModel(
            model, KVShape.of(model_config), longest_text(model_config), torch.float32, task_type(model_config)
        ),
    )


def chat_settings(model: ModelArguments) -> ChatSettings:
    """What a server of the model with these flags would render by."""
    given = model.default_chat_template_kwargs
    try:
        kwargs = None if given is None else json.loads(given)
    except ValueError as error:
        raise ConfigError("default_chat_template_kwargs", given, f"a JSON object ({error})") from error
    if not isinstance(kwargs, dict | None):
        raise ConfigError("default_chat_template_kwargs", given, "a JSON object")
    return ChatSettings(model.model, chat_template=model.chat_template, default_chat_template_kwargs=kwargs)


def chosen_invocation(
    tokenizer: "PreTrainedTokenizerBase", task: str | None, tuning: Tuning, invocation: str | list[int] | None
) -> tuple[int, ...] | None:
    """Token ids from which an aLoRA adapter acts; none of what acts on every token, and None where the chat template
    has them."""
    given = None if invocation == AUTO else invocation
    if tuning != "alora":
        if given is not None:
            raise ConfigError("invocation", given, f"nothing, as what {tuning} trains acts on every token")
        return ()
    if is_text(task):
        raise ConfigError("tuning", tuning, "lora, full or prefix for whole texts, which have no invocation")
    if given is None:
        if not task:
            return None
        given = _own_invocation(get_task(task))
    if not given:
        raise ConfigError("invocation", given, "the text from which activated LoRA acts, such as ' It was'")
    return invocation_tokens(given, tokenizer)


def _own_invocation(task: Task) -> str:
    """A task's; ConfigError where its prompts end in several ways."""
    if task.invocation is None:
        raise ConfigError(
            "invocation",
            None,
            f"a text that all prompts have, or --tuning lora: those of {task.name} end in several ways",
        )
    return task.invocation


def _judge(trainer: MezoTrainer, splits: Splits, model: ModelArguments) -> Measure:
    """What test examples are measured by: what is trained on, or, where the model is trained on given answers and is to
    write its own, these."""
    if splits.written is None:
        return trainer.measure
    _, tokenizer = read_checkpoint(model.model)
    writer = Writer.of(splits.written, tokenizer)
    return measure_of(trainer.handle, trainer.scorer, splits.written.objective, writer)


def _zero_shot(trainer: MezoTrainer, tests: Sequence[Example], judge: Measure) -> dict[str, float]:
    """Loss and scores of the base model; nothing without examples."""
    if not tests:
        return {}
    config = trainer.config
    return drain(evaluation_passes(judge, trainer.plan(tests), BASE, config.per_device_eval_batch_size, config.seed))


def _summary(
    trainer: MezoTrainer,
    result: TrainResult,
    zero_shot: dict[str, float],
    trained: dict[str, float],
    objective: Objective,
) -> dict[str, Any]:
    stats = trainer.scorer.prefix_stats
    directory = RunDirectory(trainer.config)
    scores = {}
    for name in SCORES[objective] or ("accuracy",):
        scores |= {f"zero_shot_{name}": zero_shot.get(name), name: trained.get(f"eval_{name}")}
    return {
        **scores,
        "zero_shot_loss": zero_shot.get("loss"),
        "loss": trained.get("eval_loss"),
        "steps": result.global_step,
        "best_step": result.best_step,
        "train_seconds": result.train_seconds,
        "steps_per_second": result.steps_per_second,
        "engine_passes": trainer.handle.counted.passes,
        "tokens_computed": trainer.handle.counted.tokens,
        "prefix_tokens_reused": stats.reused,
        "prefix_tokens_total": stats.total,
        "model_dir" if trainer.config.tuning == "full" else "adapter_dir": str(directory.trained),
        "plot": plot_run(directory.path),
    }
