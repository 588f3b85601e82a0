"""Fine-tuning jobs from their creation to their end: what the routes call, and what the scheduler's events come to."""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec
from sglang.srt.mezo.core.errors import ConfigError, DataError, MezoError
from sglang.srt.mezo.data.chat import rendering
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.fit import Fit, limits
from sglang.srt.mezo.service.jobs.forks import Forks
from sglang.srt.mezo.service.jobs.hyperparameters import settle
from sglang.srt.mezo.service.jobs.job_data import JobReader, shared_tokenizer
from sglang.srt.mezo.service.jobs.manual import ManualWork
from sglang.srt.mezo.service.jobs.origins import Origin, Origins
from sglang.srt.mezo.service.jobs.published import PublishedAdapters
from sglang.srt.mezo.service.jobs.runs import Runs
from sglang.srt.mezo.service.jobs.session import Sessions
from sglang.srt.mezo.service.jobs.states import (
    change,
    fail,
    hold,
    release,
    require,
    set_back,
)
from sglang.srt.mezo.service.jobs.tokenising import Tokenising, found_invocation
from sglang.srt.mezo.service.jobs.training import Training, shared_examples
from sglang.srt.mezo.service.store.disk import disk_full, has_room, storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import (
    DiskFull,
    EngineRefused,
    NotFound,
    RequestError,
)
from sglang.srt.mezo.service.wire.messages import Describe, EngineDescription, MezoEvent
from sglang.srt.mezo.service.wire.records import LIVE, JobStatus, StoredEvent, StoredJob
from sglang.srt.mezo.service.wire.settings import ServiceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_EXPIRY_SECONDS = 60.0  # between two looks for files that have expired
_RETRY_SECONDS = 1.0  # after a state that could not be written to the store
_MOST_ROOM_SECONDS = 60.0  # between two looks whether the disk has room again


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
        self._state = asyncio.Lock()
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._sessions = Sessions(client)
        self._fit = Fit(engine)
        self._published = PublishedAdapters(store, client, self._fit)
        self._reader = JobReader(tokenizer, engine, client.chat_settings)
        self._tokenising = Tokenising(store, self._reader, forks)
        self._runs = Runs(store, self._reader, engine)
        self._training = Training(store, client, self._sessions, self._tokenising, self._runs, self._published, self._state)
        self._manual = ManualWork(
            store, client, self._sessions, self._runs, self._reader, self._published, self._training, self._fit, self._state
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
        manager._tasks = [asyncio.create_task(manager._begin())]
        return manager

    async def stop(self) -> None:
        """End the work of this process. A job that is running stays so, and is taken up by the next server."""
        self._manual.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tokenising.close()

    def on_event(self, event: MezoEvent) -> None:
        """Called in the event loop for each event from the scheduler, in their order."""
        if event.kind == "base_model":
            self._tasks.append(asyncio.create_task(self._on_base_model(event.data["fingerprint"])))
            return
        try:
            self._training.on_event(event)
        except Exception as error:  # of progress, which the next event tells again, or of a checkpoint, which is found later
            full = disk_full(error)
            logger.error("an event of job %s was not recorded (%s): %s", event.job_id, event.kind, full or error, exc_info=full is None)
        self._sessions.on_event(event)

    # --- jobs ------------------------------------------------------------------------------------------------------------

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
            f"{kind} file: {file_id}" for kind, file_id in (("training", job.training_file), ("validation", job.validation_file)) if file_id
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
        self._work.set()
        return job

    async def cancel(self, job_id: str) -> StoredJob:
        """End a job for good. Its checkpoints stay, and what has been published."""
        async with self._state:
            require(self.store.job(job_id), "cancel")
            stopped = await self._take_off_engine(job_id)
            job = change(self.store, job_id, "cancel", StoredEvent(job_id, "The job has been cancelled"), **stopped)
        self._tokenising.stop(job_id)
        await self._tokenising.remove(job_id)
        return job

    async def pause(self, job_id: str) -> StoredJob:
        """Let a job wait until it is resumed; it then goes on where it stopped, bit for bit."""
        async with self._state:
            require(self.store.job(job_id), "pause")
            stopped = await self._take_off_engine(job_id)
            job = change(self.store, job_id, "pause", StoredEvent(job_id, "The job has been paused"), **stopped)
        self._tokenising.stop(job_id)
        return job

    async def resume(self, job_id: str) -> StoredJob:
        """Let a paused job wait for its turn; RequestError (409) where this server cannot train it."""
        async with self._state:
            job = self.store.job(job_id)
            require(job, "resume")
            if (reason := self._fit.of_job(job)) is not None:
                raise reason
            if job.error is not None:
                job = release(self.store, job_id)
            else:
                job = change(self.store, job_id, "resume", StoredEvent(job_id, "The job has been resumed, and waits for its turn"))
        self._work.set()
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
        async with self._state:
            require(self.store.job(job_id), "append rows to")
            path = await asyncio.to_thread(self._runs.appended(job_id).add, rows)
            session = self._sessions.of(job_id)
            step = None
            if session is not None and not session.manual and session.has_started:
                try:
                    step = (await self._training.send_appended(session)).get(path)
                except DiskFull:
                    self._runs.appended(job_id).drop(path)
                    raise
            if isinstance(step, EngineRefused):
                raise step
        return {"examples": len(examples), "step": step}

    # --- adapters --------------------------------------------------------------------------------------------------------

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
        if job.status == "paused":
            return await self._manual.publish_paused(job_id)
        async with self._state:
            job = self.store.job(job_id)
            require(job, "publish")
            if job.status == "succeeded":
                return self._published.served_model(job)
            return await self._manual.publish_current(job_id)

    async def evaluate(
        self, job_id: str, rows: Sequence[Mapping[str, Any]], zo_random_seed: int, zo_eps: float
    ) -> dict[str, Any]:
        """Losses of a paused or succeeded job's adapter at theta + zo_eps z and theta - zo_eps z; see ``ManualWork``."""
        return await self._manual.evaluate(job_id, rows, zo_random_seed, zo_eps)

    async def update(
        self, job_id: str, zo_random_seed: int, projected_grad: Sequence[float], learning_rate: float, publish: bool = True
    ) -> dict[str, Any]:
        """A step of a paused or succeeded job's adapter; see ``ManualWork``."""
        return await self._manual.update(job_id, zo_random_seed, projected_grad, learning_rate, publish)

    def serves(self, name: str) -> bool:
        """Whether requests are answered under the name of a published adapter or a checkpoint."""
        return self._published.serves(name)

    async def delete_model(self, name: str) -> None:
        """Serve an adapter and its checkpoints no more; its name is free again.

        Raises:
            NotFound, RequestError: no job has made it, it is a checkpoint, or its job is still going.
        """
        async with self._state:
            await self._published.delete(name)

    # --- work ------------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self._written(self._take_up)
        await self._written(self._published.tell)
        await asyncio.gather(
            self._work_on("validating_files", self._validate), self._work_on("queued", self._training.train), self._delete_expired()
        )

    async def _delete_expired(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.store.delete_expired)
            except (OSError, sqlite3.Error) as error:
                logger.error("files that have expired could not be deleted, which is tried again: %s", error)
            await asyncio.sleep(_EXPIRY_SECONDS)

    async def _work_on(self, status: JobStatus, work: Callable[[StoredJob], Awaitable[None]]) -> None:
        """Take the oldest job of a status, again and again. What goes wrong with one is kept to it."""
        setbacks = 0
        while True:
            self._work.clear()
            try:
                while (job := self.store.oldest(status)) is not None:
                    await self._attempt(job, work)
                    setbacks = 0
            except DiskFull as error:
                logger.error("jobs that are %s wait for room: %s", status, error)
                setbacks += 1
                await self._room(min(_RETRY_SECONDS * 2**setbacks, _MOST_ROOM_SECONDS))
            except Exception:
                logger.exception("jobs that are %s have to wait", status)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                await self._work.wait()

    async def _attempt(self, job: StoredJob, work: Callable[[StoredJob], Awaitable[None]]) -> None:
        """Raises DiskFull where the job did not fail but has to wait for room; it goes on from what is on the disk then."""
        try:
            await work(job)
        except Exception as error:
            if (full := disk_full(error)) is not None:
                await self._written(lambda: set_back(self.store, job.id, full))
                raise full from error
            failure = self._failure(job, error)
            reason = self._fit.of_failure(job, failure)
            await self._written(lambda: hold(self.store, job.id, reason) if reason else fail(self.store, job.id, failure))
        if self.store.job(job.id).status not in LIVE:
            await self._tokenising.remove(job.id)

    def _failure(self, job: StoredJob, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if isinstance(error, MezoError):
            return RequestError(500, str(error), None, type(error).__name__)
        logger.error("job %s failed", job.id, exc_info=error)
        if (known := storage_error(error)) is not None:
            return known
        return RequestError(500, f"{type(error).__name__} in the server, whose log has more", None, "internal_error")

    async def _written(self, write: Callable[[], None]) -> None:
        """Change the store, again and again until it takes it: a job must not be left in a state that it is not in."""
        said = ""
        while True:
            try:
                return write()
            except (OSError, sqlite3.Error) as error:
                if str(error) != said:
                    said = str(error)
                    logger.error("the state of a job could not be stored, which is tried again every %g s: %s", _RETRY_SECONDS, said)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _room(self, seconds: float) -> None:
        """Wait so long, and until the disk takes a file again."""
        await asyncio.sleep(seconds)
        while not await asyncio.to_thread(has_room, self.store.directory):
            await asyncio.sleep(seconds)

    async def _validate(self, job: StoredJob) -> None:
        files = await self._tokenising.examples(job)
        if files is not None and self.store.job(job.id).status == "validating_files":
            events = [StoredEvent(job.id, "Files validated, moving job to queued state")]
            if shared := files.found["shared"]:
                events.append(shared_examples(job.id, shared, files.counts["eval"], "in the training file too"))
            config = {**job.config, "objective": files.found["objective"]}
            if (invocation := found_invocation(files)) is not None:
                config = settle(config, job.request, self.engine, invocation)
                events.append(_activation(job.id, invocation))
            change(self.store, job.id, "queue", *events, config=config)
            self._work.set()

    async def _take_off_engine(self, job_id: str) -> dict[str, int]:
        """Stop a job's training; returns its last ``step``, where the engine had it."""
        session = self._sessions.of(job_id)
        return {} if session is None or session.manual else await self._sessions.stop(job_id)

    def _take_up(self) -> None:
        """Go on with what an earlier server was at."""
        self.store.adopt(limits(self.engine))
        for job in self.store.with_status("running"):
            if self.settings.on_restart == "fail":
                fail(self.store, job.id, RequestError(503, "the server was restarted while the job was running", None, "server_restarted"))
            elif (reason := self._fit.of_job(job)) is not None:
                hold(self.store, job.id, reason)
            else:
                change(self.store, job.id, "requeue", StoredEvent(job.id, "The job is resumed after a restart of the server"))
        self._settle()

    def _settle(self) -> None:
        """Hold the jobs that this engine cannot train, and release those that it can; what a user has paused stays so."""
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
        await self._written(self._settle)
        self._work.set()
        await self._published.refresh()
        await self._written(self._published.tell)


def _activation(job_id: str, invocation: str | list[int] | DataError) -> StoredEvent:
    """What has become of an invocation that the job left open."""
    if isinstance(invocation, DataError):
        return StoredEvent(job_id, f"The adapter is ordinary LoRA, which trains many times slower than one with an invocation: {invocation.reason}", level="warn")
    return StoredEvent(job_id, f"The adapter acts from the chat template's generation prompt on: {invocation!r}")
