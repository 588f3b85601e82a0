"""What a job on the engine does by itself, as rank 0 of the scheduler tells the HTTP process."""

from typing import Any, Union

from msgspec import Struct


class Event(Struct, tag=True, kw_only=True):
    """Of a job, whose adapter has taken ``step`` steps."""

    job_id: str
    step: int


class Started(Event):
    """The adapter is where the job's seed log ends."""


class StepTaken(Event):
    """A training step; of many in a second only a few are told.

    metrics: as in metrics.jsonl.
    """

    max_steps: int
    metrics: dict[str, Any]


class Evaluated(Event):
    """The adapter was scored on the validation file; metrics: ``eval_loss``, and ``eval_accuracy`` where there are
    options."""

    max_steps: int
    metrics: dict[str, Any]


class CheckpointSaved(Event):
    """directory: a PEFT folder."""

    directory: str


class Warned(Event):
    message: str


class Succeeded(Event):
    """``step`` is the last; the adapter that was kept is that of ``best_step``."""

    best_step: int
    metrics: dict[str, float]
    train_seconds: float
    trained_tokens: int


class Failed(Event):
    """The job has ended; code: "disk_full" where the disk took no more, else the name of the error."""

    message: str
    code: str


class PerturbationEvaluated(Event):
    """What ``EvaluatePerturbed`` asked for; losses: loss_plus, loss_minus and projected_grad, one number for each
    direction."""

    operation: str
    losses: dict[str, list[float]]


class PerturbationDropped(Event):
    """``EvaluatePerturbed`` was taken, and will not be answered."""

    operation: str
    message: str


class BaseModelReplaced(Struct, tag=True, kw_only=True):
    """Of no job: the engine has other weights now."""

    fingerprint: str


JobEvent = Union[
    Started,
    StepTaken,
    Evaluated,
    CheckpointSaved,
    Warned,
    Succeeded,
    Failed,
    PerturbationEvaluated,
    PerturbationDropped,
]
AnyEvent = Union[JobEvent, BaseModelReplaced]
