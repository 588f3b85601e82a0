"""A job manager with a store on disk, in front of the doubles, as fixtures and as a context manager for restarts."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path

import msgspec
import pytest
from transformers import AutoTokenizer

from service_doubles import ENGINE, Scheduler, TokenizerManager, without_runtime_context
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.fit import limits
from sglang.srt.mezo.service.jobs.forks import Forks
from sglang.srt.mezo.service.jobs.manager import JobManager
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.events import Started
from sglang.srt.mezo.service.wire.messages import HoldJob
from sglang.srt.mezo.service.wire.records import StoredFile, StoredJob, new_id, now
from sglang.srt.mezo.service.wire.settings import ServiceSettings

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "opt-reviews"
ROW = {"prompt": "the movie is great. It was", "options": [" terrible", " great"], "label": 1}
ROWS = [ROW, {**ROW, "prompt": "the staff is terrible. It was", "label": 0}, ROW]
CONFIG = MezoConfig(
    invocation=" It was", target_modules=["q_proj", "v_proj"], max_steps=10, max_tokens_per_batch=256
).to_dict()
CONFIG = {
    name: value
    for name, value in CONFIG.items()
    if name not in ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(autouse=True)
def runtime_context(monkeypatch):
    without_runtime_context(monkeypatch)


class Server:
    """The parts of one server process."""

    def __init__(self, directory: Path, tokenizer, on_restart: str = "resume", **engine):
        self.scheduler = Scheduler(msgspec.structs.replace(ENGINE, **engine))
        self.tokenizer_manager = TokenizerManager(self.scheduler, tokenizer)
        self.store = Store(directory)
        self.settings = ServiceSettings(enabled=True, dir=str(directory), on_restart=on_restart)

    async def start(self) -> None:
        self.manager = await JobManager.start(self.settings, self.store, EngineClient(self.tokenizer_manager), Forks())
        self.scheduler.on_event = self.manager.on_event

    def upload(self, *rows, filename: str = "train.jsonl") -> str:
        """Of rows, or of lines as they are."""
        content = b"".join(map(_line, rows))
        digest = hashlib.sha256(content).hexdigest()
        file = StoredFile(new_id("file-"), filename, "fine-tune", len(content), now(), "processed", digest)
        self.store.partial_path(file.id).write_bytes(content)
        return self.store.add_file(file).id

    async def create(self, *rows, validation: str | None = None, suffix: str | None = None, **config) -> StoredJob:
        job_id = new_id("ftjob-")
        return await self.manager.create_job(
            StoredJob(
                id=job_id,
                created_at=now(),
                finished_at=None,
                status="validating_files",
                model="opt",
                training_file=self.upload(*(rows or ROWS)),
                validation_file=validation,
                seed=42,
                suffix=suffix,
                adapter_name=self.manager.adapter_name_for(job_id, suffix),
                metadata={},
                request={},
                hyperparameters={},
                config={**CONFIG, **config},
                fine_tuned_model=None,
                trained_tokens=None,
                error=None,
                step=0,
                version=0,
                engine=limits(self.manager.engine),
            )
        )

    async def until(self, job: StoredJob, *statuses: str) -> StoredJob:
        await eventually(lambda: self.store.job(job.id).status in statuses)
        return self.store.job(job.id)

    async def running(self, *rows, **arguments) -> StoredJob:
        """A new job that has the engine and has said so."""
        job = await self.create(*rows, **arguments)
        await self.started(job)
        return self.store.job(job.id)

    async def started(self, job: StoredJob) -> None:
        await eventually(lambda: self.scheduler.job is not None and self.scheduler.job.job_id == job.id)
        await self.until(job, "running")
        self.scheduler.report(Started, self.store.job(job.id).step)
        await asyncio.sleep(0.02)

    async def succeeded(self, **arguments) -> StoredJob:
        job = await self.running(**arguments)
        self.scheduler.succeed()
        return await self.until(job, "succeeded")

    def messages(self, job: StoredJob) -> list[str]:
        """Of the job's events, oldest first."""
        return [event.message for event in self.store.events(job.id, limit=1000).data][::-1]

    @cached_property
    def answer(self):
        return self.tokenizer_manager.answer


def _line(row) -> bytes:
    if isinstance(row, bytes):
        return row + b"\n"
    return (row if isinstance(row, str) else json.dumps(row)).encode() + b"\n"


@asynccontextmanager
async def serving(directory: Path, tokenizer, **settings):
    """A server that ends as a killed one does: without a word to its store or its scheduler."""
    server = Server(directory, tokenizer, **settings)
    await server.start()
    try:
        yield server
    finally:
        await server.manager.stop()
        server.store.close()


@pytest.fixture
async def server(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        yield server


async def eventually(condition) -> None:
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass within two minutes")


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(served_names, "_GRACE_SECONDS", 0.0)


async def succeeded_and_opened(server, **arguments):
    """A succeeded job, and a scheduler that opens it for single operations as soon as it is asked to."""
    job = await server.succeeded(**arguments)
    open_at_once(server)
    return job


def open_at_once(server) -> None:
    handle = server.scheduler.handle

    async def handle_and_open(command):
        reply = await handle(command)
        if isinstance(command, HoldJob) and reply.success:
            asyncio.get_running_loop().call_soon(server.scheduler.report, Started, server.scheduler.step)
        return reply

    server.scheduler.handle = handle_and_open
