"""Queued jobs, one after the other: each gets the engine until it has ended or is stopped."""

import asyncio
import logging
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.integrity import digest_of_file
from sglang.srt.mezo.core.objective import SCORE_METRICS
from sglang.srt.mezo.data.examples import count_shared
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.job_runs import JobRuns, RunData
from sglang.srt.mezo.service.jobs.published import PublishedAdapters
from sglang.srt.mezo.service.jobs.results import FILENAME, PURPOSE, write_results
from sglang.srt.mezo.service.jobs.session import Last, Sessions, TrainingSession
from sglang.srt.mezo.service.jobs.states import change
from sglang.srt.mezo.service.jobs.tokenising import Tokenising
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import DiskFull, EngineRefused, NotFound, RequestError
from sglang.srt.mezo.service.wire.events import CheckpointSaved, Evaluated, Failed, JobEvent, Started, StepTaken, Warned
from sglang.srt.mezo.service.wire.messages import AppendExamples
from sglang.srt.mezo.service.wire.packed import pack
from sglang.srt.mezo.service.wire.records import GOES_ON, STARTED, StoredEvent, StoredFile, StoredJob, now

logger = logging.getLogger(__name__)

_CHECKPOINT_METRICS = {
    "eval_loss": ("valid_loss", "full_valid_loss"),
    "eval_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}
"""Ours to OpenAI's: the validation file is used as a whole each time. Accuracy is the share of its rows whose right
option is the likeliest."""


class Training:
    """Trains jobs and keeps record of what they report.

    Args:
        state: held by whoever takes a job to another state in more than one step.
    """

    def __init__(
        self,
        store: Store,
        client: EngineClient,
        sessions: Sessions,
        tokenising: Tokenising,
        runs: JobRuns,
        published: PublishedAdapters,
        state_lock: asyncio.Lock,
    ):
        self.current: str | None = None
        """The job that has the engine, or is the next to get it."""
        self._store = store
        self._client = client
        self._sessions = sessions
        self._tokenising = tokenising
        self._runs = runs
        self._published = published
        self._state_lock = state_lock

    async def train(self, job: StoredJob) -> None:
        """Run a queued job until it ends or is stopped. Its errors are the caller's to record."""
        self.current = job.id
        try:
            async with self._sessions.lock:
                if self._sessions.current is not None:
                    await self._sessions.stop(self._sessions.current.job_id)
                session = await self._start(job.id)
                if session is not None:
                    await self._see_through(session)
        finally:
            self.current = None

    async def _start(self, job_id: str) -> TrainingSession | None:
        """None where the job has been stopped in the meantime."""
        files = await self._tokenising.examples(self._store.job(job_id))
        if files is None or self._store.job(job_id).status != "queued":
            return None
        data = await asyncio.to_thread(self._runs.prepare, self._store.job(job_id), files)
        try:
            for split in files.counts:
                await self._sessions.load(job_id, split, data.parts(split))
            async with self._state_lock:
                if self._store.job(job_id).status == "queued":
                    return await self._open(job_id, data)
        except Exception:
            await self._sessions.stop(job_id)
            raise
        await self._sessions.stop(job_id)
        return None

    async def _open(self, job_id: str, data: RunData) -> TrainingSession:
        begun = self._runs.has_begun(job_id)
        job = change(self._store, job_id, "start", StoredEvent(job_id, GOES_ON if begun else STARTED))
        for step, path in self._runs.checkpoints(job_id):  # of which a server that was stopped has not heard
            self._published.add_checkpoint(job, step, path, {})
        command = await asyncio.to_thread(self._runs.start_command, job, data.portions)
        return await self._sessions.open(TrainingSession(command, data.files, len(data.appended)))

    async def _see_through(self, session: TrainingSession) -> None:
        try:
            if await session.started():
                async with self._state_lock:
                    await self.send_appended(session)
            last = await session.ended()
            async with self._state_lock:
                if self._store.job(session.job_id).status == "running":
                    await self._finish(last)
        except Exception:
            await self._sessions.stop(session.job_id)
            raise

    async def send_appended(self, session: TrainingSession) -> dict[Path, int | EngineRefused]:
        """Give the engine all appended rows that it does not have, in their order. Called with ``state_lock`` held.

        Raises:
            DiskFull: the engine could not keep record of them.

        Returns:
            For every file the first step that draws from it, or why the engine does not take it; it is dropped then.
        """
        answers: dict[Path, int | EngineRefused] = {}
        job = self._store.job(session.job_id)
        for path in self._runs.appended(job.id).files()[session.applied :]:
            if not session.has_started:
                break
            examples = await asyncio.to_thread(self._runs.encode_appended, job, path)
            try:
                result = await self._client.call(AppendExamples(job_id=job.id, examples=pack(examples)))
            except EngineRefused as error:
                answers[path] = error
                self._runs.appended(job.id).drop(path)
                self._tell(job.id, "error", f"{len(examples)} appended examples were not taken: {error.message}")
            else:
                session.applied += 1
                answers[path] = result["step"]
                message = f"{len(examples)} appended examples are drawn from step {result['step']} on"
                self._tell(job.id, "info", message, {"step": result["step"], "examples": len(examples)})
                if shared := await asyncio.to_thread(count_shared, session.files.examples("eval"), examples):
                    warning = shared_examples(job.id, shared, session.files.counts["eval"], "among the appended ones")
                    self._tell(job.id, warning.level, warning.message, warning.data)
        return answers

    def _tell(self, job_id: str, level: str, message: str, data: dict[str, Any] | None = None) -> None:
        """An event about what has been done already; without it, it is done all the same."""
        try:
            self._store.add_event(job_id, level, message, data=data)
        except sqlite3.Error as error:
            logger.error("an event of job %s was not recorded (%s): %s", job_id, error, message)

    # --- what a job reports -------------------------------------------------------------------------------------------

    def on_event(self, event: JobEvent) -> None:
        """Keep record of progress, as long as the job is running."""
        session = self._sessions.of(event.job_id)
        if not isinstance(session, TrainingSession) or session.has_ended:
            return
        if self._store.job(event.job_id).status != "running":
            return
        job_id, step = event.job_id, event.step
        match event:
            case Started():
                self._store.update_job(job_id, step=step)
            case StepTaken(metrics=metrics):
                session.train_loss = metrics["loss"]
                told = f"training loss={metrics['loss']:.4f}"
                self._keep_metrics(event, told, {"step": step, "train_loss": metrics["loss"]})
            case Evaluated(metrics=metrics):
                scores = (f", {name}={metrics[ours]:.4f}" for ours, name in SCORE_METRICS.items() if ours in metrics)
                told = f"validation loss={metrics['eval_loss']:.4f}{''.join(scores)}"
                self._keep_metrics(event, told, {"step": step, "valid_loss": metrics["eval_loss"]})
                theirs = {
                    name: metrics[ours]
                    for ours, names in _CHECKPOINT_METRICS.items()
                    if ours in metrics
                    for name in names
                }
                self._store.add_checkpoint_metrics(job_id, step, theirs)  # which is made before its step is evaluated
            case CheckpointSaved(directory=directory):
                self._store.update_job(job_id, step=step)
                theirs = {} if session.train_loss is None else {"train_loss": session.train_loss}
                self._published.add_checkpoint(self._store.job(job_id), step, Path(directory), theirs)
            case Warned(message=message):
                self._store.add_event(job_id, "warn", message)

    def _keep_metrics(self, event: StepTaken | Evaluated, told: str, data: dict[str, Any]) -> None:
        """As an event of the job, whose data has OpenAI's names and ours."""
        message = f"Step {event.step}/{event.max_steps}: {told}"
        data = {**data, "max_steps": event.max_steps, **event.metrics}
        self._store.update_job(
            event.job_id, StoredEvent(event.job_id, message, type="metrics", data=data), step=event.step
        )

    async def _finish(self, event: Last) -> None:
        """Of a job that is still running. Where it was stopped (None), the state that it was stopped for has not
        been stored."""
        if event is None:
            raise DiskFull("it was stopped, and that could not be stored")
        if isinstance(event, Failed):
            raise (
                DiskFull(event.message)
                if event.code == "disk_full"
                else RequestError(400, event.message, None, event.code)
            )
        for step, path in self._runs.checkpoints(event.job_id):
            self._published.add_checkpoint(self._store.job(event.job_id), step, path, {})
        name = self._published.model_name(self._store.job(event.job_id).adapter_name)

        async def copy(directory: Path) -> None:
            await asyncio.to_thread(_copy, self._runs.directory(event.job_id) / "adapter", directory)

        results = await self._keep_results(event.job_id)

        def record(version: int) -> StoredJob:
            return change(
                self._store,
                event.job_id,
                "succeed",
                StoredEvent(event.job_id, f"New fine-tuned model created: {name}", data={"best_step": event.best_step}),
                StoredEvent(event.job_id, "The job has successfully completed"),
                fine_tuned_model=name,
                trained_tokens=event.trained_tokens,
                step=event.step,
                version=version,
                published_step=event.step,
                result_files=[results],
            )

        try:
            await self._published.add_version(event.job_id, copy, record)
        except BaseException:
            self._store.delete_file(results)
            raise

    async def _keep_results(self, job_id: str) -> str:
        """Write the metrics of a job's steps into a file, which is its user's then; returns its id, the same for the
        same job."""
        file_id = folder.FILE_PREFIX + job_id.removeprefix(folder.JOB_PREFIX)
        with suppress(NotFound):  # or it is there, of an end that was interrupted
            return self._store.file(file_id).id
        partial = self._store.partial_path(file_id)
        try:
            await asyncio.to_thread(write_results, self._runs.directory(job_id) / "metrics.jsonl", partial)
            size, digest = partial.stat().st_size, await asyncio.to_thread(digest_of_file, partial)
            self._store.add_file(StoredFile(file_id, FILENAME, PURPOSE, size, now(), "processed", digest))
        finally:
            partial.unlink(missing_ok=True)
        return file_id


def shared_examples(job_id: str, shared: int, examples: int, where: str) -> StoredEvent:
    """The warning that a job is evaluated on what it learns."""
    consequence = "the validation loss is in part of what is learned"
    message = f"{shared} of {examples} examples of the validation file are {where}: {consequence}"
    return StoredEvent(job_id, message, level="warn", data={"shared_examples": shared})


def _copy(source: Path, target: Path) -> None:
    """A folder that appears whole or not at all."""
    with atomic_directory(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
