"""The job that has the engine: from ``StartJob`` until it ends by itself or is stopped."""

import asyncio
from collections.abc import Iterator
from typing import Any

from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.store.example_files import ExampleFiles, Split
from sglang.srt.mezo.service.wire.errors import EngineRefused, RequestError
from sglang.srt.mezo.service.wire.messages import EvaluatePerturbed, LoadExamples, MezoEvent, StartJob, StopJob


class Session:
    """One job on the engine.

    Attributes:
        manual: it is held for single operations, and does not train.
        applied: how many of its files of appended rows the engine has taken.
        step: of the adapter that it was taken up with.
        train_loss: as it was last reported.
        files: the examples that it was given at its start; None where it is manual.
    """

    def __init__(self, command: StartJob, applied: int):
        self.job_id = command.job_id
        self.manual = command.manual
        self.applied = applied
        self.step = 0
        self.train_loss: float | None = None
        self.files: ExampleFiles | None = None
        self.operations: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._started = asyncio.Event()
        self._ended: asyncio.Future[MezoEvent | None] = asyncio.get_running_loop().create_future()

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

    async def ended(self) -> MezoEvent | None:
        """Wait for the job's last event; None where it was stopped."""
        return await asyncio.shield(self._ended)

    def end(self, event: MezoEvent | None) -> None:
        if not self._ended.done():
            self._ended.set_result(event)
        self._started.set()
        for operation in self.operations.values():
            if not operation.done():
                operation.set_result({"error": event.message if event else "the job was stopped"})

    def on_event(self, event: MezoEvent) -> None:
        if event.kind == "started":
            self.step = event.step
            self._started.set()
        elif event.kind in ("succeeded", "failed"):
            self.end(event)
        elif event.kind == "evaluated":
            operation = self.operations.get(event.data["operation"])
            if operation is not None and not operation.done():
                operation.set_result(event.data)


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

    async def open(self, command: StartJob, applied: int = 0) -> Session:
        """Raises EngineRefused."""
        # Before the command: the scheduler's first event may come in before its answer is looked at.
        session = self.current = Session(command, applied)
        try:
            await self._client.call(command)
        except BaseException:
            self._close(command.job_id)
            raise
        return session

    async def stop(self, job_id: str) -> dict[str, Any]:
        """Take the engine from a job, whether it is training, still being loaded, or has ended already."""
        result = await self._client.call(StopJob(job_id=job_id))
        self._close(job_id)
        return result

    async def evaluate(self, session: Session, command: EvaluatePerturbed, timeout: float) -> dict[str, Any]:
        """Losses of a perturbation, once the engine has found the time for it."""
        result = session.operations[command.operation] = asyncio.get_running_loop().create_future()
        try:
            await self._client.call(command)
            answer = await asyncio.wait_for(result, timeout)
        except TimeoutError as error:
            await self.stop(session.job_id)  # or the engine would still be at it when the next one comes
            raise RequestError(
                503, f"the engine did not find the time within {timeout:g} s", None, "timeout"
            ) from error
        finally:
            del session.operations[command.operation]
        if "error" in answer:
            raise EngineRefused(answer["error"])
        return {name: value for name, value in answer.items() if name != "operation"}

    def on_event(self, event: MezoEvent) -> None:
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
