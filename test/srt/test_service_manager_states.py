"""Jobs that are paused, resumed and cancelled."""

import asyncio

import pytest

from service_server import ROW, ROWS, Server, anyio_backend, eventually, runtime_context, server, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.jobs.job_data import JobReader
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError
from sglang.srt.mezo.service.wire.events import Failed, StepTaken, Succeeded
from sglang.srt.mezo.service.wire.messages import LoadExamples, StartJob, StopJob

pytestmark = pytest.mark.anyio


# --- pause, resume, cancel --------------------------------------------------------------------------------------------


async def test_a_paused_job_gives_the_engine_up_and_goes_on_later(server):
    first, second = await server.running(), await server.create()
    paused = await server.manager.pause(first.id)
    assert paused.status == "paused" and server.scheduler.commands[-1] == StopJob(job_id=first.id)
    await server.started(second)
    assert (await server.manager.resume(first.id)).status == "queued"
    server.scheduler.succeed()
    await server.started(first)
    assert server.scheduler.job.config.resume_from_checkpoint
    assert server.messages(first)[-4:] == [
        "Fine-tuning job started",
        "The job has been paused",
        "The job has been resumed, and waits for its turn",
        "Fine-tuning job goes on from its last step",
    ]
    server.scheduler.succeed()
    await server.until(first, "succeeded")


async def test_a_pause_is_stored_after_the_engine_has_stopped(server):
    job = await server.running()
    server.scheduler.holds[StopJob] = asyncio.Event()
    pause = asyncio.create_task(server.manager.pause(job.id))
    await eventually(lambda: server.scheduler.sent(StopJob))
    server.scheduler.report(StepTaken, 7, max_steps=10, metrics={"loss": 0.5})
    assert (server.store.job(job.id).status, server.store.job(job.id).step) == ("running", 7)
    server.scheduler.step = 8
    server.scheduler.holds[StopJob].set()
    paused = await pause
    assert (paused.status, paused.step) == ("paused", 8)


async def test_events_of_a_job_that_is_not_running_are_ignored(server):
    job = await server.running()
    await server.manager.pause(job.id)
    before = server.store.job(job.id), server.messages(job)
    for kind, data in (
        (StepTaken, {"metrics": {"loss": 1.0}, "max_steps": 10}),
        (Failed, {"message": "no", "code": "x"}),
        (Succeeded, {"best_step": 1, "metrics": {}, "train_seconds": 1.0, "trained_tokens": 1}),
    ):
        server.scheduler.report(kind, 9, job_id=job.id, **data)
    server.scheduler.report(StepTaken, 9, job_id="ftjob-unknown", max_steps=10, metrics={"loss": 1.0})
    await asyncio.sleep(0.05)
    assert (server.store.job(job.id), server.messages(job)) == before


async def test_a_job_is_cancelled_for_good(server):
    job = await server.running()
    cancelled = await server.manager.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    with pytest.raises(RequestError, match="cannot cancel a job that is cancelled") as caught:
        await server.manager.cancel(job.id)
    assert (caught.value.status, caught.value.code) == (400, "invalid_state")
    await server.running()


async def test_a_job_that_ends_while_it_is_cancelled_is_cancelled(server):
    job = await server.running()
    hold = server.scheduler.holds[StopJob] = asyncio.Event()
    cancel = asyncio.create_task(server.manager.cancel(job.id))
    await eventually(lambda: server.scheduler.sent(StopJob))
    server.scheduler.succeed()
    hold.set()
    assert (await cancel).status == "cancelled"
    await server.running()
    assert server.store.job(job.id).fine_tuned_model is None
    assert job.adapter_name not in served_names.names(server.tokenizer_manager)


@pytest.mark.parametrize("action", ["cancel", "pause"])
@pytest.mark.parametrize("moment", [LoadExamples, StartJob])
async def test_a_job_is_stopped_on_its_way_to_the_engine(server, moment, action):
    hold = server.scheduler.holds[moment] = asyncio.Event()
    job = await server.create()
    await eventually(lambda: server.scheduler.sent(moment))
    stopping = asyncio.create_task(getattr(server.manager, action)(job.id))
    await asyncio.sleep(0.05)
    hold.set()
    assert (await stopping).status == {"cancel": "cancelled", "pause": "paused"}[action]
    await server.running()
    assert server.scheduler.sent(StopJob) == [StopJob(job_id=job.id)]


async def test_a_job_is_cancelled_while_its_files_are_validated(server, monkeypatch):
    reads = asyncio.Event()
    loop = asyncio.get_running_loop()
    original = JobReader.read

    def slow(self, job, *files):
        asyncio.run_coroutine_threadsafe(reads.wait(), loop).result()
        return original(self, job, *files)

    monkeypatch.setattr(JobReader, "read", slow)
    job = await server.create()
    await asyncio.sleep(0.05)
    with pytest.raises(RequestError, match="cannot pause a job that is validating_files"):
        await server.manager.pause(job.id)
    await server.manager.cancel(job.id)
    reads.set()
    await server.running()
    assert server.store.job(job.id).status == "cancelled"


@pytest.mark.parametrize(
    "status, possible",
    [
        ("paused", {"resume", "cancel"}),
        ("succeeded", set()),
        ("failed", set()),
        ("cancelled", set()),
        ("queued", {"pause", "cancel"}),
    ],
)
async def test_what_can_be_done_in_which_state(server, status, possible):
    await server.running()
    waiting = await server.until(await server.create(), "queued")
    for action in ("resume", "pause", "cancel"):
        job = server.store.update_job(waiting.id, status=status)
        if action in possible:
            await getattr(server.manager, action)(job.id)
            continue
        with pytest.raises(RequestError, match=f"cannot {action} a job that is {status}"):
            await getattr(server.manager, action)(job.id)
        assert server.store.job(job.id) == job


@pytest.mark.parametrize("call", ["cancel", "pause", "resume"])
async def test_an_unknown_job_is_not_found(server, call):
    with pytest.raises(NotFound):
        await getattr(server.manager, call)("ftjob-unknown")
