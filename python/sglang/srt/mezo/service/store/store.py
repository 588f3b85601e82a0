"""Files, jobs, events and checkpoints, and where their content lies on disk.

What a method has returned from survives the end of the process at any moment. Whatever may be deleted is marked first,
in the transaction that makes it superfluous, or by its name: ``.<id>.partial`` is an upload that nobody has been told
of. What a server that was stopped in the middle has left is put in order at the next start. What is there without a row
or a mark, as beside a database that was lost or is an earlier one, is never touched.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sglang.srt.mezo.core.integrity import digest_of_file
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.database import Database, Page, Where
from sglang.srt.mezo.service.store.deletions import VERSION, Deletions
from sglang.srt.mezo.service.store.upkeep import put_in_order
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError
from sglang.srt.mezo.service.wire.records import (
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
    "LIVE",
    "JobStatus",
    "Page",
    "ServedAdapter",
    "Store",
    "StoredCheckpoint",
    "StoredEvent",
    "StoredFile",
    "StoredJob",
    "new_id",
    "now",
]


logger = logging.getLogger(__name__)


_MARKS = ", ".join("?" * len(LIVE))
_EXPIRED = f"""
    COALESCE(expires_at <= ?, FALSE)
    AND NOT EXISTS (SELECT 1 FROM jobs WHERE status IN ({_MARKS}) AND files.id IN (training_file, validation_file))
"""


@dataclass(frozen=True)
class _Count:
    status: JobStatus
    jobs: int


class Store:
    """Thread-safe; every call is short. A directory has one store at a time.

    Attributes:
        listener: called when a job has been added or has changed its status.

    Raises:
        ConfigError: another server uses the directory, one of a later version has, or it cannot be used; nothing in it
            has been deleted then.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        self.listener: Callable[[], None] = lambda: None
        self._files = self.directory / folder.FILES
        self._jobs = self.directory / folder.JOBS
        folder.make(self.directory)
        self._claim = folder.claim(self.directory)
        try:
            self._database = Database(self.directory / folder.DATABASE)
            self._deletions = Deletions(self._database, self.directory)
            put_in_order(self._database, self._deletions, self.directory)
        except BaseException as error:
            self._claim.close()
            if isinstance(error, (OSError, sqlite3.Error)):
                raise folder.unusable(self.directory, f"a folder that can be read and written ({error})") from error
            raise

    def require_unlocked(self) -> None:
        """Raises StoreBusy where another process keeps the store from being changed, after some seconds."""
        self._database.require_unlocked()

    def stop_waiting(self) -> None:
        """For another process that has locked the database: what changes the store ends with an error, within
        seconds."""
        self._database.stop_waiting()

    def close(self) -> None:
        self._database.close()
        self._claim.close()

    # --- where things lie ---------------------------------------------------------------------------------------------

    def file_path(self, file_id: str) -> Path:
        """Where the content of a file lies; ``file_id`` is one that the store has given out."""
        return self._files / file_id

    def partial_path(self, file_id: str) -> Path:
        """Where the content of a new file is to lie when it is added."""
        return self._files / f".{file_id}.partial"

    def job_directory(self, job_id: str) -> Path:
        return self._jobs / job_id

    def version_directory(self, job_id: str, version: int) -> Path:
        """PEFT folder of one published version of a job's adapter."""
        return self.job_directory(job_id) / "adapters" / f"v{version}"

    # --- files --------------------------------------------------------------------------------------------------------

    def add_file(self, file: StoredFile) -> StoredFile:
        """Acknowledge a file whose content lies, synced, at ``partial_path(file.id)``."""
        partial, path = self.partial_path(file.id), self.file_path(file.id)
        with self._database.transaction():
            self._database.insert("files", file)
        try:
            _rename(partial, path)
        except BaseException:
            with self._database.transaction():
                self._database.execute("DELETE FROM files WHERE id = ?", (file.id,))
            raise
        return file

    def content(self, file: StoredFile, param: str | None = None) -> Path:
        """Where a file's content lies; raises RequestError, named by the field ``param``, where it is not what was
        uploaded."""
        path = self.file_path(file.id)
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            left = (
                "is gone"
                if size is None
                else f"has {size} bytes left of {file.bytes}"
                if size < file.bytes
                else f"has {size} bytes, not {file.bytes}"
            )
        elif file.sha256 is not None and digest_of_file(path) != file.sha256:
            left = "is not what was uploaded"
        else:
            return path
        raise RequestError(
            500,
            f"the content of file {file.id!r} ({file.filename}) {left} on the server's disk: upload it again",
            param,
            "file_lost",
        )

    def file(self, file_id: str, param: str | None = None) -> StoredFile:
        """One that has not expired; named by the field ``param`` where there is none."""
        file = self._database.one(StoredFile, "files", "file", file_id, param)
        if file.expires_at is not None and file.expires_at <= now() and not self._users(file_id):
            raise NotFound("file", file_id, param)
        return file

    def files(
        self,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        """Those that have not expired."""
        where = Where(f"NOT ({_EXPIRED})", (now(), *LIVE))
        if purpose is not None:
            where = Where(f"{where.condition} AND purpose = ?", (*where.values, purpose))
        return self._database.page(StoredFile, "files", "file", where, after, limit, order)

    def delete_expired(self) -> None:
        """Delete the files that have expired, but for those that a live job uses."""
        expired = self._database.select(StoredFile, f"SELECT * FROM files WHERE {_EXPIRED}", (now(), *LIVE))
        for file in expired:
            with suppress(RequestError):  # a job has come to use it
                self._delete_file(file.id)

    def _users(self, file_id: str) -> list[StoredJob]:
        """Live jobs that use a file."""
        query = f"SELECT * FROM jobs WHERE status IN ({_MARKS}) AND ? IN (training_file, validation_file)"
        return self._database.select(StoredJob, query, (*LIVE, file_id))

    def delete_file(self, file_id: str) -> None:
        """Raises RequestError (409, file_in_use) while a live job uses it."""
        self.file(file_id)
        self._delete_file(file_id)

    def _delete_file(self, file_id: str) -> None:
        with self._database.transaction():
            for job in self._users(file_id):
                raise RequestError(
                    409,
                    f"file {file_id!r} is in use by job {job.id!r}, which is {job.status}",
                    "file_id",
                    "file_in_use",
                )
            self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
            self._deletions.mark(self.file_path(file_id))
        self._deletions.carry_out(self.file_path(file_id))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def add_job(self, job: StoredJob, *events: StoredEvent) -> StoredJob:
        """Raises NotFound where one of its files has been deleted."""
        with self._database.transaction():
            for param in ("training_file", "validation_file"):
                if (file_id := getattr(job, param)) is not None:
                    self.file(file_id, param)
            self._database.insert("jobs", job)
            self._database.insert("events", *events)
        self.listener()
        return job

    def job(self, job_id: str) -> StoredJob:
        return self._database.one(StoredJob, "jobs", "fine-tuning job", job_id)

    def jobs(
        self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[StoredJob]:
        """Newest first. metadata: pairs that a job must have; an empty mapping asks for jobs without metadata."""
        where = Where()
        if metadata is not None:
            # Of a damaged row json_each would be an error of the whole query.
            pair = "SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?"
            has_pair = f"CASE WHEN json_valid(metadata) THEN EXISTS ({pair}) END"
            values = tuple(part for pair in metadata.items() for part in pair)
            where = Where(" AND ".join([has_pair] * len(metadata)) or "metadata = '{}'", values)
        return self._database.page(StoredJob, "jobs", "fine-tuning job", where, after, limit)

    def with_status(self, *statuses: JobStatus) -> list[StoredJob]:
        """Oldest first."""
        marks = ", ".join("?" * len(statuses))
        return self._database.select(
            StoredJob, f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", statuses
        )

    def job_counts(self) -> dict[JobStatus, int]:
        """How many jobs are in each state that has any."""
        counts = self._database.select(_Count, "SELECT status, COUNT(*) AS jobs FROM jobs GROUP BY status")
        return {count.status: count.jobs for count in counts}

    def oldest(self, status: JobStatus) -> StoredJob | None:
        jobs = self._database.select(
            StoredJob, "SELECT * FROM jobs WHERE status = ? ORDER BY number", (status,), limit=1
        )
        return jobs[0] if jobs else None

    def job_by_adapter(self, name: str) -> StoredJob:
        """The newest job whose adapter has that name."""
        jobs = self._database.select(
            StoredJob, "SELECT * FROM jobs WHERE adapter_name = ? ORDER BY number DESC", (name,), limit=1
        )
        if not name or not jobs:
            raise NotFound("model", name, "model")
        return jobs[0]

    def adopt(self, engine: Mapping[str, Any]) -> None:
        """Take jobs of a version that did not keep their base model and its limits for jobs of these."""
        with self._database.transaction():
            self._database.execute("UPDATE jobs SET engine = ? WHERE engine = '{}'", (json.dumps(engine),))

    def update_job(self, job_id: str, *events: StoredEvent, **changes: Any) -> StoredJob:
        """Change fields and add events in one transaction. Of the versions of its adapter the one before may then be
        deleted."""
        with self._database.transaction():
            before = self.job(job_id)
            job = replace(before, **changes)
            self._database.update("jobs", job_id, changes)
            if job.version != before.version:
                self._deletions.unmark(self.version_directory(job_id, job.version))
                if before.version:
                    self._deletions.mark(self.version_directory(job_id, before.version))
            self._database.insert("events", *events)
        if "status" in changes:
            self.listener()
        return job

    def new_version(self, job_id: str) -> int:
        """A number for the next version of a job's adapter. Until it is the job's ``version``, what lies in its
        folder may be deleted."""
        there = [
            int(match[1])
            for path in self.version_directory(job_id, 1).parent.glob("v*")
            if (match := VERSION.fullmatch(path.name))
        ]
        version = 1 + max([self.job(job_id).version, *there])
        with self._database.transaction():
            self._deletions.mark(self.version_directory(job_id, version))
        return version

    def delete_version(self, job_id: str, version: int) -> None:
        """Delete the folder of a version that is not, or no longer, the job's."""
        self._deletions.carry_out(self.version_directory(job_id, version))

    # --- what a job leaves --------------------------------------------------------------------------------------------

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
        return self._database.page(
            StoredCheckpoint, "checkpoints", "checkpoint", Where("job_id = ?", (job_id,)), after, limit
        )

    def served(self) -> list[ServedAdapter]:
        """Every name that the server answers to: published adapters and checkpoints, of models that were not
        deleted."""
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


def _rename(partial: Path, path: Path) -> None:
    """Give a file its name for good."""
    os.rename(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
