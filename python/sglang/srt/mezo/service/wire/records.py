"""What the service keeps about files, jobs, events and checkpoints. Times are seconds of the Unix epoch."""

import secrets
import time
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
LIVE: tuple[JobStatus, ...] = ("validating_files", "queued", "running", "paused")
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


STARTED, GOES_ON = "Fine-tuning job started", "Fine-tuning job goes on from its last step"
"""What a job's events say where it gets the engine."""
NOT_PUBLISHED = -1
"""Of an adapter that is not served as it is now. A step may come again: updates go on from the best one."""


def new_id(prefix: str) -> str:
    """``prefix`` and 24 random hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class StoredFile:
    """``id`` names the content on disk; ``filename`` is what the client called it, and never a path of ours.

    sha256: of the content, None for files of earlier versions. expires_at: None where it stays until it is deleted.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    status: str
    sha256: str | None = None
    expires_at: int | None = None


@dataclass(frozen=True)
class StoredJob:
    """A fine-tuning job.

    adapter_name: what the server answers to; "" once the model has been deleted. request: the body that created the
        job.
    hyperparameters: resolved n_epochs, batch_size, learning_rate_multiplier. config: fields of ``MezoConfig`` without
    ``output_dir``. error: code, message and param; of a paused job why the server keeps it waiting, None where a user
    does.
    version: of the adapter that is served, 0 for none. engine: the base model and the limits of the server that took
        the job, as ``fit`` has them.
    result_files: ids of the files that a succeeded job has left. published_step: ``step`` when the adapter was last
        published, ``NOT_PUBLISHED`` from the next update on, None where that is not known.
    """

    id: str
    created_at: int
    finished_at: int | None
    status: JobStatus
    model: str
    training_file: str
    validation_file: str | None
    seed: int
    suffix: str | None
    adapter_name: str
    metadata: dict[str, str]
    request: dict[str, Any]
    hyperparameters: dict[str, Any]
    config: dict[str, Any]
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: dict[str, Any] | None
    step: int
    version: int
    engine: dict[str, Any] = field(default_factory=dict)
    result_files: list[str] = field(default_factory=list)
    published_step: int | None = None

    @cached_property
    def settings(self) -> MezoConfig:
        """``config`` as this version understands it; raises ConfigError where it does not take it."""
        known = {one.name for one in fields(MezoConfig)}
        for name, value in self.config.items():
            if name not in known:
                raise ConfigError(name, value, "no setting of this version of sglang-mezo, which may be an earlier one")
        return MezoConfig(**self.config)


@dataclass(frozen=True)
class StoredEvent:
    """level: info, warn or error. type: message or metrics."""

    job_id: str
    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: new_id("ftevent-"))
    created_at: int = field(default_factory=now)


@dataclass(frozen=True)
class StoredCheckpoint:
    """An adapter of an earlier step: its name for requests, and its PEFT folder, relative to the job's directory."""

    job_id: str
    step: int
    name: str
    directory: str
    metrics: dict[str, Any]
    id: str = field(default_factory=lambda: new_id("ftckpt_"))
    created_at: int = field(default_factory=now)


@dataclass(frozen=True)
class ServedAdapter:
    """A name that the server answers to, and the PEFT folder behind it."""

    name: str
    directory: Path
    job_id: str
    created_at: int
