"""Versions of a job's adapter that are served, and its checkpoints: their folders, their names, their rows."""

import asyncio
import itertools
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.atomic import sync, sync_names
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.fit import Fit
from sglang.srt.mezo.service.jobs.threads import run_in
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import LIVE, ServedAdapter, StoredCheckpoint, StoredEvent, StoredJob

logger = logging.getLogger(__name__)

# Of a suffix. No ":", which SGLang splits a model's name at, and nothing that means something in a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_NOT_SERVED = "The model is not served"
_SERVED_AGAIN = "The model is served again"
_LAST_EVENTS = 100  # of a job, in which to look for what has been told last


class PublishedAdapters:
    """What the server answers to beside its base model."""

    def __init__(self, store: Store, client: EngineClient, fit: Fit):
        self._store = store
        self._client = client
        self._fit = fit
        self._unserved: dict[str, str] = {}  # name to reason

    def model_name(self, adapter_name: str) -> str:
        """What requests call an adapter."""
        return f"{self._client.served_model_name}:{adapter_name}"

    def served_model(self, job: StoredJob) -> str:
        """What requests call a job's adapter; RequestError where it has been deleted."""
        _require_name(job)
        return self.model_name(job.adapter_name)

    def name_for(self, job_id: str, suffix: str | None) -> str:
        """The name of a new job's adapter.

        Raises:
            RequestError: 400 for a suffix that cannot be a name, 409 for one that is taken.
        """
        if suffix is None:
            return f"ft-{job_id[-8:]}"
        if not _NAME.fullmatch(suffix):
            allowed = "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
            raise RequestError(400, f"suffix={suffix!r} is not allowed: {allowed}", "suffix", "invalid_value")
        self.require_free(suffix)
        return suffix

    def require_free(self, name: str) -> None:
        served = served_names.names(self._client.tokenizer_manager) | self._unserved.keys()
        holder = self.holder_of(name)
        if holder or any(other.partition(":")[0] == name for other in served):
            told = f"job {holder}" if holder else "an adapter that is served"
            raise RequestError(409, f"suffix={name!r} is not allowed: {told} has that name", "suffix", "name_taken")

    def holder_of(self, name: str) -> str | None:
        """The job whose adapter, or a checkpoint of it, has that name or is to have it."""
        adapter_name = name.partition(":")[0]
        jobs = (job.id for job in self._store.with_status(*LIVE, "succeeded") if job.adapter_name == adapter_name)
        left = (served.job_id for served in self._store.served() if served.name.partition(":")[0] == adapter_name)
        return next(itertools.chain(jobs, left), None)

    async def refresh(self) -> None:
        """Answer to the name of every adapter that this server can serve, and to no others; nothing is deleted.

        Adapters are loaded as they are asked for.
        """
        manager = self._client.tokenizer_manager
        answered, self._unserved = served_names.names(manager), {}
        for adapter in self._store.served():
            taken = adapter.name in answered and not self._is_own(adapter)
            reason = self._fit.of_adapter(self._store.job(adapter.job_id))
            if reason is None and adapter.directory.is_dir() and not taken:
                if adapter.name not in answered:
                    self._announce(adapter.name, adapter.directory)
                continue
            gone = "the name is that of another adapter, which is loaded" if taken else f"{adapter.directory} is gone"
            self._unserved[adapter.name] = reason.message if reason else gone
            logger.error("adapter %r is not served: %s", adapter.name, self._unserved[adapter.name])
            if adapter.name in answered and not taken:
                await self._client.run(served_names.withdraw(manager, adapter.name))

    def _is_own(self, adapter: ServedAdapter) -> bool:
        """Whether what the server answers with under an adapter's name is of the adapter's job."""
        folder = served_names.folder_of(self._client.tokenizer_manager, adapter.name)
        return folder is not None and self._store.job_directory(adapter.job_id) in Path(folder).parents

    def tell(self) -> None:
        """An event for each job whose adapters are not served, or are served again."""
        for job_id in dict.fromkeys(adapter.job_id for adapter in self._store.served()):
            job = self._store.job(job_id)
            reasons = (reason for name, reason in self._unserved.items() if name.partition(":")[0] == job.adapter_name)
            reason = next(reasons, None)
            message = _SERVED_AGAIN if reason is None else f"{_NOT_SERVED}: {reason}"
            told = (event.message for event in self._store.events(job_id, limit=_LAST_EVENTS).data)
            last = next((text for text in told if text.startswith((_SERVED_AGAIN, _NOT_SERVED))), _SERVED_AGAIN)
            if message != last:
                self._store.add_event(job_id, "info" if reason is None else "warn", message)

    def serves(self, name: str) -> bool:
        """Whether requests are answered under the name of a published adapter or a checkpoint."""
        return name not in self._unserved

    def require_served(self, job: StoredJob) -> None:
        """RequestError where this server cannot serve what a job has made."""
        if (reason := self._fit.of_adapter(job)) is not None:
            raise reason

    def add_checkpoint(self, job: StoredJob, step: int, folder: Path, metrics: dict[str, Any]) -> None:
        """Take note of a checkpoint and answer to its name; one that is known already stays as it is."""
        known = self._store.add_checkpoint(
            StoredCheckpoint(
                job.id,
                step,
                name=f"{job.adapter_name}:ckpt-step-{step}",
                directory=str(folder.relative_to(self._store.job_directory(job.id))),
                metrics={"step": step, **metrics},
            ),
            StoredEvent(job.id, f"Checkpoint created at step {step}"),
        )
        self._announce(known.name, folder)

    def _announce(self, name: str, directory: Path) -> None:
        self._client.post(served_names.announce, self._client.tokenizer_manager, name, directory)

    async def load_checkpoint(self, job: StoredJob, checkpoint: StoredCheckpoint) -> str:
        """Have a checkpoint loaded now, not when it is first asked for; returns what requests call it."""
        _require_name(job)
        if not served_names.is_loaded(self._client.tokenizer_manager, checkpoint.name):
            await self._publish(checkpoint.name, self._store.job_directory(job.id) / checkpoint.directory)
        return self.model_name(checkpoint.name)

    async def _publish(self, name: str, directory: Path, record: Callable[[], object] = lambda: None) -> None:
        here = asyncio.get_running_loop()

        async def recorded() -> None:
            record()

        await self._client.run(
            served_names.publish(self._client.tokenizer_manager, name, directory, lambda: run_in(here, recorded()))
        )

    async def add_version(
        self, job_id: str, write: Callable[[Path], Awaitable[Any]], record: Callable[[int], StoredJob]
    ) -> None:
        """Publish the next version of a job's adapter.

        Args:
            write: makes the PEFT folder.
            record: stores the version, before the server answers by it in the place of another.

        Raises:
            PublishError, OSError, sqlite3.Error: the version before is served as before.
        """
        job = self._store.job(job_id)
        _require_name(job)
        version = self._store.new_version(job_id)
        directory = self._store.version_directory(job_id, version)
        try:
            await write(directory)
            await asyncio.to_thread(sync, directory)  # before the version is on record, and the one before deleted
            await asyncio.to_thread(sync_names, directory.parent)
            await self._publish(job.adapter_name, directory, lambda: record(version))
        except Exception:
            self._store.delete_version(job_id, version)
            raise
        # The engine keeps the weights of a version that requests still use; its folder is not read again.
        await asyncio.to_thread(self._store.delete_version, job_id, job.version)

    async def delete(self, name: str) -> None:
        """Answer to a job's adapter and its checkpoints no more; the name is free again.

        Raises:
            NotFound: no job's adapter has that name.
            RequestError: it is a checkpoint's, or the job is still going.
        """
        adapter_name, _, checkpoint = name.partition(":")
        job = self._store.job_by_adapter(adapter_name)
        if checkpoint:
            message = f"model={name!r} cannot be deleted: a checkpoint goes with its model, {adapter_name!r}"
            raise RequestError(400, message, "model", "invalid_value")
        if job.status in LIVE:
            raise RequestError(
                409, f"model={name!r} cannot be deleted: its job {job.id} is {job.status}", "model", "invalid_state"
            )
        names = [adapter.name for adapter in self._store.served() if adapter.job_id == job.id]
        self._store.update_job(
            job.id, StoredEvent(job.id, f"Deleted model: {self.model_name(name)}"), adapter_name="", version=0
        )
        for served in names:
            self._unserved.pop(served, None)
            await self._client.run(served_names.withdraw(self._client.tokenizer_manager, served))
        await asyncio.to_thread(self._store.delete_version, job.id, job.version)


def _require_name(job: StoredJob) -> None:
    if not job.adapter_name:
        raise RequestError(409, f"the model of job {job.id} has been deleted", None, "model_deleted")
