"""Settings of a training run, with the names of Hugging Face's TrainingArguments, PEFT and the MeZO paper."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, Optional, Union, get_args

from sglang.srt.mezo.core.estimator import SIGNS, Estimator, forward_passes
from sglang.srt.mezo.core.noise import Distribution
from sglang.srt.mezo.core.objective import ObjectiveSettings
from sglang.srt.mezo.core.optimizer import Optim, SchedulerType, UpdateRule
from sglang.srt.mezo.core.settings import LARGEST, Bounds, setting

AdapterTuning = Literal["alora", "lora"]
ServedTuning = Literal["alora", "lora", "prefix"]
"""What a server trains."""
Tuning = Literal["alora", "lora", "full", "prefix"]
PrefixPositions = Literal["shifted", "unshifted"]
MOST_STEPS = 10**9
SMALLEST_ZO_EPS = 1e-12
MOST_DIRECTIONS = Bounds(at_most=64)
"""Of a server's step, which has them all in memory; so many may the rank of one be, which is drawn in one piece."""
MOST_PASS_TOKENS = 8192
"""Of a job's forward pass."""


@dataclass(frozen=True)
class MezoConfig(ObjectiveSettings):
    """Every setting of a run; validated on construction, ConfigError names the field at fault.

    What is left open never contradicts what is given: defaults that depend on other settings are settled by
    ``defaults``, and the fields, as ``to_dict`` and config.json, have what a run goes by.
    """

    output_dir: str = setting(
        "runs/mezo",
        "Run directory: adapter, checkpoints, seed log, metrics; sglang-mezo train names one by the time.",
        resume="any",
    )
    overwrite_output_dir: bool = setting(False, "Delete an earlier run in output_dir first.", resume="any")
    resume_from_checkpoint: bool = setting(False, "Go on with the run in output_dir from its seed log.", resume="any")

    init_from: Optional[str] = setting(
        None,
        "PEFT folder of an adapter to go on from; tuning, invocation, r, lora_alpha and target_modules are its own, or "
        "num_virtual_tokens of a prefix, which is to be named as tuning.",
    )
    tuning: Tuning = setting(
        None,
        "alora, the default: the adapter acts from the invocation on; lora: on every token; full: the model's own "
        "parameters are trained; prefix: keys and values of virtual tokens before the text.",
        follows=True,
        job=True,
    )
    num_virtual_tokens: int = setting(
        None, "Of prefix tuning: length of the prefix; 5 by default.", at_least=1, follows=True, job=True
    )
    prefix_positions: Optional[PrefixPositions] = setting(
        None,
        "Of prefix tuning: positions of the text, counted from behind the prefix as in PEFT (shifted, the default), or "
        "as without it, as in the MeZO paper (unshifted, the one way of masked language models).",
    )
    parameters: Optional[str] = setting(
        None,
        "Of full tuning: regular expression that is found in the names, as Transformers has them, of the parameters to "
        "train; all by default.",
    )
    invocation: Optional[Union[str, list[int]]] = setting(
        None,
        "Text that activates an aLoRA adapter, or auto: the chat template's generation prompt; "
        "the task's own by default, without a task auto.",
        job=True,
    )
    r: int = setting(None, "Rank of the adapter; 8 by default.", at_least=1, follows=True, job=True)
    lora_alpha: float = setting(
        None,
        "The adapter's output is scaled by lora_alpha / r; 16 by default.",
        above=0,
        at_most=LARGEST,
        follows=True,
        job=True,
    )
    target_modules: Optional[list[str]] = setting(
        None, "Modules to adapt; the attention projections by default.", job=True
    )

    learning_rate: float = setting(
        None,
        "Step size at the peak of the schedule; 0.02 by default, 0.001 where a step has one slope; of full tuning 1e-3 "
        "and 1e-6, of prefixes 0.03 and 0.01.",
        above=0,
        at_most=LARGEST,
        follows=True,
        job=True,
    )
    lr_scheduler_type: SchedulerType = setting("linear", "Schedule after the warm-up.", job=True)
    warmup_steps: float = setting(
        0, "Steps of linear warm-up; below 1, a share of max_steps.", at_least=0, at_most=MOST_STEPS, job=True
    )
    optim: Optim = setting("sgd", "What is done with the estimated gradient: sgd as in MeZO, or adamw.", job=True)
    momentum: float = setting(0.0, "Momentum of sgd.", at_least=0, below=1, job=True)
    adam_beta1: float = setting(0.9, "As in AdamW.", at_least=0, below=1, job=True)
    adam_beta2: float = setting(0.999, "As in AdamW.", at_least=0, below=1, job=True)
    adam_epsilon: float = setting(1e-8, "As in AdamW.", above=0, at_most=LARGEST, job=True)
    weight_decay: float = setting(
        0.0,
        "Decoupled weight decay, as in the MeZO paper; of matrices, not of biases and norms.",
        at_least=0,
        at_most=LARGEST,
        job=True,
    )
    clip_projected_grad: Optional[float] = setting(
        None, "Bound on the absolute value of each projected gradient.", above=0, at_most=LARGEST, job=True
    )

    zo_eps: float = setting(
        None,
        "Radius of the perturbation; 0.01 by default, 0.001 of full tuning, 0.1 of prefixes.",
        above=0,
        at_least=SMALLEST_ZO_EPS,
        at_most=LARGEST,
        follows=True,
        job=True,
    )
    num_perturbations: int = setting(
        8, "Directions a step; their gradient estimates are averaged.", at_least=1, job=MOST_DIRECTIONS
    )
    estimator: Estimator = setting(
        None,
        "What a direction's loss is compared with. leave_one_out: the mean of the other directions' losses; two_sided: "
        "the loss on the other side of theta, the default along one or two directions; one_sided: the loss at theta.",
        follows=True,
        job=True,
    )
    scale_by_loss_std: bool = setting(
        None,
        "Divide loss differences by the losses' standard deviation, not by zo_eps (FZOO); "
        "the default where a step has more than one slope.",
        follows=True,
        job=True,
    )
    perturbation: Distribution = setting(
        "rademacher", "Distribution of the directions' numbers, or of their factors'.", job=True
    )
    perturbation_rank: Optional[int] = setting(
        None,
        "Rank of each matrix of a direction, a product of two factors (LOZO); full by default, "
        "2 where perturbation_interval is above 1.",
        at_least=1,
        words="at least 1, or none for full rank",
        job=MOST_DIRECTIONS,
    )
    perturbation_interval: int = setting(
        1,
        "Steps in a row whose low-rank directions have the same right factors.",
        at_least=1,
        at_most=MOST_STEPS,
        job=True,
    )

    max_steps: int = setting(
        -1,
        "Steps to run; below 1, as many as num_train_epochs needs.",
        at_most=MOST_STEPS,
        job=Bounds(at_least=1, at_most=MOST_STEPS),
        resume="any",
    )
    num_train_epochs: float = setting(
        3.0, "Passes over the training examples when max_steps is not given.", above=0, at_most=MOST_STEPS, resume="any"
    )
    per_device_train_batch_size: int = setting(16, "Examples in a batch.", at_least=1)
    gradient_accumulation_steps: int = setting(
        1, "Batches that are pooled at the same directions, as if they were one.", at_least=1, job=True
    )
    per_device_eval_batch_size: int = setting(64, "Examples in an evaluation batch.", at_least=1, resume="any")
    max_tokens_per_batch: int = setting(
        4096,
        "Most tokens run through the model in one forward pass.",
        at_least=1,
        job=Bounds(at_least=1, at_most=MOST_PASS_TOKENS),
    )
    echoes: int = setting(
        32,
        "Passes over as many examples as the KV pool has room for, before the next, where it has not for all.",
        at_least=1,
        at_most=MOST_STEPS,
        job=True,
    )
    prefix_reuse: bool = setting(True, "Reuse KV where that is exact; off only to check that it is.")

    eval_steps: int = setting(
        50, "Steps between evaluations on the development set.", at_least=1, at_most=MOST_STEPS, job=True
    )
    logging_steps: int = setting(
        10, "Steps between lines in metrics.jsonl.", at_least=1, at_most=MOST_STEPS, job=True, resume="any"
    )
    save_steps: int = setting(
        0,
        "Steps between checkpoint-<step>/ directories; 0 for none. The seed log is always kept.",
        at_least=0,
        at_most=MOST_STEPS,
        job=True,
        resume="any",
    )
    load_best_model_at_end: bool = setting(True, "End with the adapter that did best on the development set.", job=True)
    metric_for_best_model: Optional[str] = setting(
        None,
        "loss, or a metric of the task such as accuracy, with or without eval_ before it; eval_loss by default.",
        job=True,
    )
    report_to: Union[list[str], str] = setting(
        "none",
        "Where to send metrics besides metrics.jsonl, by Transformers' callbacks: tensorboard, wandb, trackio, mlflow, "
        "...; all that are installed, or none.",
        resume="any",
    )
    disable_tqdm: bool = setting(False, "No progress bar.", resume="any")
    seed: int = setting(
        42,
        "Seed of the initial adapter, the order of the data and the directions.",
        at_least=0,
        below=2**64,
        words="an unsigned 64-bit number",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.init_from is None:
            self._settle({"tuning": "alora"})
            self._settle(_NEW.get(self.tuning, NEW_ADAPTER))
        self._settle(defaults(self.tuning, self.num_perturbations, self.estimator, self.perturbation_interval))
        for name, tunings in _OF_TUNING.items():
            belongs = self.tuning is None or self.tuning in tunings
            self._require(name, belongs or getattr(self, name) is None, f"nothing beside tuning={self.tuning}")
        self._require("parameters", _is_pattern(self.parameters), "a regular expression")
        self._require("momentum", self.momentum == 0 or self.optim == "sgd", "0 beside adamw, which has adam_beta1")
        self._require(
            "estimator",
            self.estimator != "leave_one_out" or self.num_perturbations > 1,
            "two_sided or one_sided along one direction, which has no others",
        )
        self._require(
            "scale_by_loss_std",
            not self.scale_by_loss_std or _slopes(self.num_perturbations, self.estimator) > 1,
            f"false along {self.num_perturbations} direction(s) with {self.estimator}, where only signs of slopes "
            "would "
            "be left",
        )
        self._require(
            "target_modules", self.target_modules is None or len(self.target_modules) > 0, "at least one module"
        )
        self._require(
            "resume_from_checkpoint",
            not (self.resume_from_checkpoint and self.overwrite_output_dir),
            "overwrite_output_dir would delete the run to resume",
        )

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def update_rule(self) -> UpdateRule:
        return UpdateRule(
            self.perturbation,
            self.perturbation_rank,
            self.weight_decay,
            self.optim,
            self.momentum,
            self.adam_beta1,
            self.adam_beta2,
            self.adam_epsilon,
        )

    @property
    def num_slots(self) -> int:
        """Adapter slots in which all directions of a step are scored at once: theta itself, and one or two for each
        direction."""
        return 1 + self.num_perturbations * len(SIGNS[self.estimator])

    @property
    def forward_passes(self) -> int:
        """Adapters that a step evaluates its batch under."""
        return forward_passes(self.estimator, self.num_perturbations)

    def steps_for(self, num_examples: int) -> int:
        """Steps that a run takes over ``num_examples`` training examples."""
        if self.max_steps >= 1:
            return self.max_steps
        return max(1, round(self.num_train_epochs * num_examples / self.train_batch_size))

    def warmup_steps_of(self, max_steps: int) -> int:
        return round(self.warmup_steps * max_steps) if self.warmup_steps < 1 else round(self.warmup_steps)

    def to_dict(self) -> dict:
        return asdict(self)


_OF_ADAPTERS: tuple[Tuning, ...] = get_args(AdapterTuning)
_OF_TUNING: dict[str, tuple[Tuning, ...]] = {
    "init_from": get_args(ServedTuning),
    "invocation": _OF_ADAPTERS,
    "r": _OF_ADAPTERS,
    "lora_alpha": _OF_ADAPTERS,
    "target_modules": _OF_ADAPTERS,
    "num_virtual_tokens": ("prefix",),
    "prefix_positions": ("prefix",),
    "parameters": ("full",),
}
"""Settings that only some ways of tuning have."""

NEW_ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16}
"""What an adapter is that nobody describes. With ``init_from`` these stay None, and ``tuning`` too, until the adapter
has been read (``start.settled``)."""
_NEW: dict[Tuning, dict[str, Any]] = {"full": {}, "prefix": {"num_virtual_tokens": 5}}
"""The same of what is no adapter of layers."""


def defaults(
    tuning: Tuning | None, num_perturbations: int, estimator: Estimator | None, perturbation_interval: int
) -> dict[str, Any]:
    """What settings are that nobody gave, and that depend on others.

    Leaving one out of two directions leaves a single slope, as one direction does: nothing to scale by, and steps whose
    length is that of the slope, which are safe at the paper's learning rate only. Two sides of two directions are two
    slopes.
    """
    estimator = estimator or ("leave_one_out" if num_perturbations > 2 else "two_sided")
    scaled = _slopes(num_perturbations, estimator) > 1
    return {
        "estimator": estimator,
        "scale_by_loss_std": scaled,
        "learning_rate": _LEARNING_RATES.get(tuning or "lora", _LEARNING_RATES["lora"])[scaled],
        "zo_eps": {"full": 1e-3, "prefix": 1e-1}.get(tuning or "lora", 1e-2),
        "perturbation_rank": 2 if perturbation_interval > 1 else None,
    }


# Where a step has one slope, and where more.
_LEARNING_RATES = {"lora": (1e-3, 2e-2), "full": (1e-6, 1e-3), "prefix": (1e-2, 3e-2)}


def _is_pattern(text: str | None) -> bool:
    try:
        re.compile(text or "")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _slopes(num_perturbations: int, estimator: Estimator) -> int:
    """Independent slopes that the losses of a step tell of."""
    return num_perturbations - (1 if estimator == "leave_one_out" else 0)
