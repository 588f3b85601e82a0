"""The states of a job, and what can be done in which of them."""

from typing import Any, Literal, NamedTuple

from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import LIVE, JobStatus, StoredEvent, StoredJob, now

Action = Literal[
    "queue",
    "start",
    "succeed",
    "fail",
    "requeue",
    "hold",
    "release",
    "cancel",
    "pause",
    "resume",
    "append rows to",
    "publish",
    "evaluate",
    "update",
]


class Rule(NamedTuple):
    """``allowed``: the states that it is possible in. ``becomes``: the state that follows, None where it stays."""

    allowed: tuple[JobStatus, ...]
    becomes: JobStatus | None = None


RULES: dict[Action, Rule] = {
    "queue": Rule(("validating_files",), "queued"),
    "start": Rule(("queued",), "running"),
    "succeed": Rule(("running",), "succeeded"),
    "fail": Rule(("validating_files", "queued", "running"), "failed"),
    "requeue": Rule(("running",), "queued"),
    "hold": Rule(("validating_files", "queued", "running"), "paused"),
    "release": Rule(("paused",), "validating_files"),
    "cancel": Rule(LIVE, "cancelled"),
    "pause": Rule(("queued", "running"), "paused"),
    "resume": Rule(("paused",), "queued"),
    "append rows to": Rule(("queued", "running", "paused")),
    "publish": Rule(("running", "paused", "succeeded")),
    "evaluate": Rule(("paused", "succeeded")),
    "update": Rule(("paused", "succeeded")),
}


def require(job: StoredJob, action: Action) -> None:
    """Raise RequestError (400, invalid_state) unless ``action`` is possible now."""
    allowed = RULES[action].allowed
    if job.status not in allowed:
        message = f"cannot {action} a job that is {job.status}, only one that is {' or '.join(allowed)}"
        raise RequestError(400, message, None, "invalid_state")


def change(store: Store, job_id: str, action: Action, *events: StoredEvent, **changes: Any) -> StoredJob:
    """Take a job to its next state, with its events, in one transaction."""
    require(store.job(job_id), action)
    status = RULES[action].becomes
    if status not in LIVE:
        changes["finished_at"] = now()
    return store.update_job(job_id, *events, status=status, **changes)


def set_back(store: Store, job_id: str, error: RequestError) -> None:
    """Let a job that has lost the engine wait for its turn again, unless it has been stopped in the meantime."""
    if store.job(job_id).status in RULES["requeue"].allowed:
        change(
            store,
            job_id,
            "requeue",
            StoredEvent(job_id, f"The job waits: {error.message}", level="warn", data=error.to_dict()),
        )


def hold(store: Store, job_id: str, reason: RequestError) -> None:
    """Let a job wait that this server cannot train, unless it has been stopped in the meantime."""
    if store.job(job_id).status in RULES["hold"].allowed:
        again = "It is tried again when the server starts anew, and when it is resumed"
        message = f"The job is paused: {reason.message}. {again}"
        change(
            store,
            job_id,
            "hold",
            StoredEvent(job_id, message, level="warn", data=reason.to_dict()),
            error=reason.to_dict(),
        )


def release(store: Store, job_id: str) -> StoredJob:
    """Let a job that the server has held go on, if it is one that this server can train: that is found out from its
    files on."""
    return change(
        store, job_id, "release", StoredEvent(job_id, "The job goes on, and its files are validated again"), error=None
    )


def fail(store: Store, job_id: str, error: RequestError) -> None:
    """Let a job fail, unless it has been stopped in the meantime."""
    if store.job(job_id).status in RULES["fail"].allowed:
        event = StoredEvent(job_id, f"The job failed: {error.message}", level="error", data=error.to_dict())
        change(store, job_id, "fail", event, error=error.to_dict())
