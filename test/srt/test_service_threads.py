"""Nothing of the service runs in the event loop in which tokens are streamed: neither the disk nor a lock can hold
that up."""

import asyncio
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from clients import http_client, openai_client
from service_app import make_app, serving
from service_doubles import Scheduler, TokenizerManager, without_runtime_context, write_adapter
from service_server import MODEL, ROW, ROWS
from sglang.srt.entrypoints import http_server
from sglang.srt.mezo.service.http.app import Service
from sglang.srt.mezo.service.jobs.threads import ServiceThreads, run_in
from sglang.srt.mezo.service.store.database import Database
from sglang.srt.mezo.service.wire.events import CheckpointSaved, Evaluated, Event, Started, StepTaken, Succeeded
from sglang.srt.mezo.service.wire.settings import ServiceSettings

SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"invocation": " It was"}}}


class Door:
    """A server of the real service, in front of a scheduler that a test speaks for.

    Attributes:
        on_loop: what was done to files and to the database in the thread of SGLang's event loop, after the start.
    """

    def __init__(self, directory: Path):
        self.service = Service(ServiceSettings(enabled=True, dir=str(directory)))
        self.directory = directory
        self.on_loop: list[str] = []
        self.thread: int | None = None

    @asynccontextmanager
    async def lifespan(self, app):
        self.loop = asyncio.get_running_loop()
        self.scheduler = Scheduler()
        manager = self.manager = TokenizerManager(self.scheduler, AutoTokenizer.from_pretrained(MODEL))
        manager.enable_metrics = False
        self.scheduler.on_event = self.service.on_event
        await self.service.start(manager)
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = None
            await self.service.stop()

    def connect(self, port: int) -> None:
        self.http = http_client(f"http://127.0.0.1:{port}", timeout=30)
        self.client = openai_client(f"http://127.0.0.1:{port}")

    def saw(self, what: str, path: object = "") -> None:
        if (
            threading.get_ident() == self.thread
            and str(path).startswith(str(self.directory) if path else "")
            and not _is_of_doubles()
        ):
            self.on_loop.append(f"{what} {path}")

    def upload(self, *rows: dict) -> str:
        return self.client.files.create(
            file=("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()), purpose="fine-tune"
        ).id

    def create(self, **arguments) -> str:
        return self.client.fine_tuning.jobs.create(
            model="opt", training_file=self.upload(*ROWS), method=SUPERVISED, **arguments
        ).id

    def until(self, condition) -> None:
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it did not come to pass within 10 s")

    def until_status(self, job: str, status: str) -> None:
        self.until(lambda: self.client.fine_tuning.jobs.retrieve(job).status == status)

    def running(self) -> str:
        job = self.create()
        self.started(job)
        return job

    def started(self, job: str, step: int = 0) -> None:
        """The job is said to have started once the engine has it."""
        self.until(lambda: self.scheduler.job is not None and self.scheduler.job.job_id == job)
        self.until_status(job, "running")
        self.report(Started, step)

    def report(self, kind: type[Event], step: int = 0, **fields) -> None:
        """In SGLang's loop, as the real scheduler's events come."""

        async def say() -> None:
            self.scheduler.report(kind, step, **fields)

        asyncio.run_coroutine_threadsafe(say(), self.loop).result(10)

    def messages(self, job: str) -> list[str]:
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job, limit=100)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Another connection, as that of another process, holds SQLite's lock."""
        other = sqlite3.connect(self.directory / "mezo.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
            other.close()


_watching: list[Door] = []


def _is_of_doubles() -> bool:
    """What the real scheduler does is done in its own process."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("service_doubles.py"):
        frame = frame.f_back
    return frame is not None


def _audit(event: str, arguments: tuple) -> None:
    """Python tells of every file that is opened, renamed, removed or listed."""
    if _watching and (event == "open" or event.startswith(("os.", "shutil.", "sqlite3."))):
        for argument in arguments:
            if isinstance(argument, (str, bytes, os.PathLike)):
                _watching[0].saw(event, os.fsdecode(argument))


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    without_runtime_context(patch)
    door = Door(tmp_path_factory.mktemp("mezo"))
    for owner, name in (
        (Database, "_current"),
        (Database, "_begin"),
        (Database, "execute"),
        (Database, "require_unlocked"),
        (os, "fsync"),
    ):
        original = getattr(owner, name)

        def watched(*arguments, original=original, name=name):
            door.saw(name)
            return original(*arguments)

        patch.setattr(owner, name, watched)
    app = make_app(door.service)
    app.router.lifespan_context = door.lifespan
    _watching.append(door)
    with serving(app, lifespan="on") as port:
        door.connect(port)
        patch.setattr(http_server, "_global_state", None)
        yield door
    _watching.clear()
    patch.undo()


@pytest.fixture(autouse=True)
def nothing_on_the_loop(door):
    yield
    seen, door.on_loop = door.on_loop, []
    assert seen == []


def test_what_is_watched_is_seen(door):
    """The other tests would hold if nothing were."""

    async def touch() -> None:
        (door.directory / "mezo.lock").read_bytes()
        os.fsync(os.open(door.directory, os.O_RDONLY))
        door.service.store.files()

    asyncio.run_coroutine_threadsafe(touch(), door.loop).result(10)
    assert {line.partition(" ")[0] for line in door.on_loop} >= {"open", "fsync", "_current"}
    door.on_loop.clear()


def test_a_job_lives_and_every_route_answers_beside_the_loop(door):
    client, http = door.client, door.http
    job = door.create(validation_file=door.upload(ROW), suffix="first")
    door.started(job)
    door.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6, "learning_rate": 0.001})
    folder = door.directory / "jobs" / job / "run" / "checkpoint-4"
    write_adapter(folder, "of step 4")
    door.report(CheckpointSaved, 4, directory=str(folder))
    door.report(Evaluated, 4, max_steps=10, metrics={"eval_loss": 0.5, "eval_accuracy": 0.75})
    door.until(lambda: "Step 4/10: validation loss=0.5000, accuracy=0.7500" in door.messages(job))
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job).data
    assert http.post(f"/mezo/jobs/{job}/publish", json={"checkpoint": checkpoint.id}).json() == {
        "model": checkpoint.fine_tuned_model_checkpoint
    }
    assert http.post(f"/mezo/jobs/{job}/examples", json={"rows": ROWS}).json()["added"] == 3
    assert http.get(f"/mezo/jobs/{job}/metrics").json() == {"data": [], "next": 0}
    assert http.get("/mezo/status").json()["current_job"]["id"] == job
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    assert client.fine_tuning.jobs.resume(job).status == "queued"
    door.started(job, 4)
    write_adapter(door.directory / "jobs" / job / "run" / "adapter", "trained")
    door.report(Succeeded, 10, best_step=10, metrics={}, trained_tokens=123, train_seconds=1.0)
    door.until_status(job, "succeeded")
    assert "first" in door.manager.lora_registry._registry
    other = door.running()
    assert client.fine_tuning.jobs.cancel(other).status == "cancelled"
    assert [listed.id for listed in client.fine_tuning.jobs.list()] == [other, job]
    file = client.fine_tuning.jobs.retrieve(other).training_file
    assert client.files.retrieve(file).id in [listed.id for listed in client.files.list()]
    assert len(client.files.content(file).read()) > 0
    assert client.files.delete(file).deleted


def test_a_lock_of_another_process_delays_what_changes_the_store_and_nothing_else(door):
    job = door.running()
    before = door.client.files.list().data
    with door.locked():
        door.report(StepTaken, 3, max_steps=10, metrics={"loss": 0.25, "learning_rate": 0.001})  # its record waits
        assert door.client.fine_tuning.jobs.retrieve(job).status == "running"
        assert door.client.files.list().data == before
        assert door.http.get("/mezo/status").status_code == 200
        form = {"files": {"file": ("a.jsonl", b"{}\n")}, "data": {"purpose": "fine-tune"}}
        for path, body in ((f"/v1/fine_tuning/jobs/{job}/cancel", {}), ("/v1/files", form)):
            response = door.http.post(path, **body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_busy"), response.text
            assert int(response.headers["Retry-After"]) > 0
        assert not any("training loss=0.2500" in message for message in door.messages(job))
    door.until(lambda: "Step 3/10: training loss=0.2500" in door.messages(job))
    assert door.client.fine_tuning.jobs.retrieve(job).status == "running"  # nothing of what was refused has been done
    assert door.client.files.list().data == before
    assert door.client.fine_tuning.jobs.cancel(job).status == "cancelled"


def test_events_are_recorded_in_their_order_however_many_come_at_once(door):
    job = door.running()
    with door.locked():
        for step in range(1, 41):
            door.report(StepTaken, step, max_steps=100, metrics={"loss": step / 64, "learning_rate": 0.001})
    door.until(lambda: any(message.startswith("Step 40/100") for message in door.messages(job)))
    steps = [message for message in door.messages(job) if message.startswith("Step ")]
    assert steps == [f"Step {step}/100: training loss={step / 64:.4f}" for step in range(40, 0, -1)]
    door.client.fine_tuning.jobs.cancel(job)


# --- the threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    threads = ServiceThreads()
    threads.start()
    yield threads
    threads.close()


def test_work_is_done_in_its_order_in_one_thread_and_its_errors_come_back(threads):
    done = []

    async def main() -> None:
        threads.post(done.append, "posted")
        await asyncio.gather(*(threads.call(done.append, number) for number in range(5)))
        with pytest.raises(ZeroDivisionError):
            await threads.call(lambda: 1 / 0)
        assert len({await threads.call(threading.get_ident) for _ in range(5)} | {threading.get_ident()}) == 2

    asyncio.run(main())
    assert done == ["posted", *range(5)]


def test_who_reads_does_not_wait_for_what_changes(threads):
    async def main() -> None:
        hold = threading.Event()
        blocked = asyncio.create_task(threads.call(hold.wait, 30))
        assert await threads.read(lambda: 5) == 5
        assert not blocked.done()
        hold.set()
        assert await blocked

    asyncio.run(main())


def test_a_store_that_another_process_has_locked_does_not_keep_a_server_from_ending(tmp_path):
    door = Door(tmp_path)

    async def main() -> None:
        manager = TokenizerManager(Scheduler(), AutoTokenizer.from_pretrained(MODEL))
        manager.enable_metrics = False
        await door.service.start(manager)
        store = door.service.store
        await door.service.threads.call(store._database._connection.execute, "PRAGMA busy_timeout = 100")
        with door.locked():
            door.service.threads.post(store.adopt, {})
            await asyncio.wait_for(door.service.stop(), 60)

    asyncio.run(main())


def test_what_is_awaited_in_another_loop_is_cancelled_with_who_waits(threads):
    async def main() -> None:
        ended = asyncio.Event()
        here = asyncio.get_running_loop()

        async def long() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                here.call_soon_threadsafe(ended.set)

        waiting = asyncio.create_task(threads.run(long()))
        await threads.call(lambda: None)
        waiting.cancel()
        await ended.wait()
        assert await run_in(here, asyncio.sleep(0, "here")) == "here"

    asyncio.run(main())
