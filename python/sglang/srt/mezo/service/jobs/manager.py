"""Fine-tuning jobs from their creation to their end: what the routes call, and what the scheduler's events come to."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.chat import rendering
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.fit import Fit, limits
from sglang.srt.mezo.service.jobs.forks import Forks
from sglang.srt.mezo.service.jobs.job_data import JobReader, shared_tokenizer
from sglang.srt.mezo.service.jobs.job_runs import JobRuns
from sglang.srt.mezo.service.jobs.manual import ManualWork
from sglang.srt.mezo.service.jobs.origins import Origin, Origins
from sglang.srt.mezo.service.jobs.published import PublishedAdapters
from sglang.srt.mezo.service.jobs.queues import Queues
from sglang.srt.mezo.service.jobs.session import Sessions, TrainingSession
from sglang.srt.mezo.service.jobs.states import change, fail, hold, release, require
from sglang.srt.mezo.service.jobs.tokenising import Tokenising
from sglang.srt.mezo.service.jobs.training import Training
from sglang.srt.mezo.service.store.disk import disk_full
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import DiskFull, EngineRefused, NotFound, RequestError
from sglang.srt.mezo.service.wire.events import AnyEvent, BaseModelReplaced
from sglang.srt.mezo.service.wire.messages import Describe, EngineDescription
from sglang.srt.mezo.service.wire.records import StoredEvent, StoredJob
from sglang.srt.mezo.service.wire.settings import ServiceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class JobManager:
    """Runs in one event loop, that of the service. One job trains at a time, the others wait in the order they came.

    Attributes:
        engine: what the engine can train.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        store: Store,
        client: EngineClient,
        forks: Forks,
        engine: EngineDescription,
        tokenizer: "PreTrainedTokenizerBase",
    ):
        self.settings = settings
        self.store = store
        self.engine = engine
        self.origins = Origins(store, client, engine, tokenizer)
        self._state_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()
        self._sessions = Sessions(client)
        self._fit = Fit(engine)
        self._published = PublishedAdapters(store, client, self._fit)
        self._reader = JobReader(tokenizer, engine, client.chat_settings)
        self._tokenising = Tokenising(store, self._reader, forks)
        self._runs = JobRuns(store, self._reader, engine)
        self._training = Training(
            store, client, self._sessions, self._tokenising, self._runs, self._published, self._state_lock
        )
        self._queues = Queues(store, engine, self._fit, self._tokenising, self._training)
        self._manual = ManualWork(
            store,
            client,
            self._sessions,
            self._runs,
            self._reader,
            self._published,
            self._training,
            self._fit,
            self._state_lock,
        )

    @classmethod
    async def start(cls, settings: ServiceSettings, store: Store, client: EngineClient, forks: Forks) -> Self:
        """Take up what an earlier server has left, and begin to work.

        Raises:
            ConfigError: the server runs without a tokenizer.
        """
        if client.tokenizer is None:
            raise ConfigError("--skip-tokenizer-init", True, "a tokenizer is needed to train on text")
        engine = msgspec.convert(await client.call(Describe()), EngineDescription)
        tokenizer = await asyncio.to_thread(shared_tokenizer, client.tokenizer)
        engine.rendering = rendering(tokenizer, client.chat_settings)
        manager = cls(settings, store, client, forks, engine, tokenizer)
        await manager._published.refresh()
        manager._start(manager._begin())
        return manager

    async def stop(self) -> None:
        """End the work of this process. A job that is running stays so, and is taken up by the next server."""
        self._manual.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tokenising.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """As a task of its own; where it fails, the log says so."""

        def over(task: asyncio.Task) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.critical("fine-tuning stands still until the server is restarted", exc_info=error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(over)

    def on_event(self, event: AnyEvent) -> None:
        """Called in the event loop for each event from the scheduler, in their order."""
        if isinstance(event, BaseModelReplaced):
            self._start(self._on_base_model(event.fingerprint))
            return
        try:
            self._training.on_event(event)
        except (
            Exception
        ) as error:  # of progress, which the next event tells again, or of a checkpoint, which is found later
            full = disk_full(error)
            logger.error(
                "an event of job %s was not recorded (%s): %s",
                event.job_id,
                type(event).__name__,
                full or error,
                exc_info=full is None,
            )
        self._sessions.on_event(event)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def adapter_name_for(self, job_id: str, suffix: str | None) -> str:
        """The name of a new job's adapter; RequestError where the suffix cannot be one, or is taken."""
        return self._published.name_for(job_id, suffix)

    async def create_job(self, job: StoredJob, origin: Origin | None = None) -> StoredJob:
        """Store a job, whose files are validated then.

        Args:
            origin: the adapter that it goes on from.

        Raises:
            NotFound: one of its files has been deleted.
            RequestError: its name has been taken.
        """
        self._published.require_free(job.adapter_name)
        files = " and ".join(
            f"{kind} file: {file_id}"
            for kind, file_id in (("training", job.training_file), ("validation", job.validation_file))
            if file_id
        )
        events = [StoredEvent(job.id, f"Created fine-tuning job: {job.id}"), StoredEvent(job.id, f"Validating {files}")]
        if origin is None:
            job = self.store.add_job(job, *events)
        else:
            try:
                await asyncio.to_thread(self.origins.keep, job.id, origin.adapter)
                self._published.require_free(job.adapter_name)
                job = self.store.add_job(job, *events)
            except BaseException:
                await asyncio.to_thread(self.origins.drop, job.id)
                raise
        self._queues.wake()
        return job

    async def cancel(self, job_id: str) -> StoredJob:
        """End a job for good. Its checkpoints stay, and what has been published."""
        async with self._state_lock:
            require(self.store.job(job_id), "cancel")
            stopped = await self._take_off_engine(job_id)
            job = change(self.store, job_id, "cancel", StoredEvent(job_id, "The job has been cancelled"), **stopped)
        self._tokenising.stop(job_id)
        await self._tokenising.remove(job_id)
        return job

    async def pause(self, job_id: str) -> StoredJob:
        """Let a job wait until it is resumed; it then goes on where it stopped, bit for bit."""
        async with self._state_lock:
            require(self.store.job(job_id), "pause")
            stopped = await self._take_off_engine(job_id)
            job = change(self.store, job_id, "pause", StoredEvent(job_id, "The job has been paused"), **stopped)
        self._tokenising.stop(job_id)
        return job

    async def resume(self, job_id: str) -> StoredJob:
        """Let a paused job wait for its turn; RequestError (409) where this server cannot train it."""
        async with self._state_lock:
            job = self.store.job(job_id)
            require(job, "resume")
            if (reason := self._fit.of_job(job)) is not None:
                raise reason
            if job.error is not None:
                job = release(self.store, job_id)
            else:
                job = change(
                    self.store,
                    job_id,
                    "resume",
                    StoredEvent(job_id, "The job has been resumed, and waits for its turn"),
                )
        self._queues.wake()
        return job

    async def append_rows(self, job_id: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Give a job more to train on. The rows are on disk when this returns.

        Raises:
            RequestError: naming the row that cannot be used; none of them is then.

        Returns:
            ``examples``, their number, and ``step``, the first that draws from them; None where the job is not running
            yet, and they count from when it is.
        """
        require(self.store.job(job_id), "append rows to")
        examples = await asyncio.to_thread(self._reader.encode, self.store.job(job_id), rows)
        async with self._state_lock:
            require(self.store.job(job_id), "append rows to")
            path = await asyncio.to_thread(self._runs.appended(job_id).add, rows)
            try:
                require(self.store.job(job_id), "append rows to")  # it may have ended by itself meanwhile
            except RequestError:
                self._runs.appended(job_id).drop(path)
                raise
            session = self._sessions.of(job_id)
            step = None
            if isinstance(session, TrainingSession) and session.has_started:
                try:
                    step = (await self._training.send_appended(session)).get(path)
                except DiskFull:
                    self._runs.appended(job_id).drop(path)
                    raise
            if isinstance(step, EngineRefused):
                raise step
        return {"examples": len(examples), "step": step}

    # --- adapters -----------------------------------------------------------------------------------------------------

    async def publish_checkpoint(self, job_id: str, checkpoint: str | None) -> str:
        """Have an adapter served now.

        Args:
            checkpoint: id of one of the job's; None for the adapter as it is now.

        Returns:
            The model's name in requests.
        """
        job = self.store.job(job_id)
        self._published.require_served(job)
        if checkpoint is not None:
            stored = self.store.checkpoint(checkpoint)
            if stored.job_id != job_id:
                raise NotFound("checkpoint", checkpoint, "checkpoint")
            return await self._published.load_checkpoint(job, stored)
        require(job, "publish")
        if job.status == "succeeded" and job.published_step in (None, job.step):
            return self._published.served_model(job)
        if job.status != "running":
            return await self._manual.publish_held(job_id)
        async with self._state_lock:
            require(self.store.job(job_id), "publish")
            return await self._manual.publish_current(job_id)

    async def evaluate(
        self, job_id: str, rows: Sequence[Mapping[str, Any]], zo_random_seed: int, zo_eps: float | None
    ) -> dict[str, Any]:
        """Losses of a paused or succeeded job's adapter at theta + zo_eps z and theta - zo_eps z; see
        ``ManualWork``."""
        return await self._manual.evaluate(job_id, rows, zo_random_seed, zo_eps)

    async def update(
        self,
        job_id: str,
        zo_random_seed: int,
        projected_grad: Sequence[float],
        learning_rate: float,
        publish: bool = True,
    ) -> dict[str, Any]:
        """A step of a paused or succeeded job's adapter; see ``ManualWork``."""
        return await self._manual.update(job_id, zo_random_seed, projected_grad, learning_rate, publish)

    def holder_of(self, name: str) -> str | None:
        """The job whose adapter, or a checkpoint of it, has that name or is to have it."""
        return self._published.holder_of(name)

    def serves(self, name: str) -> bool:
        """Whether requests are answered under the name of a published adapter or a checkpoint."""
        return self._published.serves(name)

    async def delete_model(self, name: str) -> None:
        """Serve an adapter and its checkpoints no more; its name is free again.

        Raises:
            NotFound, RequestError: no job has made it, it is a checkpoint, or its job is still going.
        """
        async with self._state_lock:
            await self._published.delete(name)

    # --- work ---------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self._queues.written(self._take_up)
        await self._queues.written(self._published.tell)
        await self._tokenising.tidy()
        await self._queues.run()

    async def _take_off_engine(self, job_id: str) -> dict[str, int]:
        """Stop a job's training; returns its last ``step``, where the engine had it."""
        session = self._sessions.of(job_id)
        return await self._sessions.stop(job_id) if isinstance(session, TrainingSession) else {}

    def _take_up(self) -> None:
        """Go on with what an earlier server was at."""
        self.store.adopt(limits(self.engine))
        for job in self.store.with_status("running"):
            if self.settings.on_restart == "fail":
                fail(
                    self.store,
                    job.id,
                    RequestError(503, "the server was restarted while the job was running", None, "server_restarted"),
                )
            elif (reason := self._fit.of_job(job)) is not None:
                hold(self.store, job.id, reason)
            else:
                change(
                    self.store,
                    job.id,
                    "requeue",
                    StoredEvent(job.id, "The job is resumed after a restart of the server"),
                )
        self._settle()

    def _settle(self) -> None:
        """Hold the jobs that this engine cannot train, and release those that it can; what a user has paused stays
        so."""
        for job in self.store.with_status("validating_files", "queued", "paused"):
            reason, is_held = self._fit.of_job(job), job.status == "paused" and job.error is not None
            if reason is not None and job.status != "paused":
                hold(self.store, job.id, reason)
            elif reason is not None and is_held:
                self.store.update_job(job.id, error=reason.to_dict())
            elif reason is None and is_held:
                release(self.store, job.id)

    async def _on_base_model(self, fingerprint: str) -> None:
        """Other weights have been loaded; the engine itself has stopped what it was training."""
        self.engine.base_model = fingerprint
        await self._queues.written(self._settle)
        self._queues.wake()
        await self._published.refresh()
        await self._queues.written(self._published.tell)
