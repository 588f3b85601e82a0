"""Files, jobs, events and checkpoints, and where their content lies on disk.

What a method has returned from survives the end of the process at any moment. The content of a file is on disk under its
final name before its row exists, and its row is gone before its content is: whatever has no row is swept at the next start.
"""

import fcntl
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from sglang.srt.mezo.errors import ConfigError
from sglang.srt.mezo.service.database import Database, Page, Where
from sglang.srt.mezo.service.errors import NotFound, RequestError
from sglang.srt.mezo.service.records import (
    LIVE,
    JobStatus,
    ServedAdapter,
    StoredCheckpoint,
    StoredEvent,
    StoredFile,
    StoredJob,
    new_id,
    now,
)

__all__ = [
    "LIVE", "JobStatus", "Page", "ServedAdapter", "Store", "StoredCheckpoint", "StoredEvent", "StoredFile", "StoredJob", "new_id", "now",
]  # fmt: skip


@dataclass(frozen=True)
class _Count:
    status: JobStatus
    jobs: int


class Store:
    """Thread-safe; every call is short. A directory has one store at a time.

    Attributes:
        listener: called when a job has been added or has changed its status.

    Raises:
        ConfigError: another server uses the directory, or one of another version has.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        self.listener: Callable[[], None] = lambda: None
        self._files = self.directory / "files"
        self._jobs = self.directory / "jobs"
        for folder in (self._files, self._jobs):
            folder.mkdir(parents=True, exist_ok=True)
        self._claim = _claimed(self.directory)
        try:
            self._database = Database(self.directory / "mezo.sqlite")
            self._sweep()
        except BaseException:
            self._claim.close()
            raise

    def close(self) -> None:
        self._database.close()
        self._claim.close()

    def _sweep(self) -> None:
        """Remove what a server that was stopped in the middle has left without a row."""
        known = {file.id for file in self._database.select(StoredFile, "SELECT * FROM files")}
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()
        for job in self._database.select(StoredJob, "SELECT * FROM jobs"):
            for path in (self.job_directory(job.id) / "adapters").glob("*"):
                if path != self.version_directory(job.id, job.version):
                    shutil.rmtree(path)

    # --- where things lie ------------------------------------------------------------------------------------------------

    def file_path(self, file_id: str) -> Path:
        """Where the content of a file lies, or will; ``file_id`` is one that the store has given out."""
        return self._files / file_id

    def job_directory(self, job_id: str) -> Path:
        return self._jobs / job_id

    def version_directory(self, job_id: str, version: int) -> Path:
        """PEFT folder of one published version of a job's adapter."""
        return self.job_directory(job_id) / "adapters" / f"v{version}"

    # --- files -----------------------------------------------------------------------------------------------------------

    def add_file(self, file: StoredFile) -> StoredFile:
        """Acknowledge a file whose content lies, synced, at ``file_path(file.id)``."""
        with self._database.transaction():
            self._database.insert("files", file)
        return file

    def file(self, file_id: str) -> StoredFile:
        return self._database.one(StoredFile, "files", "file", file_id)

    def files(
        self,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        where = Where() if purpose is None else Where("purpose = ?", (purpose,))
        return self._database.page(StoredFile, "files", "file", where, after, limit, order)

    def delete_file(self, file_id: str) -> None:
        """Raises RequestError (409, file_in_use) while a live job uses it."""
        with self._database.transaction():
            self.file(file_id)
            marks = ", ".join("?" * len(LIVE))
            users = f"SELECT * FROM jobs WHERE status IN ({marks}) AND ? IN (training_file, validation_file)"
            for job in self._database.select(StoredJob, users, (*LIVE, file_id)):
                raise RequestError(409, f"file {file_id!r} is in use by job {job.id!r}, which is {job.status}", "file_id", "file_in_use")
            self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.file_path(file_id).unlink(missing_ok=True)

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def add_job(self, job: StoredJob, *events: StoredEvent) -> StoredJob:
        """Raises NotFound where one of its files has been deleted."""
        with self._database.transaction():
            for param in ("training_file", "validation_file"):
                if (file_id := getattr(job, param)) is not None:
                    self._database.one(StoredFile, "files", "file", file_id, param)
            self._database.insert("jobs", job)
            self._database.insert("events", *events)
        self.listener()
        return job

    def job(self, job_id: str) -> StoredJob:
        return self._database.one(StoredJob, "jobs", "fine-tuning job", job_id)

    def jobs(self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None) -> Page[StoredJob]:
        """Newest first. metadata: pairs that a job must have; an empty mapping asks for jobs without metadata."""
        where = Where()
        if metadata is not None:
            has_pair = "EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?)"
            values = tuple(part for pair in metadata.items() for part in pair)
            where = Where(" AND ".join([has_pair] * len(metadata)) or "metadata = '{}'", values)
        return self._database.page(StoredJob, "jobs", "fine-tuning job", where, after, limit)

    def with_status(self, *statuses: JobStatus) -> list[StoredJob]:
        """Oldest first."""
        marks = ", ".join("?" * len(statuses))
        return self._database.select(StoredJob, f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", statuses)

    def job_counts(self) -> dict[JobStatus, int]:
        """How many jobs are in each state that has any."""
        counts = self._database.select(_Count, "SELECT status, COUNT(*) AS jobs FROM jobs GROUP BY status")
        return {count.status: count.jobs for count in counts}

    def oldest(self, status: JobStatus) -> StoredJob | None:
        jobs = self._database.select(StoredJob, "SELECT * FROM jobs WHERE status = ? ORDER BY number LIMIT 1", (status,))
        return jobs[0] if jobs else None

    def job_by_adapter(self, name: str) -> StoredJob:
        """The newest job whose adapter has that name."""
        jobs = self._database.select(StoredJob, "SELECT * FROM jobs WHERE adapter_name = ? ORDER BY number DESC LIMIT 1", (name,))
        if not name or not jobs:
            raise NotFound("model", name, "model")
        return jobs[0]

    def update_job(self, job_id: str, *events: StoredEvent, **changes: Any) -> StoredJob:
        """Change fields and add events in one transaction."""
        with self._database.transaction():
            job = replace(self.job(job_id), **changes)
            self._database.update("jobs", job_id, changes)
            self._database.insert("events", *events)
        if "status" in changes:
            self.listener()
        return job

    # --- what a job leaves -------------------------------------------------------------------------------------------------

    def add_event(
        self, job_id: str, level: str, message: str, type: str = "message", data: Mapping[str, Any] | None = None
    ) -> StoredEvent:
        event = StoredEvent(job_id, message, level, type, dict(data or {}))
        self.update_job(job_id, event)
        return event

    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Page[StoredEvent]:
        """Newest first."""
        self.job(job_id)
        return self._database.page(StoredEvent, "events", "event", Where("job_id = ?", (job_id,)), after, limit)

    def add_checkpoint(self, checkpoint: StoredCheckpoint, *events: StoredEvent) -> StoredCheckpoint:
        """A job has one checkpoint of a step: the first one stays."""
        with self._database.transaction():
            same = "SELECT * FROM checkpoints WHERE job_id = ? AND step = ?"
            if stored := self._database.select(StoredCheckpoint, same, (checkpoint.job_id, checkpoint.step)):
                return stored[0]
            self._database.insert("checkpoints", checkpoint)
            self._database.insert("events", *events)
        return checkpoint

    def add_checkpoint_metrics(self, job_id: str, step: int, metrics: Mapping[str, Any]) -> None:
        """What was measured at a step that may have a checkpoint."""
        with self._database.transaction():
            same = "SELECT * FROM checkpoints WHERE job_id = ? AND step = ?"
            for checkpoint in self._database.select(StoredCheckpoint, same, (job_id, step)):
                self._database.update("checkpoints", checkpoint.id, {"metrics": {**checkpoint.metrics, **metrics}})

    def checkpoint(self, checkpoint_id: str) -> StoredCheckpoint:
        return self._database.one(StoredCheckpoint, "checkpoints", "checkpoint", checkpoint_id, "checkpoint")

    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Page[StoredCheckpoint]:
        """Newest first."""
        self.job(job_id)
        return self._database.page(StoredCheckpoint, "checkpoints", "checkpoint", Where("job_id = ?", (job_id,)), after, limit)

    def served(self) -> list[ServedAdapter]:
        """Every name that the server answers to: published adapters and checkpoints, of models that were not deleted."""
        adapters = []
        for job in self._database.select(StoredJob, "SELECT * FROM jobs WHERE adapter_name != '' ORDER BY number"):
            if job.version:
                directory = self.version_directory(job.id, job.version)
                adapters.append(ServedAdapter(job.adapter_name, directory, job.id, job.finished_at or job.created_at))
            query = "SELECT * FROM checkpoints WHERE job_id = ? ORDER BY number"
            for checkpoint in self._database.select(StoredCheckpoint, query, (job.id,)):
                directory = self.job_directory(job.id) / checkpoint.directory
                adapters.append(ServedAdapter(checkpoint.name, directory, job.id, checkpoint.created_at))
        return adapters


def _claimed(directory: Path) -> IO[bytes]:
    """An open file whose lock says that the directory is in use; the system drops it with the process."""
    file = open(directory / "mezo.lock", "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError("--mezo-dir", str(directory), "a folder that no other server uses") from error
    return file
