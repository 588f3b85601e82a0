"""The job that has the engine: from ``StartJob`` or ``HoldJob`` until it ends by itself or is stopped."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.store.example_files import ExampleFiles, Split
from sglang.srt.mezo.service.wire.errors import EngineRefused, RequestError
from sglang.srt.mezo.service.wire.events import (
    Failed,
    JobEvent,
    PerturbationDropped,
    PerturbationEvaluated,
    Started,
    Succeeded,
)
from sglang.srt.mezo.service.wire.messages import EvaluatePerturbed, HoldJob, LoadExamples, StartJob, StopJob

Last = Succeeded | Failed | None
"""How a job has ended; None where it was stopped."""


class Session:
    """One job on the engine."""

    def __init__(self, command: StartJob | HoldJob):
        self.command = command
        self.job_id = command.job_id
        self._started = asyncio.Event()
        self._ended: asyncio.Future[Last] = asyncio.get_running_loop().create_future()

    @property
    def has_started(self) -> bool:
        return self._started.is_set() and not self._ended.done()

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def started(self) -> bool:
        """Wait until the adapter is where the job's log ends; False where the job ends before that."""
        await self._started.wait()
        return not self._ended.done()

    async def ended(self) -> Last:
        """Wait for the job's last event."""
        return await asyncio.shield(self._ended)

    def end(self, last: Last) -> None:
        if not self._ended.done():
            self._ended.set_result(last)
        self._started.set()

    def on_event(self, event: JobEvent) -> None:
        if isinstance(event, Started):
            self._started.set()
        elif isinstance(event, Succeeded | Failed):
            self.end(event)


class TrainingSession(Session):
    """A job that trains.

    Attributes:
        files: the examples that it was given at its start.
        applied: how many of its files of appended rows the engine has taken.
        train_loss: as it was last reported.
    """

    def __init__(self, command: StartJob, files: ExampleFiles, applied: int):
        super().__init__(command)
        self.files = files
        self.applied = applied
        self.train_loss: float | None = None


class HeldSession(Session):
    """A job that is held for single operations.

    Attributes:
        step: of the adapter.
    """

    def __init__(self, command: HoldJob):
        super().__init__(command)
        self.step = 0
        self._operations: dict[str, asyncio.Future[PerturbationEvaluated | str]] = {}

    @contextmanager
    def operation(self, name: str) -> Iterator[asyncio.Future[PerturbationEvaluated | str]]:
        """What an operation will come to: its result, or why there is none."""
        self._operations[name] = asyncio.get_running_loop().create_future()
        try:
            yield self._operations[name]
        finally:
            del self._operations[name]

    def end(self, last: Last) -> None:
        super().end(last)
        for name in self._operations:
            self._answer(name, last.message if isinstance(last, Failed) else "the job was stopped")

    def on_event(self, event: JobEvent) -> None:
        if isinstance(event, Started):
            self.step = event.step
        super().on_event(event)
        if isinstance(event, PerturbationEvaluated):
            self._answer(event.operation, event)
        elif isinstance(event, PerturbationDropped):
            self._answer(event.operation, event.message)

    def _answer(self, name: str, answer: PerturbationEvaluated | str) -> None:
        operation = self._operations.get(name)
        if operation is not None and not operation.done():
            operation.set_result(answer)


Kind = TypeVar("Kind", bound=Session)


class Sessions:
    """Opens and closes sessions, one at a time; who opens one holds ``lock`` while it is in use."""

    def __init__(self, client: EngineClient):
        self.lock = asyncio.Lock()
        self.current: Session | None = None
        self._client = client

    def of(self, job_id: str) -> Session | None:
        """The session of a job, where it has the engine."""
        return self.current if self.current is not None and self.current.job_id == job_id else None

    async def load(self, job_id: str, split: Split, parts: Iterator[bytes]) -> None:
        """Send a job's examples ahead of its start; they are read as they are sent."""
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            await self._client.call(LoadExamples(job_id=job_id, split=split, examples=part))

    async def open(self, session: Kind) -> Kind:
        """Raises EngineRefused."""
        # Before the command: the scheduler's first event may come in before its answer is looked at.
        self.current = session
        try:
            await self._client.call(session.command)
        except BaseException:
            self._close(session.job_id)
            raise
        return session

    async def stop(self, job_id: str) -> dict[str, Any]:
        """Take the engine from a job, whether it is training, still being loaded, or has ended already."""
        result = await self._client.call(StopJob(job_id=job_id))
        self._close(job_id)
        return result

    async def evaluate(
        self, session: HeldSession, command: EvaluatePerturbed, timeout: float
    ) -> dict[str, list[float]]:
        """Losses of a perturbation, once the engine has found the time for it."""
        with session.operation(command.operation) as result:
            try:
                await self._client.call(command)
                answer = await asyncio.wait_for(result, timeout)
            except TimeoutError as error:
                await self.stop(session.job_id)  # or the engine would still be at it when the next one comes
                raise RequestError(
                    503, f"the engine did not find the time within {timeout:g} s", None, "timeout"
                ) from error
        if isinstance(answer, str):
            raise EngineRefused(answer)
        return answer.losses

    def on_event(self, event: JobEvent) -> None:
        session = self.of(event.job_id)
        if session is not None:
            session.on_event(event)
            if session.has_ended:
                self.current = None

    def _close(self, job_id: str) -> None:
        session = self.of(job_id)
        if session is not None:
            session.end(None)
            self.current = None
