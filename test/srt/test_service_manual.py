"""Single evaluations and updates of a job that does not train."""

import asyncio
import math

import pytest

from service_server import (  # noqa: F401
    ROW,
    anyio_backend,
    eventually,
    impatience,
    open_at_once,
    runtime_context,
    server,
    serving,
    succeeded_and_opened,
    tokenizer,
)
from sglang.srt.mezo.service.jobs import manual
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.events import Failed, PerturbationDropped, PerturbationEvaluated, Started, StepTaken
from sglang.srt.mezo.service.wire.messages import ApplyUpdate, EvaluatePerturbed, HoldJob, StartJob, StopJob
from sglang.srt.mezo.service.wire.packed import unpack

pytestmark = pytest.mark.anyio

ALL_SEEDS = 2**64 - 1
GRADS = [0.5] * 8
LOSSES = {"loss_plus": [0.6], "loss_minus": [0.5], "projected_grad": [5.0]}


async def evaluate(server, job, kind=PerturbationEvaluated, zo_eps=1e-2, **result):
    """Ask for an evaluation, and have it reported."""
    before = len(server.scheduler.sent(EvaluatePerturbed))
    request = asyncio.create_task(server.manager.evaluate(job.id, [ROW], 7, zo_eps))
    await eventually(lambda: len(server.scheduler.sent(EvaluatePerturbed)) > before)
    [*_, command] = server.scheduler.sent(EvaluatePerturbed)
    server.scheduler.report(kind, operation=command.operation, **result)
    return await request


async def test_a_perturbation_of_a_succeeded_job_is_evaluated(server):
    job = await succeeded_and_opened(server, zo_eps=0.5)
    assert await evaluate(server, job, losses=LOSSES) == {"step": 10, **LOSSES}
    [command] = server.scheduler.sent(EvaluatePerturbed)
    assert (command.zo_random_seed, command.zo_eps, len(unpack(command.examples))) == (7, 1e-2, 1)
    [held] = server.scheduler.sent(HoldJob)
    assert held.config.resume_from_checkpoint
    await evaluate(server, job, zo_eps=None, losses=LOSSES)
    assert server.scheduler.sent(HoldJob) == [held]  # for both
    assert server.scheduler.sent(EvaluatePerturbed)[-1].zo_eps == 0.5


async def test_an_update_of_a_succeeded_job_is_served_at_once(server):
    job = await succeeded_and_opened(server)
    under_way = await server.tokenizer_manager.begin(job.adapter_name)
    answer = await server.manager.update(job.id, ALL_SEEDS, GRADS, 1e-3)
    assert answer == {"step": 11, "model": job.fine_tuned_model}
    assert await server.answer(job.adapter_name) == "step 11"
    assert server.tokenizer_manager.loaded[under_way][1] == "trained"
    [command] = server.scheduler.sent(ApplyUpdate)
    assert (command.zo_random_seed, command.projected_grad, command.learning_rate) == (ALL_SEEDS, GRADS, 1e-3)
    assert await server.manager.update(job.id, 1, GRADS, 1e-3, publish=False) == {"step": 12, "model": None}
    assert await server.answer(job.adapter_name) == "step 11"
    after = server.store.job(job.id)
    assert (after.status, after.step, after.version) == ("succeeded", 12, 2)
    for version in (3, 3):  # what is served already is not published again
        assert await server.manager.publish_checkpoint(job.id, None) == job.fine_tuned_model
        assert await server.answer(job.adapter_name) == "step 12"
        assert server.store.job(job.id).version == version


async def test_updates_that_come_to_the_step_that_was_published_are_published(server):
    """The job has ended at step 10, and its best adapter, from which updates go on, is of step 8."""
    job = await succeeded_and_opened(server)
    server.scheduler.step = 8
    for step in (9, 10):
        answer = await server.manager.update(job.id, step, GRADS, 1e-3, publish=False)
        assert answer == {"step": step, "model": None}
    assert await server.answer(job.adapter_name) == "trained"
    assert await server.manager.publish_checkpoint(job.id, None) == job.fine_tuned_model
    assert await server.answer(job.adapter_name) == "step 10"


async def test_a_paused_job_is_updated_served_and_resumed(server):
    job = await server.running()
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    await server.manager.pause(job.id)
    open_at_once(server)
    assert await server.manager.update(job.id, 1, GRADS, 1e-3) == {"step": 5, "model": None}
    assert await server.manager.publish_checkpoint(job.id, None) == f"opt:{job.adapter_name}"
    assert await server.answer(job.adapter_name) == "step 5"
    await server.manager.resume(job.id)
    await eventually(lambda: isinstance(server.scheduler.job, StartJob))
    assert server.scheduler.commands[-3] == StopJob(job_id=job.id)
    server.scheduler.report(Started, 5)
    server.scheduler.succeed()
    await server.until(job, "succeeded")


async def test_an_operation_that_the_engine_gives_up_says_why(server):
    job = await succeeded_and_opened(server)
    with pytest.raises(RequestError, match="the cache was flushed"):
        await evaluate(server, job, PerturbationDropped, message="the cache was flushed")
    server.scheduler.report(Failed, 10, message="out of memory", job_id=job.id, code="CapacityError")
    await evaluate(server, job, losses=LOSSES)
    assert server.store.job(job.id).status == "succeeded"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
async def test_losses_that_are_no_numbers_are_an_error(server, loss):
    job = await succeeded_and_opened(server)
    with pytest.raises(RequestError, match="zo_eps=0.01 .*lower zo_eps") as caught:
        await evaluate(server, job, losses=LOSSES | {"loss_plus": [loss]})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "zo_eps", "diverged")


async def test_an_update_has_a_number_for_each_direction(server):
    job = await succeeded_and_opened(server)
    with pytest.raises(RequestError, match="has 2 numbers, .*num_perturbations=8") as caught:
        await server.manager.update(job.id, 1, [0.5, 0.5], 1e-3)
    assert (caught.value.status, caught.value.param) == (400, "projected_grad")
    assert not server.scheduler.sent(ApplyUpdate)


async def test_what_this_version_does_not_take_is_said_before_anything_is_read(server):
    job = await succeeded_and_opened(server)
    server.store.update_job(job.id, config={**job.config, "zo_eps": -1.0})
    for call in (server.manager.evaluate(job.id, [ROW], 7, None), server.manager.update(job.id, 1, GRADS, 1e-3)):
        with pytest.raises(RequestError, match="zo_eps=-1.0") as caught:
            await call
        assert (caught.value.status, caught.value.param, caught.value.code) == (409, "zo_eps", "does_not_fit")


async def test_a_session_that_ends_in_mid_operation_fails_it(server):
    job = await succeeded_and_opened(server)
    request = asyncio.create_task(server.manager.evaluate(job.id, [ROW], 7, 1e-2))
    await eventually(lambda: server.scheduler.sent(EvaluatePerturbed))
    server.scheduler.report(Failed, 10, message="out of memory", code="CapacityError")
    with pytest.raises(RequestError, match="out of memory"):
        await request


async def test_training_goes_before_single_operations(server):
    job = await succeeded_and_opened(server)
    training = await server.running()
    for call in (server.manager.evaluate(job.id, [ROW], 7, 1e-2), server.manager.update(job.id, 1, GRADS, 1e-3)):
        with pytest.raises(RequestError, match=training.id) as caught:
            await call
        assert (caught.value.status, caught.value.code) == (409, "engine_busy")
    server.scheduler.succeed()
    await server.until(training, "succeeded")
    await evaluate(server, job, losses=LOSSES)


async def test_an_operation_is_finished_before_training_begins(server):
    job = await succeeded_and_opened(server)
    request = asyncio.create_task(server.manager.evaluate(job.id, [ROW], 7, 1e-2))
    await eventually(lambda: server.scheduler.sent(EvaluatePerturbed))
    waiting = await server.until(await server.create(), "queued")
    await asyncio.sleep(0.05)
    assert isinstance(server.scheduler.job, HoldJob)
    [command] = server.scheduler.sent(EvaluatePerturbed)
    server.scheduler.report(PerturbationEvaluated, operation=command.operation, losses=LOSSES)
    await request
    await server.started(waiting)


async def test_the_engine_is_given_back_after_a_while(server, monkeypatch):
    job = await succeeded_and_opened(server)
    for _ in range(3):
        await evaluate(server, job, losses=LOSSES)
    clocks = [
        task for task in asyncio.all_tasks() if task.get_coro().__name__ == "_give_back" and not task.cancelling()
    ]
    assert len(clocks) == 1
    monkeypatch.setattr(manual, "_IDLE_SECONDS", 0.05)
    for _ in range(2):
        await evaluate(server, job, losses=LOSSES)
        await eventually(lambda: server.scheduler.job is None)


async def test_an_engine_that_never_finds_the_time_is_left_alone(server, monkeypatch):
    monkeypatch.setattr(manual, "_TIMEOUT_SECONDS", 0.05)
    job = await server.succeeded()
    with pytest.raises(RequestError, match="did not find the time") as caught:  # to take the adapter up
        await server.manager.evaluate(job.id, [ROW], 7, 1e-2)
    assert caught.value.status == 503 and server.scheduler.job is None
    open_at_once(server)
    with pytest.raises(RequestError, match="did not find the time"):  # to evaluate
        await server.manager.evaluate(job.id, [ROW], 7, 1e-2)
    assert server.scheduler.job is None


@pytest.mark.parametrize("status", ["running", "queued", "failed", "cancelled"])
async def test_single_operations_are_for_paused_and_succeeded_jobs(server, status):
    job = await server.succeeded()
    server.store.update_job(job.id, status=status)
    with pytest.raises(RequestError, match=f"cannot evaluate a job that is {status}"):
        await server.manager.evaluate(job.id, [ROW], 7, 1e-2)
    with pytest.raises(RequestError, match=f"cannot update a job that is {status}"):
        await server.manager.update(job.id, 1, GRADS, 1e-3)
