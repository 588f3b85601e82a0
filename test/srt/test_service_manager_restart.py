"""Rows that come later, and jobs that a restart has interrupted."""

import asyncio
import json
import shutil
import sqlite3
import threading
from contextlib import closing

import pytest

from service_doubles import Refusal, write_adapter
from service_server import ROW, ROWS, Server, anyio_backend, eventually, runtime_context, server, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.core.integrity import require_sums
from sglang.srt.mezo.service.http.protocol import job_object
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.jobs.job_data import AppendedRows
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.events import Started, StepTaken
from sglang.srt.mezo.service.wire.messages import AppendExamples
from sglang.srt.mezo.service.wire.packed import unpack
from sglang.srt.mezo.training.run_directory import read_portions

pytestmark = pytest.mark.anyio


# --- rows that come later ---------------------------------------------------------------------------------------------


async def test_rows_are_added_to_a_running_job(server, tmp_path):
    job = await server.running()
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    assert await server.manager.append_rows(job.id, [ROW, ROW]) == {"examples": 2, "step": 5}
    assert await server.manager.append_rows(job.id, [ROW]) == {"examples": 1, "step": 5}
    assert [len(unpack(command.examples)) for command in server.scheduler.sent(AppendExamples)] == [2, 1]
    written = (tmp_path / "jobs" / job.id / "appended-1.jsonl").read_text().splitlines()
    assert list(map(json.loads, written)) == [ROW, ROW]
    assert server.messages(job)[-1] == "1 appended examples are drawn from step 5 on"


async def test_rows_for_a_waiting_job_count_once_it_has_started(server):
    first = await server.running()
    job = await server.until(await server.create(), "queued")
    assert await server.manager.append_rows(job.id, [ROW]) == {"examples": 1, "step": None}
    await server.manager.pause(job.id)
    assert await server.manager.append_rows(job.id, [ROW, ROW]) == {"examples": 2, "step": None}
    await server.manager.resume(job.id)
    assert not server.scheduler.sent(AppendExamples)
    await server.manager.cancel(first.id)
    await server.started(job)
    await eventually(lambda: len(server.scheduler.sent(AppendExamples)) == 2)
    assert server.scheduler.portions == [(0, 3), (1, 3)]


async def test_a_run_goes_on_with_the_rows_that_it_was_given(server, tmp_path):
    """Two requests between the same two steps are one entry of the engine's file; a third comes later, a fourth in
    the pause."""
    job = await server.running()
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    await server.manager.append_rows(job.id, [ROW, ROW])
    await server.manager.append_rows(job.id, [ROW])
    server.scheduler.report(StepTaken, 6, max_steps=10, metrics={"loss": 0.6})
    await server.manager.append_rows(job.id, [ROWS[1]] * 4)
    await server.manager.pause(job.id)
    await server.manager.append_rows(job.id, [ROW] * 5)
    trained = list(server.scheduler.train)
    assert read_portions(tmp_path / "jobs" / job.id / "run" / "segments.json") == [(0, 3), (5, 3), (7, 4)]
    await server.manager.resume(job.id)
    await eventually(lambda: server.scheduler.job is not None)
    assert server.scheduler.job.portions == [(0, 3), (5, 3), (7, 4)]
    assert server.scheduler.train == trained
    before = len(server.scheduler.sent(AppendExamples))
    server.scheduler.report(Started, 6)
    await eventually(lambda: len(server.scheduler.sent(AppendExamples)) == before + 1)
    assert len(unpack(server.scheduler.sent(AppendExamples)[-1].examples)) == 5


@pytest.mark.parametrize(
    "rows, reason, param",
    [
        ([ROW, {**ROW, "label": "x"}], r"rows\[1\]: label='x'", "rows.1"),
        ([{"prompt": "so. It was", "completion": " great"}], r"rows\[0\]: one option", "rows.0"),
        ([ROW] * 257, "at most 256 examples", "rows"),
    ],
)
async def test_rows_that_cannot_be_used_leave_no_trace(server, tmp_path, rows, reason, param):
    job = await server.running()
    with pytest.raises(RequestError, match=reason) as caught:
        await server.manager.append_rows(job.id, rows)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert not server.scheduler.sent(AppendExamples) and not list((tmp_path / "jobs" / job.id).glob("appended*"))


async def test_rows_that_the_engine_refuses_are_dropped(server, tmp_path):
    job = await server.running()
    server.scheduler.refuses[AppendExamples] = Refusal("a sequence is too long", None)
    with pytest.raises(RequestError, match="a sequence is too long"):
        await server.manager.append_rows(job.id, [ROW])
    assert not list((tmp_path / "jobs" / job.id).glob("appended*"))
    assert "1 appended examples were not taken: a sequence is too long" in server.messages(job)
    del server.scheduler.refuses[AppendExamples]
    assert (await server.manager.append_rows(job.id, [ROW]))["step"] == 1


async def test_rows_are_for_jobs_that_still_train(server):
    job = await server.succeeded()
    with pytest.raises(RequestError, match="cannot append rows to a job that is succeeded"):
        await server.manager.append_rows(job.id, [ROW])


async def test_rows_that_a_job_can_draw_no_more_are_not_taken(server, tmp_path, monkeypatch):
    """It succeeds while they are written."""
    job = await server.running()
    add, written, over = AppendedRows.add, threading.Event(), threading.Event()

    def slowly(self, rows):
        path = add(self, rows)
        written.set()
        over.wait()
        return path

    monkeypatch.setattr(AppendedRows, "add", slowly)
    request = asyncio.create_task(server.manager.append_rows(job.id, [ROW]))
    await asyncio.to_thread(written.wait)
    server.store.update_job(job.id, status="succeeded")
    over.set()
    with pytest.raises(RequestError, match="cannot append rows to a job that is succeeded"):
        await request
    assert not list((tmp_path / "jobs" / job.id).glob("appended*"))


def test_a_sum_that_was_left_without_its_rows_does_no_harm(tmp_path):
    (tmp_path / "appended-1.sha256").write_text("")  # of a server that was killed
    path = AppendedRows(tmp_path).add([ROW])
    assert path.name == "appended-1.jsonl"
    require_sums(tmp_path, [path.name], "appended-1.sha256")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["appended-1.jsonl", "appended-1.sha256"]


# --- after a restart --------------------------------------------------------------------------------------------------


async def test_an_interrupted_job_goes_on_after_a_restart(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
        waiting = await server.until(await server.create(), "queued")
        await server.manager.append_rows(job.id, [ROW])
        write_adapter(
            tmp_path / "jobs" / job.id / "run" / "checkpoint-3", "of step 3"
        )  # and killed before it was reported
    async with serving(tmp_path, tokenizer) as server:
        await server.started(job)
        assert server.scheduler.job.config.resume_from_checkpoint
        assert server.scheduler.job.portions == [(0, 3), (5, 1)]
        assert "The job is resumed after a restart of the server" in server.messages(job)
        assert [checkpoint.step for checkpoint in server.store.checkpoints(job.id).data] == [3]
        server.scheduler.report(Started, 5)  # the log had one more step than had been told
        assert server.store.job(job.id).step == 5
        server.scheduler.succeed()
        await server.started(waiting)
        assert await server.answer(job.adapter_name) == "trained"


async def test_an_interrupted_job_fails_after_a_restart_where_that_is_wanted(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        waiting = await server.until(await server.create(), "queued")
    async with serving(tmp_path, tokenizer, on_restart="fail") as server:
        assert (await server.until(job, "failed")).error["code"] == "server_restarted"
        await server.started(waiting)


async def test_rows_that_a_killed_server_had_not_sent_are_sent(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        server.scheduler.holds[AppendExamples] = asyncio.Event()
        request = asyncio.create_task(server.manager.append_rows(job.id, [ROW, ROW]))
        await eventually(lambda: server.scheduler.sent(AppendExamples))
        request.cancel()
    async with serving(tmp_path, tokenizer) as server:
        await server.started(job)
        await eventually(lambda: server.scheduler.sent(AppendExamples))
        assert len(unpack(server.scheduler.sent(AppendExamples)[0].examples)) == 2


async def test_what_an_ended_server_has_tokenised_goes_with_its_job(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        waiting = await server.until(await server.create(), "queued")
    folders = [tmp_path / "jobs" / one.id for one in (job, waiting)]
    for folder in folders:
        (folder / ".examples.abcd").mkdir()  # of a process that was killed
    async with serving(tmp_path, tokenizer, on_restart="fail") as server:
        await server.until(job, "failed")
        await server.started(waiting)
        assert [sorted(path.name for path in folder.glob("*examples*")) for folder in folders] == [[], ["examples"]]


async def test_jobs_of_a_later_version_keep_nobody_from_working(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        served = await server.succeeded(suffix="served")
        interrupted = await server.running()
        for job in (served, interrupted):
            config = {name: value for name, value in job.config.items() if name != "max_steps"}
            server.store.update_job(job.id, config={**config, "zo_flavour": "new"})
    async with serving(tmp_path, tokenizer) as server:
        held = await server.until(interrupted, "paused")
        assert held.error["code"] == "does_not_fit" and "zo_flavour='new' is not allowed" in held.error["message"]
        assert not server.manager.serves("served")
        assert job_object(server.store.job(served.id))["method"]["supervised"]["hyperparameters"]["max_steps"] == "auto"
        await server.succeeded(suffix="after")


async def test_a_name_that_another_adapter_has_is_not_a_jobs(tmp_path, tokenizer):
    """Such as one of ``--lora-paths``."""
    async with serving(tmp_path, tokenizer) as server:
        job = await server.succeeded(suffix="reviews")
    write_adapter(tmp_path / "other", "another")
    server = Server(tmp_path, tokenizer)
    served_names.announce(server.tokenizer_manager, "reviews", tmp_path / "other")
    await server.start()
    try:
        assert await server.answer("reviews") == "another" and not server.manager.serves("reviews")
        told = "The model is not served: the name is that of another adapter, which is loaded"
        await eventually(lambda: server.messages(job)[-1] == told)
        await server.manager.delete_model("reviews")
        assert server.store.job(job.id).adapter_name == ""
    finally:
        await server.manager.stop()
        server.store.close()


async def test_half_a_run_is_begun_anew(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        (tmp_path / "jobs" / job.id / "run" / "seed_log").write_bytes(b"")
    async with serving(tmp_path, tokenizer) as server:
        await server.started(job)
        assert not server.scheduler.job.config.resume_from_checkpoint


async def test_a_job_whose_row_is_damaged_is_in_no_other_jobs_way(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        first = await server.running()
        second = await server.create(suffix="second")
        await server.until(second, "queued")
    with closing(sqlite3.connect(tmp_path / "mezo.sqlite")) as connection, connection:
        connection.execute("UPDATE jobs SET config = '{' WHERE id = ?", (first.id,))
    async with serving(tmp_path, tokenizer) as server:
        await server.started(second)
        assert [job.id for job in server.store.jobs().data] == [second.id]
        with pytest.raises(RequestError, match=f"{first.id}.*damaged"):
            await server.manager.cancel(first.id)
        server.scheduler.succeed()
        await server.until(second, "succeeded")


@pytest.mark.parametrize("lost", ["seed_log", "config.json"])
async def test_a_run_that_has_lost_a_part_is_named_and_stays_as_it_is(tmp_path, tokenizer, lost):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        run = tmp_path / "jobs" / job.id / "run"
        (run / "checkpoint-5").mkdir()
        (run / lost).unlink()
        before = sorted(path.name for path in run.iterdir())
    async with serving(tmp_path, tokenizer) as server:
        job = await server.until(job, "failed")
        assert (
            job.error["code"] == "run_damaged"
            and f"has lost its {lost}" in job.error["message"]
            and "checkpoint-5" in job.error["message"]
        )
        assert sorted(path.name for path in run.iterdir()) == before


async def test_a_run_whose_folder_is_gone_is_not_begun_anew(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
        shutil.rmtree(tmp_path / "jobs" / job.id / "run")
    async with serving(tmp_path, tokenizer) as server:
        job = await server.until(job, "failed")
        assert job.error["code"] == "run_damaged" and "was at step 4 and has lost its folder" in job.error["message"]


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "changed"])
@pytest.mark.parametrize("name", ["segments.json", "appended-1.jsonl", "training file"])
async def test_what_a_run_has_drawn_from_is_named_where_it_is_damaged(tmp_path, tokenizer, name, cut):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        await server.manager.append_rows(job.id, [ROW])
        folder = tmp_path / "jobs" / job.id
        path = {"segments.json": folder / "run" / name, "training file": server.store.file_path(job.training_file)}.get(
            name, folder / name
        )
    data = path.read_bytes()
    damaged = (
        data[:5]
        if cut
        else data.replace(b"0", b"1", 1)
        if name == "segments.json"
        else data.replace(b"movie", b"novie", 1)
    )
    path.write_bytes(damaged)
    if name == "training file":  # which the run does without as long as it has its examples
        async with serving(tmp_path, tokenizer) as server:
            await server.started(job)
        shutil.rmtree(folder / "examples")
    async with serving(tmp_path, tokenizer) as server:
        job = await server.until(job, "failed")
        assert (job.training_file if name == "training file" else name) in job.error["message"] and job.error[
            "code"
        ] != "internal_error"
    assert path.read_bytes() == damaged != data


async def test_a_server_without_tokenizer_does_not_train(tmp_path):
    server = Server(tmp_path, None)
    with pytest.raises(ValueError, match="skip-tokenizer-init"):
        await server.start()
    server.store.close()
