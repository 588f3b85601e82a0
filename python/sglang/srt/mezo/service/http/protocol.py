"""The wire: what clients send, and OpenAI's objects as they get them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from sglang.srt.mezo.service.http.endpoint import Wire
from sglang.srt.mezo.service.jobs.hyperparameters import reported
from sglang.srt.mezo.service.store.database import Page, Record
from sglang.srt.mezo.service.wire.records import GOES_ON, STARTED, StoredCheckpoint, StoredEvent, StoredFile, StoredJob

OWNER = "sglang-mezo"

Json = dict[str, Any]


class SupervisedMethod(Wire):
    """``hyperparameters`` is checked by name, with the engine's limits, in ``hyperparameters.resolve``."""

    hyperparameters: Json | None = None


class Method(Wire):
    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None


class CreateJob(Wire):
    """Body of ``POST /v1/fine_tuning/jobs``. ``hyperparameters`` is the older place for those of ``method``."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    integrations: list[Any] | None = None
    method: Method | None = None
    hyperparameters: Json | None = None


def page_object(page: Page[Record], to_wire: Callable[[Record], Json]) -> Json:
    return {"object": "list", "data": [to_wire(record) for record in page.data], "has_more": page.has_more}


def bounded_page_object(page: Page[Any], to_wire: Callable[[Any], Json]) -> Json:
    """One that says where it begins and ends, as OpenAI's of files and of checkpoints do."""
    ids = [record.id for record in page.data] or [None]
    return page_object(page, to_wire) | {"first_id": ids[0], "last_id": ids[-1]}


def file_object(file: StoredFile) -> Json:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": None,
        "expires_at": file.expires_at,
    }


def job_object(job: StoredJob, estimated_finish: int | None = None) -> Json:
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": estimated_finish,
        "status": job.status,
        "error": job.error,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "user_provided_suffix": job.suffix,
        "organization_id": OWNER,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "metadata": job.metadata or None,
        "integrations": [],
        "hyperparameters": job.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": reported(job.config, job.hyperparameters)}},
    }


def estimated_finish(job: StoredJob, events: Sequence[StoredEvent]) -> int | None:
    """Unix second at which a running job will be done, at the pace of ``events``; None where they do not tell one.

    Args:
        events: the job's, newest first; the metrics among them, back to its last start, tell how fast it goes, and how
            far.
    """
    here = itertools.takewhile(lambda event: event.message not in (STARTED, GOES_ON), events)
    metrics = [event for event in here if event.type == "metrics" and {"step", "max_steps"} <= event.data.keys()]
    if job.status != "running" or not metrics:
        return None
    newest, oldest = metrics[0], metrics[-1]
    steps = newest.data["step"] - oldest.data["step"]
    seconds = newest.created_at - oldest.created_at
    if steps <= 0 or seconds < 0:  # the clock has been set back
        return None
    seconds_a_step = seconds / steps
    return round(newest.created_at + (newest.data["max_steps"] - newest.data["step"]) * seconds_a_step)


def event_object(event: StoredEvent) -> Json:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or None,
    }


def checkpoint_object(checkpoint: StoredCheckpoint, served_model_name: str) -> Json:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": model_name(served_model_name, checkpoint.name),
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }


def checkpoint_page_object(page: Page[StoredCheckpoint], served_model_name: str) -> Json:
    return bounded_page_object(page, lambda checkpoint: checkpoint_object(checkpoint, served_model_name))


def model_name(served_model_name: str, adapter_name: str) -> str:
    """What a request names to get an adapter's answers: SGLang takes what follows the colon for the adapter."""
    return f"{served_model_name}:{adapter_name}"


def model_object(id: str, created: int, parent: str, context_length: int) -> Json:
    """A fine-tuned model, with the fields of SGLang's model cards."""
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": id,
        "parent": parent,
        "max_model_len": context_length,
    }
