"""Settings of a training run, with the names of Hugging Face's TrainingArguments, PEFT and the MeZO paper."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Optional, Union

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.estimator import SIGNS, Estimator, forward_passes
from sglang.srt.mezo.core.kinds import require_types
from sglang.srt.mezo.core.noise import Distribution
from sglang.srt.mezo.core.optimizer import Optim, SchedulerType, UpdateRule

Tuning = Literal["alora", "lora"]
Objective = Literal["classification", "completion", "language_modeling"]

LARGEST = 1e6
"""Of what multiplies weights, perturbations or steps: nothing is learned beyond it, and float32 has room for the
products."""
SMALLEST_ZO_EPS = 1e-12

_MOST = {
    **dict.fromkeys(
        (
            "max_steps",
            "num_train_epochs",
            "eval_steps",
            "logging_steps",
            "save_steps",
            "warmup_steps",
            "perturbation_interval",
            "echoes",
        ),
        10**9,
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "clip_projected_grad", "zo_eps", "lora_alpha", "adam_epsilon"), int(LARGEST)
    ),
}


def _setting(default: object, help: str):
    return field(default=default, metadata={"help": help})


def _follows(help: str):
    """A setting whose default depends on others: None until ``MezoConfig`` has settled it."""
    return field(default=None, metadata={"help": help, "follows": True})


@dataclass(frozen=True)
class MezoConfig:
    """Every setting of a run; validated on construction, ConfigError names the field at fault.

    What is left open never contradicts what is given: defaults that depend on other settings are settled by
        ``defaults``, and
    the fields, as ``to_dict`` and config.json, have what a run goes by.
    """

    output_dir: str = _setting("runs/mezo", "Run directory: adapter, checkpoints, seed log, metrics.")
    overwrite_output_dir: bool = _setting(False, "Delete an earlier run in output_dir first.")
    resume_from_checkpoint: bool = _setting(False, "Go on with the run in output_dir from its seed log.")

    init_from: Optional[str] = _setting(
        None,
        "PEFT folder of an adapter to go on from; tuning, invocation, r, lora_alpha and target_modules are its own.",
    )
    tuning: Tuning = _follows("alora, the default: the adapter acts from the invocation on; lora: on every token.")
    invocation: Optional[Union[str, list[int]]] = _setting(
        None,
        "Text that activates an aLoRA adapter, or auto: the chat template's generation prompt; "
        "the task's own by default, without a task auto.",
    )
    r: int = _follows("Rank of the adapter; 8 by default.")
    lora_alpha: float = _follows("The adapter's output is scaled by lora_alpha / r; 16 by default.")
    target_modules: Optional[list[str]] = _setting(None, "Modules to adapt; the attention projections by default.")

    objective: Optional[Objective] = _setting(None, "Loss; the one that the data suggests by default.")
    learning_rate: float = _follows(
        "Step size at the peak of the schedule; 0.02 by default, 0.001 where a step has one slope."
    )
    lr_scheduler_type: SchedulerType = _setting("linear", "Schedule after the warm-up.")
    warmup_steps: float = _setting(0, "Steps of linear warm-up; below 1, a share of max_steps.")
    optim: Optim = _setting("sgd", "What is done with the estimated gradient: sgd as in MeZO, or adamw.")
    momentum: float = _setting(0.0, "Momentum of sgd.")
    adam_beta1: float = _setting(0.9, "As in AdamW.")
    adam_beta2: float = _setting(0.999, "As in AdamW.")
    adam_epsilon: float = _setting(1e-8, "As in AdamW.")
    weight_decay: float = _setting(0.0, "Decoupled weight decay, as in the MeZO paper.")
    clip_projected_grad: Optional[float] = _setting(None, "Bound on the absolute value of each projected gradient.")

    zo_eps: float = _setting(1e-2, "Radius of the perturbation.")
    num_perturbations: int = _setting(8, "Directions a step; their gradient estimates are averaged.")
    estimator: Estimator = _follows(
        "What a direction's loss is compared with. leave_one_out: the mean of the other directions' losses; two_sided: "
        "the loss on the other side of theta, the default along one or two directions; one_sided: the loss at theta."
    )
    scale_by_loss_std: bool = _follows(
        "Divide loss differences by the losses' standard deviation, not by zo_eps (FZOO); "
        "the default where a step has more than one slope."
    )
    perturbation: Distribution = _setting(
        "rademacher", "Distribution of the directions' numbers, or of their factors'."
    )
    perturbation_rank: Optional[int] = _setting(
        None,
        "Rank of each matrix of a direction, a product of two factors (LOZO); full by default, "
        "2 where perturbation_interval is above 1.",
    )
    perturbation_interval: int = _setting(1, "Steps in a row whose low-rank directions have the same right factors.")

    max_steps: int = _setting(-1, "Steps to run; below 1, as many as num_train_epochs needs.")
    num_train_epochs: float = _setting(3.0, "Passes over the training examples when max_steps is not given.")
    per_device_train_batch_size: int = _setting(16, "Examples in a batch.")
    gradient_accumulation_steps: int = _setting(1, "Batches whose losses are averaged at the same directions.")
    per_device_eval_batch_size: int = _setting(64, "Examples in an evaluation batch.")
    max_tokens_per_batch: int = _setting(4096, "Most tokens run through the model in one forward pass.")
    echoes: int = _setting(
        32, "Passes over as many examples as the KV pool has room for, before the next, where it has not for all."
    )
    prefix_reuse: bool = _setting(True, "Reuse KV where that is exact; off only to check that it is.")

    eval_steps: int = _setting(50, "Steps between evaluations on the development set.")
    logging_steps: int = _setting(10, "Steps between lines in metrics.jsonl.")
    save_steps: int = _setting(
        0, "Steps between checkpoint-<step>/ directories; 0 for none. The seed log is always kept."
    )
    load_best_model_at_end: bool = _setting(True, "End with the adapter that did best on the development set.")
    metric_for_best_model: Optional[str] = _setting(
        None, "eval_loss, or a metric of the task such as eval_accuracy; eval_loss by default."
    )
    report_to: Literal["none", "tensorboard"] = _setting("none", "Where to send metrics besides metrics.jsonl.")
    disable_tqdm: bool = _setting(False, "No progress bar.")
    seed: int = _setting(42, "Seed of the initial adapter, the order of the data and the directions.")

    def __post_init__(self):
        open_fields = {
            field.name for field in fields(self) if field.metadata.get("follows") and getattr(self, field.name) is None
        }
        require_types(self, unset=open_fields)
        settled = defaults(self.num_perturbations, self.estimator, self.perturbation_interval)
        for name, value in (settled if self.init_from is not None else settled | NEW_ADAPTER).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in (
            "r",
            "num_perturbations",
            "perturbation_interval",
            "echoes",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "per_device_eval_batch_size",
            "max_tokens_per_batch",
            "eval_steps",
            "logging_steps",
        ):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("lora_alpha", "learning_rate", "zo_eps", "num_train_epochs", "adam_epsilon"):
            self._require(name, getattr(self, name) is None or 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("weight_decay", "warmup_steps", "save_steps"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "zero or more")
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
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
            "would be left",
        )
        self._require(
            "perturbation_rank",
            self.perturbation_rank is None or self.perturbation_rank >= 1,
            "at least 1, or none for full rank",
        )
        self._require(
            "clip_projected_grad", self.clip_projected_grad is None or self.clip_projected_grad > 0, "a positive number"
        )
        for name, most in _MOST.items():
            self._require(name, (getattr(self, name) or 0) <= most, f"at most {most}")
        self._require("zo_eps", self.zo_eps >= SMALLEST_ZO_EPS, f"at least {SMALLEST_ZO_EPS}")
        self._require(
            "target_modules", self.target_modules is None or len(self.target_modules) > 0, "at least one module"
        )
        self._require("seed", 0 <= self.seed < 2**64, "an unsigned 64-bit number")
        self._require(
            "resume_from_checkpoint",
            not (self.resume_from_checkpoint and self.overwrite_output_dir),
            "overwrite_output_dir would delete the run to resume",
        )

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(name, getattr(self, name), allowed)

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


NEW_ADAPTER: dict[str, Any] = {"tuning": "alora", "r": 8, "lora_alpha": 16}
"""What an adapter is that nobody describes. With ``init_from`` these stay None until the adapter has been read
(``start.settled``)."""


def defaults(num_perturbations: int, estimator: Estimator | None, perturbation_interval: int) -> dict[str, Any]:
    """What settings are that nobody gave, and that depend on others.

    Leaving one out of two directions leaves a single slope, as one direction does: nothing to scale by, and steps whose
        length
    is that of the slope, which are safe at the paper's learning rate only. Two sides of two directions are two slopes.
    """
    estimator = estimator or ("leave_one_out" if num_perturbations > 2 else "two_sided")
    scaled = _slopes(num_perturbations, estimator) > 1
    return {
        "estimator": estimator,
        "scale_by_loss_std": scaled,
        "learning_rate": 2e-2 if scaled else 1e-3,
        "perturbation_rank": 2 if perturbation_interval > 1 else None,
    }


def _slopes(num_perturbations: int, estimator: Estimator) -> int:
    """Independent slopes that the losses of a step tell of."""
    return num_perturbations - (1 if estimator == "leave_one_out" else 0)
