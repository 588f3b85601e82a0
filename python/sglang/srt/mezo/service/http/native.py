"""Routes beyond OpenAI's: more examples for a running job, its adapter as it is now, single evaluations and updates."""

import itertools
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import FastAPI, Query
from pydantic import Field
from starlette.requests import Request

from sglang.srt.mezo.core.config import SMALLEST_ZO_EPS
from sglang.srt.mezo.core.settings import LARGEST
from sglang.srt.mezo.service.http.endpoint import Endpoint, Service, Wire, add_routes, changes, read_json, reads
from sglang.srt.mezo.service.http.protocol import Json, job_object
from sglang.srt.mezo.service.jobs.job_data import MAX_EXAMPLES
from sglang.srt.mezo.service.wire.records import StoredJob
from sglang.srt.mezo.training.tracking import parse_metrics

_MAX_ROWS_BYTES = 4 << 20  # of a request: far more than it may have tokens, and parsing it holds up serving
_MAX_LINES = 1000  # of metrics in one answer
_MAX_GRAD = 1e30  # times the largest learning rate, a float32 still: a step of the seed log can be taken

Result = TypeVar("Result")

Rows = Annotated[list[Json], Field(min_length=1, max_length=MAX_EXAMPLES)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Grad = Annotated[float, Field(ge=-_MAX_GRAD, le=_MAX_GRAD)]
LearningRate = Annotated[float, Field(gt=0, le=LARGEST)]
ZoEps = Annotated[float, Field(ge=SMALLEST_ZO_EPS, le=LARGEST)]
Line = Annotated[int, Query(ge=0, lt=2**31)]


class AppendExamples(Wire):
    rows: Rows


class Publish(Wire):
    """checkpoint: id of one of the job's checkpoints; null for the adapter as it is now."""

    checkpoint: str | None = None


class Evaluate(Wire):
    """zo_eps: the job's own where it is null."""

    rows: Rows
    zo_random_seed: Seed
    zo_eps: ZoEps | None = None


class Update(Wire):
    zo_random_seed: Seed
    projected_grad: list[Grad]
    learning_rate: LearningRate
    publish: bool = True


def install(app: FastAPI, service: Service) -> None:
    """Add the routes to SGLang's app."""
    add_routes(app, _Native(service).endpoints(), service)


class _Native:
    def __init__(self, service: Service):
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        job = "/mezo/jobs/{job_id}"
        return [
            Endpoint("GET", "/mezo/status", self.status),
            Endpoint("GET", f"{job}/metrics", self.metrics),
            Endpoint("POST", f"{job}/examples", self.append_examples, AppendExamples),
            Endpoint("POST", f"{job}/publish", self.publish, Publish),
            Endpoint("POST", f"{job}/evaluate", self.evaluate, Evaluate),
            Endpoint("POST", f"{job}/update", self.update, Update),
        ]

    @reads
    async def status(self) -> Json:
        """What the engine can train, the settings of the service, the job that runs, the latency of requests."""
        service = self._service
        settings = service.settings
        running = await service.threads.read(service.store.with_status, "running")
        return {
            "engine": msgspec.to_builtins(service.engine),
            "served_model_name": service.client.served_model_name,
            "settings": {
                "share": settings.share,
                "micro_step_ms": settings.micro_step_ms,
                "idle_step_ms": settings.idle_step_ms,
                "kv_share": settings.kv_share,
                "max_file_bytes": settings.max_file_bytes,
                "on_restart": settings.on_restart,
            },
            "current_job": job_object(running[0]) if running else None,
            "serving": service.latency.summary(),
        }

    @reads
    async def metrics(self, job_id: str, after: Line = 0) -> Json:
        """Lines of the job's metrics.jsonl behind the first ``after``; ``next`` is the ``after`` of the next
        request."""
        return await self._service.threads.read(self._metrics, job_id, after)

    def _metrics(self, job_id: str, after: int) -> Json:
        store = self._service.store
        lines = _read_lines(store.job_directory(store.job(job_id).id) / "run" / "metrics.jsonl", after)
        return {"data": parse_metrics(lines), "next": after + len(lines)}

    @changes
    async def append_examples(self, job_id: str, request: Request) -> Json:
        """Add training rows to a job that waits or runs. Answered with ``step``, the first that draws from them; null
        where the job does not run yet, and they count once it does."""
        await self._job(job_id)
        body = await read_json(request, AppendExamples, self._max_rows_bytes)
        appended = await self._run(self._service.manager.append_rows(job_id, body.rows))
        return {"step": appended["step"], "added": appended["examples"]}

    @changes
    async def publish(self, job_id: str, request: Request) -> Json:
        """Serve a checkpoint, or the adapter as it is now. Answered with the name of the ``model``."""
        await self._job(job_id)
        body = await read_json(request, Publish)
        return {"model": await self._run(self._service.manager.publish_checkpoint(job_id, body.checkpoint))}

    @changes
    async def evaluate(self, job_id: str, request: Request) -> Json:
        """Losses of a paused or succeeded job's adapter beside it: ``loss_plus``, ``loss_minus`` (what the job's
        estimator compares the former with) and ``projected_grad`` along each direction of ``zo_random_seed``."""
        await self._job(job_id)
        body = await read_json(request, Evaluate, self._max_rows_bytes)
        return await self._run(self._service.manager.evaluate(job_id, body.rows, body.zo_random_seed, body.zo_eps))

    @changes
    async def update(self, job_id: str, request: Request) -> Json:
        """Take a step of a paused or succeeded job's adapter along the directions of ``zo_random_seed``, and log it; of
        a succeeded job it is served then, unless ``publish`` is false. Refused where a weight would not be finite."""
        await self._job(job_id)
        body = await read_json(request, Update)
        manager = self._service.manager
        return await self._run(
            manager.update(job_id, body.zo_random_seed, body.projected_grad, body.learning_rate, body.publish)
        )

    async def _job(self, job_id: str) -> StoredJob:
        return await self._service.threads.read(self._service.store.job, job_id)

    async def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await self._service.threads.run(work)

    @property
    def _max_rows_bytes(self) -> int:
        return min(_MAX_ROWS_BYTES, self._service.settings.max_file_bytes)


def _read_lines(path: Path, after: int) -> list[bytes]:
    """Whole lines only: the last one may still be in the making."""
    try:
        with open(path, "rb") as file:
            lines = list(itertools.islice(file, after, after + _MAX_LINES))
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith(b"\n")]
