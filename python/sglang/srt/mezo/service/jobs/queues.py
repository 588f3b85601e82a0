"""Jobs that wait: the oldest of a state is worked on, and what goes wrong with one is kept to it."""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sglang.srt.mezo.core.errors import DataError, MezoError
from sglang.srt.mezo.service.jobs.fit import Fit
from sglang.srt.mezo.service.jobs.hyperparameters import settle, stored
from sglang.srt.mezo.service.jobs.states import change, fail, hold, set_back
from sglang.srt.mezo.service.jobs.tokenising import Tokenising, found_invocation
from sglang.srt.mezo.service.jobs.training import Training, shared_examples
from sglang.srt.mezo.service.store.disk import disk_full, has_room, storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import DiskFull, RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.records import LIVE, JobStatus, StoredEvent, StoredJob

logger = logging.getLogger(__name__)

_EXPIRY_SECONDS = 60.0  # between two looks for files that have expired
_RETRY_SECONDS = 1.0  # after a state that could not be written to the store
_MOST_ROOM_SECONDS = 60.0  # between two looks whether the disk has room again


class Queues:
    """Validates the files of new jobs, and trains those that are queued, each in the order in which they came."""

    def __init__(self, store: Store, engine: EngineDescription, fit: Fit, tokenising: Tokenising, training: Training):
        self._store = store
        self._engine = engine
        self._fit = fit
        self._tokenising = tokenising
        self._training = training
        self._work = asyncio.Event()

    def wake(self) -> None:
        """A job has come into a state in which it waits."""
        self._work.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        await asyncio.gather(
            self._work_on("validating_files", self._validate),
            self._work_on("queued", self._training.train),
            self._delete_expired(),
        )

    async def written(self, write: Callable[[], None]) -> None:
        """Change the store, again and again until it takes it: a job must not be left in a state that it is not in."""
        said = ""
        while True:
            try:
                return write()
            except (OSError, sqlite3.Error) as error:
                if str(error) != said:
                    said = str(error)
                    logger.error(
                        "the state of a job could not be stored, which is tried again every %g s: %s",
                        _RETRY_SECONDS,
                        said,
                    )
            await asyncio.sleep(_RETRY_SECONDS)

    async def _delete_expired(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._store.delete_expired)
            except (OSError, sqlite3.Error) as error:
                logger.error("files that have expired could not be deleted, which is tried again: %s", error)
            await asyncio.sleep(_EXPIRY_SECONDS)

    async def _work_on(self, status: JobStatus, work: Callable[[StoredJob], Awaitable[None]]) -> None:
        """Take the oldest job of a status, again and again. What goes wrong with one is kept to it."""
        setbacks = 0
        while True:
            self._work.clear()
            try:
                while (job := self._store.oldest(status)) is not None:
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
        """Raises DiskFull where the job did not fail but has to wait for room; it goes on from what is on the disk
        then."""
        try:
            await work(job)
        except Exception as error:
            if (full := disk_full(error)) is not None:
                await self.written(lambda: set_back(self._store, job.id, full))
                raise full from error
            failure = self._failure(job, error)
            reason = self._fit.of_failure(job, failure)
            await self.written(
                lambda: hold(self._store, job.id, reason) if reason else fail(self._store, job.id, failure)
            )
        if self._store.job(job.id).status not in LIVE:
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

    async def _room(self, seconds: float) -> None:
        """Wait so long, and until the disk takes a file again."""
        await asyncio.sleep(seconds)
        while not await asyncio.to_thread(has_room, self._store.directory):
            await asyncio.sleep(seconds)

    async def _validate(self, job: StoredJob) -> None:
        files = await self._tokenising.examples(job)
        if files is not None and self._store.job(job.id).status == "validating_files":
            events = [StoredEvent(job.id, "Files validated, moving job to queued state")]
            if shared := files.found["shared"]:
                events.append(shared_examples(job.id, shared, files.counts["eval"], "in the training file too"))
            config = replace(job.settings, objective=files.found["objective"])
            if (invocation := found_invocation(files)) is not None:
                config = settle(config, job.request, self._engine, invocation)
                events.append(_activation(job.id, invocation))
            change(self._store, job.id, "queue", *events, config=stored(config))
            self._work.set()


def _activation(job_id: str, invocation: str | list[int] | DataError) -> StoredEvent:
    """What has become of an invocation that the job left open."""
    if isinstance(invocation, DataError):
        return StoredEvent(
            job_id,
            "The adapter is ordinary LoRA, which trains many times slower than one with an invocation: "
            f"{invocation.reason}",
            level="warn",
        )
    return StoredEvent(job_id, f"The adapter acts from the chat template's generation prompt on: {invocation!r}")
