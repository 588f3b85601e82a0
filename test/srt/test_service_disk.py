"""A disk that takes no more: every request says so, no job is lost, and all goes on once there is room."""

import asyncio
import errno
import os
import sqlite3
import threading

import pytest
from starlette.testclient import TestClient

from service_app import make_app, make_service
from service_doubles import write_adapter
from service_server import (  # noqa: F401
    ROW,
    Server,
    anyio_backend,
    eventually,
    impatience,
    open_at_once,
    runtime_context,
    server,
    serving,
    tokenizer,
)
from sglang.srt.mezo.service.http import routes
from sglang.srt.mezo.service.jobs import queues, served_names
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.store.disk import disk_full
from sglang.srt.mezo.service.wire.errors import DiskFull, RequestError
from sglang.srt.mezo.service.wire.events import CheckpointSaved, Failed, StepTaken
from sglang.srt.mezo.service.wire.messages import (
    AppendExamples,
    ApplyUpdate,
    MezoReqOutput,
    SaveAdapter,
    StartJob,
    StopJob,
)
from sglang.srt.mezo.service.wire.packed import unpack
from small_disk import small_disk

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(queues, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(queues, "_MOST_ROOM_SECONDS", 0.02)


def take_writes(server: Server, taken: bool) -> None:
    """Whether the database takes writes; where it does not, SQLite says what it says on a disk that cannot be
    written."""
    server.store._database._connection.execute(f"PRAGMA query_only = {'OFF' if taken else 'ON'}")


async def goes_on(server: Server, job) -> None:
    """With the engine taken up anew."""
    starts = len(server.scheduler.sent(StartJob))
    take_writes(server, True)
    await eventually(lambda: len(server.scheduler.sent(StartJob)) > starts)
    await server.started(job)
    server.scheduler.succeed()
    await server.until(job, "succeeded")


def sqlite_error(statement: str, *pragmas: str) -> sqlite3.Error:
    """What SQLite raises itself."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")
    with pytest.raises(sqlite3.Error) as caught:
        connection.execute(statement)
    return caught.value


NO_ROOM = [
    *(
        OSError(number, os.strerror(number))
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    ),
    sqlite_error("INSERT INTO t VALUES (zeroblob(100000))", "max_page_count = 2"),
    sqlite_error("INSERT INTO t VALUES (1)", "query_only = ON"),
    DiskFull("the run's disk is full"),
]


# --- what counts as a full disk, and what a request is answered then --------------------------------------------------


@pytest.mark.parametrize("error", NO_ROOM, ids=str)
def test_a_write_that_the_disk_does_not_take_is_answered_with_507(tmp_path, monkeypatch, error):
    service = make_service(tmp_path)
    http = TestClient(make_app(service), raise_server_exceptions=False)

    async def full(*_):
        raise error

    monkeypatch.setattr(routes, "receive_file", full)
    answer = http.post("/v1/files")
    said = answer.json()["error"]
    assert (answer.status_code, said["code"], said["type"]) == (507, "disk_full", "server_error")
    assert str(error.strerror if isinstance(error, OSError) else error) in said["message"]
    service.store.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "too many open files"),
        FileNotFoundError(errno.ENOENT, "gone"),
        sqlite_error("nonsense"),
        ValueError(),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert disk_full(error) is None


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "FILE"}),
        ("POST", "/v1/fine_tuning/jobs/JOB/cancel", None),
        ("POST", "/v1/fine_tuning/jobs/JOB/pause", None),
        ("DELETE", "/v1/files/OTHER", None),
        ("DELETE", "/v1/models/tiny:ft-1", None),
    ],
)
def test_routes_on_a_store_that_takes_no_writes(tmp_path, method, path, body):
    service = make_service(tmp_path)
    http = TestClient(make_app(service), raise_server_exceptions=False)
    file, other = (
        http.post(
            "/v1/files",
            files={"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')},
            data={"purpose": "fine-tune"},
        ).json()["id"]
        for _ in range(2)
    )
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file, "suffix": "ft-1"}).json()[
        "id"
    ]
    service.store.update_job(job, version=1)
    service.store._database._connection.execute("PRAGMA query_only = ON")
    answer = http.request(
        method, path.replace("JOB", job).replace("OTHER", other), json=body and {**body, "training_file": file}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full"), answer.text
    assert service.store.job(job).status == "validating_files" and service.store.file_path(other).exists()
    service.close()


async def test_what_the_engine_could_not_write_is_told_apart(server, monkeypatch):
    async def full(request):
        return [MezoReqOutput(success=False, message="the server's disk takes no more", code="disk_full")]

    monkeypatch.setattr(server.tokenizer_manager, "mezo_control_communicator", full)
    with pytest.raises(DiskFull, match="takes no more"):
        await EngineClient(server.tokenizer_manager).call(StopJob(job_id="a"))


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [True, False], ids=["state written", "nothing written"])
async def test_a_job_whose_run_could_not_be_written_goes_on_once_there_is_room(server, written):
    job = await server.running()
    take_writes(server, written)
    server.scheduler.report(Failed, 4, message="the server's disk takes no more", code="disk_full")
    if written:
        await eventually(lambda: "The job waits: the server's disk takes no more" in server.messages(job))
    else:
        await asyncio.sleep(0.1)
        assert server.store.job(job.id).status == "running", "which is tried again and again"
    await goes_on(server, job)
    assert "The job waits: the server's disk takes no more" in server.messages(job)


async def test_a_job_that_fails_while_nothing_can_be_written_is_failed_later(server):
    job = await server.running()
    take_writes(server, False)
    server.scheduler.report(Failed, 4, message="the losses are nan", code="DivergedError")
    await asyncio.sleep(0.1)
    take_writes(server, True)
    assert (await server.until(job, "failed")).error["code"] == "DivergedError"
    await server.running()


async def test_another_process_that_holds_the_database_delays_a_state_and_loses_none(server, monkeypatch):
    job = await server.running()
    server.store._database._connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(server.store.directory / "mezo.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    seen = []

    def let_go() -> None:
        seen.append(server.store.job(job.id).status)
        other.execute("COMMIT")

    threading.Timer(0.2, let_go).start()
    server.scheduler.report(Failed, 4, message="the losses are nan", code="DivergedError")
    await server.until(job, "failed")
    assert seen == ["running"]


@pytest.mark.parametrize("action, becomes", [("pause", "paused"), ("cancel", "cancelled")])
async def test_a_job_that_could_not_be_stopped_for_lack_of_room_goes_on(server, action, becomes):
    job = await server.running()
    take_writes(server, False)
    with pytest.raises(sqlite3.OperationalError) as caught:
        await getattr(server.manager, action)(job.id)
    assert disk_full(caught.value) is not None and server.scheduler.job is None
    take_writes(server, True)
    await server.started(job)
    assert (await getattr(server.manager, action)(job.id)).status == becomes


async def test_a_job_that_could_not_be_started_or_queued_is_later(server):
    take_writes(server, False)
    with pytest.raises(sqlite3.OperationalError):
        await server.create()
    take_writes(server, True)
    first = await server.running()
    second = await server.until(await server.create(), "queued")
    server.scheduler.holds[StopJob] = asyncio.Event()
    cancelled = asyncio.create_task(server.manager.cancel(first.id))
    await eventually(lambda: server.scheduler.sent(StopJob))
    take_writes(server, False)
    server.scheduler.holds.pop(StopJob).set()
    with pytest.raises(sqlite3.OperationalError):
        await cancelled
    await asyncio.sleep(0.1)
    take_writes(server, True)
    await server.started(first)
    server.scheduler.succeed()
    await server.started(second)


async def test_a_result_that_cannot_be_stored_is_published_later(server, tmp_path):
    job = await server.running()
    await server.manager.publish_checkpoint(job.id, None)
    write_adapter(tmp_path / "jobs" / job.id / "run" / "checkpoint-4", "of step 4")
    take_writes(server, False)
    server.scheduler.report(StepTaken, 6, max_steps=10, metrics={"loss": 0.6})
    server.scheduler.report(CheckpointSaved, 4, directory=str(tmp_path / "jobs" / job.id / "run" / "checkpoint-4"))
    server.scheduler.succeed()
    await asyncio.sleep(0.1)
    assert await server.answer(job.adapter_name) == "step 0", "what is on record"
    await goes_on(server, job)
    assert await server.answer(job.adapter_name) == "trained"
    assert [checkpoint.step for checkpoint in server.store.checkpoints(job.id).data] == [4]


async def test_a_version_that_cannot_be_put_on_record_is_not_served(server, tmp_path):
    job = await server.running()
    await server.manager.publish_checkpoint(job.id, None)
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    take_writes(server, False)
    with pytest.raises(sqlite3.OperationalError):
        await server.manager.publish_checkpoint(job.id, None)
    assert await server.answer(job.adapter_name) == "step 0" and len(server.tokenizer_manager.loaded) == 1
    assert [folder.name for folder in (tmp_path / "jobs" / job.id / "adapters").iterdir()] == ["v1"]
    take_writes(server, True)
    await server.manager.publish_checkpoint(job.id, None)
    assert await server.answer(job.adapter_name) == "step 4"


async def test_a_first_version_that_cannot_be_put_on_record_is_not_served_either(server):
    job = await server.running()
    take_writes(server, False)
    with pytest.raises(sqlite3.OperationalError):
        await server.manager.publish_checkpoint(job.id, None)
    assert job.adapter_name not in served_names.names(server.tokenizer_manager)
    await eventually(lambda: not server.tokenizer_manager.loaded)
    take_writes(server, True)
    await server.manager.publish_checkpoint(job.id, None)
    assert await server.answer(job.adapter_name) == "step 0"


async def test_a_server_starts_on_a_full_disk_and_takes_up_its_job_later(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
    server = Server(tmp_path, tokenizer)
    take_writes(server, False)
    await server.start()
    await asyncio.sleep(0.1)
    assert server.store.job(job.id).status == "running" and server.scheduler.job is None
    await goes_on(server, job)
    await server.manager.stop()
    server.store.close()


# --- rows and steps ---------------------------------------------------------------------------------------------------


def refuse_for_room(server, kind: type):
    """The engine has no room for what a command writes."""
    handle = server.scheduler.handle

    async def handle_or_refuse(command):
        if isinstance(command, kind):
            return MezoReqOutput(success=False, message="the server's disk takes no more", code="disk_full")
        return await handle(command)

    server.scheduler.handle = handle_or_refuse
    return handle


async def test_rows_that_were_refused_for_lack_of_room_are_not_there(server, tmp_path):
    job = await server.running()
    handle = refuse_for_room(server, AppendExamples)
    with pytest.raises(DiskFull):
        await server.manager.append_rows(job.id, [ROW])
    assert not list((tmp_path / "jobs" / job.id).glob("appended*"))
    server.scheduler.handle = handle
    assert await server.manager.append_rows(job.id, [ROW]) == {"examples": 1, "step": 1}


async def test_rows_that_were_taken_before_the_start_survive_a_lack_of_room(server):
    job = await server.running()
    await server.manager.pause(job.id)
    assert await server.manager.append_rows(job.id, [ROW, ROW]) == {"examples": 2, "step": None}
    handle = refuse_for_room(server, AppendExamples)
    await server.manager.resume(job.id)
    await server.started(job)
    await eventually(lambda: server.messages(job)[-1].startswith("The job waits"))
    server.scheduler.handle = handle
    await server.started(job)
    await eventually(lambda: server.scheduler.sent(AppendExamples))
    assert len(unpack(server.scheduler.sent(AppendExamples)[-1].examples)) == 2


async def test_rows_count_even_if_that_cannot_be_told(server):
    job = await server.running()
    take_writes(server, False)
    assert await server.manager.append_rows(job.id, [ROW]) == {"examples": 1, "step": 1}
    assert len(server.scheduler.train) == 4


async def test_an_update_that_could_not_be_served_says_that_its_step_is_taken(server):
    job = await server.succeeded()
    open_at_once(server)
    handle = refuse_for_room(server, ApplyUpdate)
    with pytest.raises(DiskFull):
        await server.manager.update(job.id, 7, [0.5] * 8, 1e-3)
    server.scheduler.handle = handle
    refuse_for_room(server, SaveAdapter)
    with pytest.raises(
        RequestError, match="the step is taken, and the adapter is at step 11, but not served: the server's disk"
    ) as caught:
        await server.manager.update(job.id, 7, [0.5] * 8, 1e-3)
    assert (caught.value.status, caught.value.code) == (507, "disk_full")
    assert await server.answer(job.adapter_name) == "trained"


# --- a disk -----------------------------------------------------------------------------------------------------------


async def test_on_a_disk_that_is_full_nothing_is_lost(tmp_path, tokenizer):
    with small_disk(tmp_path / "disk", megabytes=3) as disk:
        async with serving(disk.path, tokenizer) as server:
            job, waiting = await server.running(), await server.create()
            await server.until(waiting, "queued")
            disk.fill()
            for i in range(200):  # what SQLite has room for in its own files already
                server.scheduler.report(StepTaken, i, max_steps=1000, metrics={"loss": 0.6})
            with pytest.raises((OSError, sqlite3.Error)) as caught:
                await server.manager.append_rows(job.id, [ROW] * 100)
            assert disk_full(caught.value)
            with pytest.raises((OSError, sqlite3.Error)) as caught:
                while True:
                    await server.create()
            assert disk_full(caught.value)
            server.scheduler.report(Failed, 200, message="the server's disk takes no more", code="disk_full")
            with pytest.raises((OSError, sqlite3.Error)):
                while True:
                    server.upload(*[ROW] * 100)
            await asyncio.sleep(0.1)
            disk.free()
            await server.started(job)
            server.scheduler.succeed()
            await server.until(job, "succeeded")
            await server.started(waiting)
        async with serving(disk.path, tokenizer) as server:
            assert await server.answer(job.adapter_name) == "trained"
            await server.started(waiting)
