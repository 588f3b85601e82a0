"""First-order fine-tuning by Transformers and PEFT alone, with AdamW: what MeZO is compared with (arXiv 2305.17333,
FT; and the tuning of the head alone, its LP where options have several tokens)."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import torch

from sglang.srt.mezo.adapters.architectures import architecture_of, is_masked, task_type
from sglang.srt.mezo.adapters.families import family_of, require_modules
from sglang.srt.mezo.adapters.prefix_adapter import KVShape
from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.config import MOST_STEPS
from sglang.srt.mezo.core.errors import ConfigError, DivergedError
from sglang.srt.mezo.core.objective import SCORES, Objective, is_better, metric_name
from sglang.srt.mezo.core.optimizer import learning_rate_at
from sglang.srt.mezo.core.settings import LARGEST, require_settings, setting
from sglang.srt.mezo.data.splits import DataArguments, Splits, load_splits
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.experiments.reference import DTYPES, Reference, evaluate_examples, load_model
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import batch_loss
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments, chat_settings, encoder_kind, max_length_of
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.rewards import Writer
from sglang.srt.mezo.training.usable import require_choices, require_metric

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FirstOrderTuning = Literal["lora", "prefix", "full", "head"]

_LEARNING_RATES: dict[FirstOrderTuning, float] = {"lora": 1e-4, "prefix": 1e-2, "full": 1e-5, "head": 1e-4}
_MAX_GRAD_NORM = 1.0
"""Of all gradients together, as Transformers' Trainer has it, with which the paper's code fine-tunes."""


@dataclass(frozen=True)
class FirstOrderArguments:
    """Settings of a run with gradients; ConfigError names the field at fault."""

    tuning: FirstOrderTuning = setting(
        "lora", "lora, prefix: PEFT's; full: all parameters; head: the language-model head alone, untied from the rest."
    )
    r: int = setting(8, "Of lora: rank.", at_least=1)
    lora_alpha: float = setting(16, "Of lora: its output is scaled by lora_alpha / r.", above=0, at_most=LARGEST)
    target_modules: Optional[list[str]] = setting(None, "Of lora: modules to adapt; as a MeZO run by default.")
    num_virtual_tokens: int = setting(5, "Of prefix: its length.", at_least=1)
    learning_rate: float = setting(
        None,
        "At the peak of the schedule; 1e-4 by default, of prefix 1e-2, of full 1e-5.",
        above=0,
        at_most=LARGEST,
        follows=True,
    )
    lr_scheduler_type: Literal["linear", "constant"] = setting("linear", "Schedule after the warm-up.")
    warmup_steps: int = setting(0, "Steps of linear warm-up.", at_least=0, at_most=MOST_STEPS)
    weight_decay: float = setting(0.0, "Of matrices, as AdamW has it.", at_least=0, at_most=LARGEST)
    num_train_epochs: float = setting(5, "Passes over the training examples.", above=0, at_most=MOST_STEPS)
    max_steps: int = setting(-1, "Steps to run, in the place of num_train_epochs; below 1, none.", at_most=MOST_STEPS)
    eval_steps: Optional[int] = setting(
        None, "Steps between evaluations on the development set; an epoch by default, or all of max_steps.", at_least=1
    )
    per_device_train_batch_size: int = setting(8, "Examples in a batch.", at_least=1)
    per_device_eval_batch_size: int = setting(16, "Examples in an evaluation batch.", at_least=1)
    metric_for_best_model: Optional[str] = setting(
        None,
        "Of development rows, what the best state is chosen by: loss, or accuracy of a task with classes; loss by "
        "default.",
    )
    objective: Optional[Literal["classification", "completion"]] = setting(
        None, "Loss; the one that the data suggests by default."
    )
    seed: int = setting(
        42,
        "Of the initial adapter, of dropout and of the order of the data.",
        at_least=0,
        below=2**64,
        words="an unsigned 64-bit number",
    )

    def __post_init__(self):
        require_settings(self)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _LEARNING_RATES[self.tuning])
        if self.target_modules is not None and (self.tuning != "lora" or not self.target_modules):
            raise ConfigError("target_modules", self.target_modules, "modules, beside tuning=lora alone")

    def epoch_steps(self, num_examples: int) -> int:
        """Steps of a pass over so many examples; the last batch may be short."""
        return math.ceil(num_examples / self.per_device_train_batch_size)

    def steps_for(self, num_examples: int) -> tuple[int, int]:
        """Steps of a run, and those between evaluations."""
        epoch = self.epoch_steps(num_examples)
        if self.max_steps >= 1:
            return self.max_steps, self.eval_steps or self.max_steps
        return math.ceil(self.num_train_epochs * epoch), self.eval_steps or epoch


def first_order(
    model: ModelArguments, data: DataArguments, arguments: FirstOrderArguments, output_dir: str
) -> dict[str, Any]:
    """Train on the examples that a MeZO run has, and keep what does best on the development set: a PEFT folder
    ``adapter`` in ``output_dir``, or one of Transformers', ``model``.

    Raises:
        ConfigError, DataError: bad input, before training.
        DivergedError: a loss is infinite or not a number.

    Returns:
        What ``summary.json`` of a MeZO run has, where it means the same; ``evaluations`` on the development set, the
        ``losses`` of all steps, passes of training batches, and tokens that ran, without padding.
    """
    memory = MemoryMeter()
    with memory.phase("load"):
        config, tokenizer = read_checkpoint(model.model)
        dtype = _dtype(model, arguments)
        _require_tuning(config, arguments)
        virtual_tokens = arguments.num_virtual_tokens if arguments.tuning == "prefix" else 0
        splits = read_splits(model, data, config, tokenizer, arguments.objective, virtual_tokens)
        require_metric(arguments.metric_for_best_model, splits.objective)
        reference = Reference(load_model(model.model, config, dtype))
    judge = _Judge(splits, tokenizer, arguments)
    with memory.phase("evaluation"):
        zero_shot = judge.measure(reference)
    torch.manual_seed(arguments.seed)
    _make_trainable(reference, config, arguments)
    training = _Training(reference, splits, arguments, memory)
    training.run()
    with memory.phase("evaluation"):
        trained = judge.measure(reference)
    scores = {}
    for name in SCORES[judge.objective] or ("accuracy",):
        scores |= {f"zero_shot_{name}": zero_shot.get(name), name: trained.get(name)}
    return {
        **scores,
        "zero_shot_loss": zero_shot.get("loss"),
        "loss": trained.get("loss"),
        **training.summary(),
        **_save(reference, tokenizer, output_dir),
        "shared_examples": splits.shared,
        "peak_rss_bytes": memory.total.host,
        "peak_memory_bytes": memory.to_dict(),
    }


def read_splits(
    model: ModelArguments,
    data: DataArguments,
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    objective: Objective | None = None,
    virtual_tokens: int = 0,
) -> Splits:
    """The examples of a MeZO run of the same settings; raises ConfigError and DataError."""
    if data.streaming:
        raise ConfigError("streaming", True, "false: epochs need an end")
    if model.tp_size != 1:
        raise ConfigError("tp_size", model.tp_size, "1: Transformers runs in one process here")
    kind = encoder_kind(config, None, data.task)
    longest = max_length_of(config, data.max_length, virtual_tokens)
    chat = ChatRenderer(tokenizer, chat_settings(model))
    splits = load_splits(tokenizer, longest, (), data, chat, None, kind, objective)
    require_choices(splits.objective, (len(example.options) for example in splits.known))
    return splits


class _Judge:
    """What test examples are measured by: what is trained on, or what the model writes, where it is to."""

    def __init__(self, splits: Splits, tokenizer: "PreTrainedTokenizerBase", arguments: FirstOrderArguments):
        self._tests = splits.test
        self._writer = Writer.of(splits.written, tokenizer)
        self._batch_size = arguments.per_device_eval_batch_size
        self.objective: Objective = splits.written.objective if splits.written else splits.objective

    def measure(self, reference: Reference) -> dict[str, float]:
        """Nothing without examples."""
        if not self._tests:
            return {}
        return evaluate_examples(reference, self._tests, self.objective, self._batch_size, self._writer)


class _Training:
    """A run; ``summary`` tells of it then."""

    def __init__(self, reference: Reference, splits: Splits, arguments: FirstOrderArguments, memory: MemoryMeter):
        assert isinstance(splits.train, list), "streams are refused"
        self._reference = reference
        self._objective: Objective = splits.objective
        self._plans, self._dev = reference.plan(splits.train), splits.dev
        self._arguments = arguments
        self._memory = memory
        self.max_steps, self._eval_steps = arguments.steps_for(len(self._plans))
        self._trained = [one for one in reference.model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(_groups(self._trained, arguments.weight_decay))
        self._chosen_by = metric_name(arguments.metric_for_best_model)
        self._best: tuple[float, int, list[torch.Tensor]] | None = None
        self._losses: list[float] = []
        self._evaluations: list[dict[str, Any]] = []
        self._train_tokens, self._seconds = 0, 0.0

    def run(self) -> None:
        """To the last step; then the best state comes back."""
        for batch in islice(batches(len(self._plans), self._arguments), self.max_steps):
            started, tokens = time.perf_counter(), self._reference.tokens
            with self._memory.phase("step"):
                self._losses.append(self._step([self._plans[one] for one in batch]))
            self._seconds += time.perf_counter() - started
            self._train_tokens += self._reference.tokens - tokens
            if self._dev and (self._step_number % self._eval_steps == 0 or self._step_number == self.max_steps):
                with self._memory.phase("evaluation"):
                    self._evaluate()
        if self._best is not None:
            with torch.no_grad():
                for parameter, kept in zip(self._trained, self._best[2]):
                    parameter.copy_(kept)

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.max_steps,
            "best_step": self.max_steps if self._best is None else self._best[1],
            "train_seconds": self._seconds,
            "steps_per_second": self.max_steps / self._seconds,
            "forward_passes": self.max_steps,
            "backward_passes": self.max_steps,
            "train_tokens": self._train_tokens,
            "eval_tokens": self._reference.tokens - self._train_tokens,
            "num_trainable_params": sum(one.numel() for one in self._trained),
            "evaluations": self._evaluations,
            "losses": self._losses,
        }

    @property
    def _step_number(self) -> int:
        return len(self._losses)

    def _step(self, plans: Sequence[ExamplePlan]) -> float:
        """One update; returns the loss before it."""
        arguments = self._arguments
        self._reference.model.train()
        loss = training_loss(self._reference, plans, self._objective)
        self._require_finite(loss.item())
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, _MAX_GRAD_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(
                self._step_number,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type=arguments.lr_scheduler_type,
                warmup_steps=arguments.warmup_steps,
                max_steps=self.max_steps,
            )
        self._optimizer.step()
        return loss.item()

    def _evaluate(self) -> None:
        """On the development set; the best state is kept, the first of several."""
        batch_size = self._arguments.per_device_eval_batch_size
        metrics = evaluate_examples(self._reference, self._dev, self._objective, batch_size)
        self._require_finite(metrics["loss"])
        epoch = self._step_number / self._arguments.epoch_steps(len(self._plans))
        evaluation = {f"eval_{name}": value for name, value in metrics.items()}
        memory = self._memory.of("step")
        self._evaluations.append({"step": self._step_number, "epoch": epoch, **evaluation, **memory})
        value = evaluation[self._chosen_by]
        if is_better(self._chosen_by, value, None if self._best is None else self._best[0]):
            state = [one.detach().to("cpu", copy=True) for one in self._trained]
            self._best = (value, self._step_number, state)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            rate = self._arguments.learning_rate
            raise DivergedError(f"the loss after {self._step_number} steps is {loss}: lower learning_rate={rate:g}")


def training_loss(reference: Reference, plans: Sequence[ExamplePlan], objective: Objective) -> torch.Tensor:
    """Of a batch, as an engine has it (``scoring.readout.batch_loss``); float64 scalar with a gradient."""
    return batch_loss(plans, reference.values(plans, objective)[None], objective).mean[0]


def batches(num_examples: int, arguments: FirstOrderArguments) -> Iterator[list[int]]:
    """Examples of each step: one shuffled epoch after the other, the last batch of each as short as it comes."""
    generator, size = torch.Generator().manual_seed(arguments.seed), arguments.per_device_train_batch_size
    while True:
        order = torch.randperm(num_examples, generator=generator).tolist()
        yield from (order[start : start + size] for start in range(0, num_examples, size))


def _dtype(model: ModelArguments, arguments: FirstOrderArguments) -> torch.dtype:
    """Of what is not trained; what is, is float32."""
    if model.dtype == "auto":
        return torch.float32
    dtype = DTYPES[model.dtype]
    if dtype is torch.float16 or (arguments.tuning == "full" and dtype is not torch.float32):
        allowed = "auto or float32" + (", as all is trained" if arguments.tuning == "full" else ", or bfloat16")
        raise ConfigError("dtype", model.dtype, f"{allowed}: small gradients and steps are lost in 16 bits")
    return dtype


def _require_tuning(config: "PretrainedConfig", arguments: FirstOrderArguments) -> None:
    """Raise ConfigError for what a model cannot have."""
    require_modules(family_of(config), arguments.target_modules or ())
    if is_masked(config) and arguments.tuning in ("prefix", "head"):
        why = {"prefix": "PEFT has no prefixes", "head": "linear probing trains no more than the head"}
        allowed = f"lora or full for {architecture_of(config)}, as {why[arguments.tuning]}"
        raise ConfigError("tuning", arguments.tuning, allowed)


def _make_trainable(reference: Reference, config: "PretrainedConfig", arguments: FirstOrderArguments) -> None:
    """Put an adapter around the model, or choose among its parameters."""
    from peft import LoraConfig, get_peft_model

    if arguments.tuning == "lora":
        targets = arguments.target_modules or list(family_of(config).default_targets("lora"))
        alpha: Any = arguments.lora_alpha  # which need not be whole
        lora = LoraConfig(task_type=task_type(config), r=arguments.r, lora_alpha=alpha, target_modules=targets)
        reference.model = get_peft_model(reference.model, lora)
    elif arguments.tuning == "prefix":
        reference.model = _with_prefix(reference.model, config, arguments.num_virtual_tokens)
        reference.virtual_tokens = arguments.num_virtual_tokens
    elif arguments.tuning == "head":
        _untie_head(reference.model)


def _with_prefix(model: Any, config: "PretrainedConfig", num_virtual_tokens: int) -> Any:
    """Keys and values before the text; at first those that the model has for tokens drawn from its vocabulary, as in
    the paper's code, and not PEFT's random numbers."""
    from peft import PrefixTuningConfig, get_peft_model

    kv = KVShape.of(config)
    tokens = torch.randint(config.get_text_config().vocab_size, (1, num_virtual_tokens), device="cpu")
    with torch.no_grad():
        cache = model(input_ids=tokens.to(model.device), use_cache=True).past_key_values
    # [tokens, layers x (keys, values) x heads x head_dim]
    pairs = [part[0].transpose(0, 1) for layer in cache.layers for part in (layer.keys, layer.values)]
    prefix = torch.stack(pairs, dim=1).flatten(1)
    prefixed: Any = get_peft_model(
        model,
        PrefixTuningConfig(
            task_type=task_type(config),
            num_virtual_tokens=num_virtual_tokens,
            num_layers=kv.layers,
            token_dim=kv.heads * kv.head_dim,
            num_attention_heads=kv.heads,
        ),
    )
    prefixed.prompt_encoder["default"].load_prompt_embeddings(prefix)
    return prefixed


def _untie_head(model: Any) -> None:
    """Give the head a weight of its own, the only one that is trained."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().float().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and the others."""
    matrices, others = [], []
    for one in parameters:
        (matrices if one.dim() > 1 else others).append(one)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _save(reference: Reference, tokenizer: "PreTrainedTokenizerBase", output_dir: str) -> dict[str, str]:
    """Write what was trained; returns where."""
    from peft import PeftModel

    kind = "adapter" if isinstance(reference.model, PeftModel) else "model"
    target = Path(output_dir) / kind
    with atomic_directory(target) as partial:
        reference.model.save_pretrained(str(partial))
        if kind == "model":
            tokenizer.save_pretrained(partial)
    return {f"{kind}_dir": str(target)}
