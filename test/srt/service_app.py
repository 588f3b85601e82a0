"""SGLang's app with our routes on it, a real store behind them, and a manager that writes down what it is asked."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hyperparameters import ENGINE
from sglang.srt.entrypoints import http_server
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.mezo.service.http import native, routes
from sglang.srt.mezo.service.http.latency import LatencyRecorder
from sglang.srt.mezo.service.jobs.origins import Origins
from sglang.srt.mezo.service.jobs.threads import ServiceThreads
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.records import StoredEvent, StoredJob
from sglang.srt.mezo.service.wire.settings import ServiceSettings
from sglang.srt.observability.http_request_metrics import add_http_request_metrics_middleware
from sglang.srt.utils.auth import add_api_key_middleware

API_KEY = "user-key"
ADMIN_KEY = "admin-key"
UPSTREAM = tuple(http_server.app.router.routes)


class RecordingManager:
    """Stands in for the job manager: keeps jobs in the store, and every call in ``calls``."""

    def __init__(self, store: Store):
        self.store = store
        nothing_loaded = SimpleNamespace(lora_ref_cache={}, lora_registry=LoRARegistry())
        self.origins = Origins(
            store, SimpleNamespace(served_model_name="tiny", tokenizer_manager=nothing_loaded), ENGINE, None
        )
        self.calls: list[tuple[Any, ...]] = []

    def adapter_name_for(self, job_id: str, suffix: str | None) -> str:
        if suffix == "taken":
            raise RequestError(409, "suffix='taken' is taken", "suffix", "conflict")
        return suffix or f"ft-{job_id[-6:]}"

    async def create_job(self, job: StoredJob, origin=None) -> StoredJob:
        return self.store.add_job(job, StoredEvent(job.id, f"Created fine-tuning job: {job.id}"))

    async def cancel(self, job_id: str) -> StoredJob:
        return self._set_status(job_id, "cancelled")

    async def pause(self, job_id: str) -> StoredJob:
        return self._set_status(job_id, "paused")

    async def resume(self, job_id: str) -> StoredJob:
        return self._set_status(job_id, "queued")

    def _set_status(self, job_id: str, status: str) -> StoredJob:
        job = self.store.job(job_id)
        if job.status == status:
            raise RequestError(400, f"cannot make a job {status} that is {status}", None, "invalid_state")
        return self.store.update_job(job_id, status=status)

    async def append_rows(self, job_id, rows) -> dict[str, Any]:
        self.calls.append(("append_rows", job_id, rows))
        return {"step": 11, "examples": len(rows)}

    async def publish_checkpoint(self, job_id, checkpoint) -> str:
        self.calls.append(("publish_checkpoint", job_id, checkpoint))
        return "tiny:ft-1"

    async def evaluate(self, job_id, rows, zo_random_seed, zo_eps) -> dict[str, Any]:
        self.calls.append(("evaluate", job_id, rows, zo_random_seed, zo_eps))
        return {"loss_plus": [0.5], "loss_minus": [0.25], "projected_grad": [12.5]}

    async def update(self, job_id, zo_random_seed, projected_grad, learning_rate, publish=True) -> dict[str, Any]:
        self.calls.append(("update", job_id, zo_random_seed, projected_grad, learning_rate, publish))
        return {"step": 12, "model": "tiny:ft-1"}

    def serves(self, name: str) -> bool:
        return True

    async def delete_model(self, name: str) -> None:
        self.calls.append(("delete_model", name))
        self.store.update_job(self.store.job_by_adapter(name).id, adapter_name="", fine_tuned_model=None)


@dataclass
class FakeService:
    settings: ServiceSettings
    store: Store
    manager: RecordingManager
    engine: EngineDescription = ENGINE
    client: Any = field(default_factory=lambda: SimpleNamespace(served_model_name="tiny", context_length=128))
    ready: bool = True
    latency: LatencyRecorder = field(default_factory=LatencyRecorder)
    threads: ServiceThreads = field(default_factory=ServiceThreads)

    def __post_init__(self):
        self.threads.start()

    def close(self) -> None:
        self.threads.close()
        self.store.close()


def make_service(directory: Path) -> FakeService:
    store = Store(directory)
    return FakeService(ServiceSettings(enabled=True, dir=str(directory), max_file_mb=1), store, RecordingManager(store))


def make_app(service: FakeService, api_key: str | None = None, admin_api_key: str | None = None) -> FastAPI:
    """A copy of SGLang's app, as its middleware and exception handlers make it, with our routes."""
    app = FastAPI(exception_handlers=http_server.app.exception_handlers)
    app.router.route_class = http_server.ORJSONRoute
    app.router.routes[:] = UPSTREAM
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    add_http_request_metrics_middleware(app)
    for module in (routes, native):
        module.install(app, service)
    if api_key or admin_api_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    return app


@contextlib.contextmanager
def serving(app: FastAPI, lifespan: str = "off") -> Iterator[int]:
    """The app on a port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan=lifespan, log_level="error", loop="uvloop"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
