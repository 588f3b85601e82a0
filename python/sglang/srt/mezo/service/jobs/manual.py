"""Single evaluations and updates of a job that does not train: it has the engine while they come, and a little
longer."""

import asyncio
import math
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.fit import Fit
from sglang.srt.mezo.service.jobs.job_data import JobReader
from sglang.srt.mezo.service.jobs.job_runs import JobRuns
from sglang.srt.mezo.service.jobs.published import PublishedAdapters
from sglang.srt.mezo.service.jobs.session import HeldSession, Sessions
from sglang.srt.mezo.service.jobs.states import Action, require
from sglang.srt.mezo.service.jobs.training import Training
from sglang.srt.mezo.service.store.disk import disk_full
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.events import Failed
from sglang.srt.mezo.service.wire.messages import ApplyUpdate, EvaluatePerturbed, SaveAdapter
from sglang.srt.mezo.service.wire.packed import pack
from sglang.srt.mezo.service.wire.records import NOT_PUBLISHED, StoredEvent, StoredJob, new_id

_IDLE_SECONDS = 30.0
_TIMEOUT_SECONDS = 600.0  # to begin or to evaluate: requests go first


class ManualWork:
    """Operations on paused and on succeeded jobs, one at a time."""

    def __init__(
        self,
        store: Store,
        client: EngineClient,
        sessions: Sessions,
        runs: JobRuns,
        reader: JobReader,
        published: PublishedAdapters,
        training: Training,
        fit: Fit,
        state_lock: asyncio.Lock,
    ):
        self._store = store
        self._client = client
        self._sessions = sessions
        self._runs = runs
        self._reader = reader
        self._published = published
        self._training = training
        self._fit = fit
        self._state_lock = state_lock
        self._idle: asyncio.Task | None = None

    def stop(self) -> None:
        if self._idle is not None:
            self._idle.cancel()

    async def evaluate(
        self, job_id: str, rows: Sequence[Mapping[str, Any]], zo_random_seed: int, zo_eps: float | None
    ) -> dict[str, Any]:
        """``loss_plus``, ``loss_minus`` and ``projected_grad``, one number for each direction, and ``step``; zo_eps
        None is the job's."""
        job = self._fitting(job_id, "evaluate")
        zo_eps = job.settings.zo_eps if zo_eps is None else zo_eps
        examples = await asyncio.to_thread(self._reader.encode, job, rows)
        async with self._session(job_id, "evaluate") as session:
            command = EvaluatePerturbed(
                job_id=job_id,
                operation=new_id("op-"),
                examples=pack(examples),
                zo_random_seed=zo_random_seed,
                zo_eps=zo_eps,
            )
            losses = await self._sessions.evaluate(session, command, _TIMEOUT_SECONDS)
            _require_finite(losses, zo_eps)
            return {"step": session.step, **losses}

    async def update(
        self, job_id: str, zo_random_seed: int, projected_grad: Sequence[float], learning_rate: float, publish: bool
    ) -> dict[str, Any]:
        """Take a step; of a succeeded job the adapter is served as it is then, unless ``publish`` is False.

        Returns:
            ``step``, and the ``model`` that was published, None for none.
        """
        _require_directions(self._fitting(job_id, "update"), projected_grad)
        async with self._session(job_id, "update") as session:
            result = await self._client.call(
                ApplyUpdate(
                    job_id=job_id,
                    zo_random_seed=zo_random_seed,
                    projected_grad=list(projected_grad),
                    learning_rate=learning_rate,
                )
            )
            session.step = result["step"]
            model = None
            try:
                job = self._store.update_job(job_id, step=session.step, published_step=NOT_PUBLISHED)
                if publish and job.status == "succeeded":
                    async with self._state_lock:
                        model = await self.publish_current(job_id)
            except (RequestError, OSError, sqlite3.Error) as error:
                raise _only_stepped(session.step, error) from error
            return {"step": session.step, "model": model}

    async def publish_held(self, job_id: str) -> str:
        """Serve the adapter of a paused or succeeded job as it is."""
        async with self._session(job_id, "publish"):
            async with self._state_lock:
                return await self.publish_current(job_id)

    async def publish_current(self, job_id: str) -> str:
        """Serve the adapter that the engine holds, as it is now. Called with ``state_lock`` held; returns the model's
        name."""
        name = self._published.model_name(self._store.job(job_id).adapter_name)
        step = 0

        async def save(directory: Path) -> None:
            nonlocal step
            step = (await self._client.call(SaveAdapter(job_id=job_id, directory=str(directory))))["step"]

        def record(version: int) -> StoredJob:
            event = StoredEvent(
                job_id, f"The adapter of step {step} is served as {name}", data={"step": step, "version": version}
            )
            return self._store.update_job(job_id, event, version=version, published_step=step)

        await self._published.add_version(job_id, save, record)
        return name

    @asynccontextmanager
    async def _session(self, job_id: str, action: Action) -> AsyncIterator[HeldSession]:
        """The engine with the job's adapter on it."""
        self._fitting(job_id, action)
        other = self._training.current
        if other is not None and self._store.job(other).status in ("queued", "running"):  # others are on their way out
            raise RequestError(
                409, f"cannot {action} job {job_id} now: job {other} has the engine", None, "engine_busy"
            )
        async with self._sessions.lock:
            job = self._store.job(job_id)
            require(job, action)
            self.stop()
            try:
                yield await self._open(job)
            finally:
                self._idle = asyncio.create_task(self._give_back())

    def _fitting(self, job_id: str, action: Action) -> StoredJob:
        """The job, if it is one for such an action and this server can take it up."""
        job = self._store.job(job_id)
        require(job, action)
        if (reason := self._fit.of_job(job)) is not None:
            raise reason
        return job

    async def _open(self, job: StoredJob) -> HeldSession:
        if isinstance(session := self._sessions.of(job.id), HeldSession):
            return session
        if self._sessions.current is not None:
            await self._sessions.stop(self._sessions.current.job_id)
        session = await self._sessions.open(HeldSession(await asyncio.to_thread(self._runs.hold_command, job)))
        try:
            started = await asyncio.wait_for(session.started(), _TIMEOUT_SECONDS)
        except TimeoutError as error:
            await self._sessions.stop(job.id)
            raise RequestError(
                503, "the engine did not find the time to take the adapter up", None, "timeout"
            ) from error
        if not started:
            last = await session.ended()
            reason = last.message if isinstance(last, Failed) else "the job was stopped"
            raise RequestError(503, f"the engine cannot take the adapter up: {reason}", None, "engine_failed")
        return session

    async def _give_back(self) -> None:
        await asyncio.sleep(_IDLE_SECONDS)
        async with self._sessions.lock:
            session = self._sessions.current
            if isinstance(session, HeldSession):
                await self._sessions.stop(session.job_id)


def _require_finite(losses: Mapping[str, list[float]], zo_eps: float) -> None:
    if not all(map(math.isfinite, losses["loss_plus"] + losses["loss_minus"])):
        raise RequestError(
            400, f"the losses at zo_eps={zo_eps} are {shown(losses)}: lower zo_eps", "zo_eps", "diverged"
        )


def _require_directions(job: StoredJob, projected_grad: Sequence[float]) -> None:
    count = job.settings.num_perturbations
    if len(projected_grad) != count:
        message = (
            f"projected_grad has {len(projected_grad)} numbers, and the job's num_perturbations={count} needs as many"
        )
        raise RequestError(400, message, "projected_grad", "invalid_value")


def _only_stepped(step: int, error: Exception) -> RequestError:
    """Of an update that is in the seed log already: to ask for it again would be another one."""
    known = error if isinstance(error, RequestError) else disk_full(error)
    status, reason, code = (known.status, known.message, known.code) if known else (500, str(error), "internal_error")
    return RequestError(
        status, f"the step is taken, and the adapter is at step {step}, but not served: {reason}", None, code
    )
