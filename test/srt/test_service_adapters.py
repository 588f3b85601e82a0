"""Names that the server answers to: versions, checkpoints, and what single operations make of an adapter."""

import asyncio

import pytest

from service_doubles import write_adapter
from service_server import (  # noqa: F401
    ROW,
    anyio_backend,
    eventually,
    impatience,
    runtime_context,
    server,
    serving,
    succeeded_and_opened,
    tokenizer,
)
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.wire.errors import NotFound, PublishError, RequestError
from sglang.srt.mezo.service.wire.events import CheckpointSaved, StepTaken

pytestmark = pytest.mark.anyio


@pytest.fixture
def adapters(server, tmp_path):
    """Publishes weights under a name."""

    async def put(name: str, weights: str) -> None:
        write_adapter(tmp_path / weights, weights)
        await served_names.publish(server.tokenizer_manager, name, tmp_path / weights)

    return put


# --- the registry -----------------------------------------------------------------------------------------------------


async def test_a_request_keeps_the_version_that_it_came_for(server, adapters):
    await adapters("a", "one")
    under_way = await server.tokenizer_manager.begin("a")
    await adapters("a", "two")
    assert await server.answer("a") == "two"
    await asyncio.sleep(0.05)
    loaded = server.tokenizer_manager.loaded
    assert loaded[under_way][1] == "one" and len(loaded) == 2
    await server.tokenizer_manager.end(under_way)
    await eventually(lambda: len(loaded) == 1)
    assert await server.answer("a") == "two"


async def test_requests_never_miss_a_name_that_changes(server, adapters):
    await adapters("a", "0")
    done = False

    async def ask() -> list[int]:
        answers = []
        while not done:
            answers.append(int(await server.answer("a")))
            await asyncio.sleep(0)
        return answers

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for version in range(1, 20):
        await adapters("a", str(version))
    done = True
    for answers in await asyncio.gather(*asking):
        assert answers == sorted(answers) and len(answers) > 20
    await eventually(lambda: len(server.tokenizer_manager.loaded) == 1)


async def test_an_adapter_that_cannot_be_loaded_leaves_the_one_before(server, adapters):
    await adapters("a", "one")
    server.tokenizer_manager.broken = "two"
    with pytest.raises(PublishError, match="'a' cannot be loaded: the weights are broken"):
        await adapters("a", "two")
    assert await server.answer("a") == "one"
    assert len(server.tokenizer_manager.loaded) == 1


async def test_an_announced_adapter_is_loaded_when_it_is_asked_for(server, adapters, tmp_path):
    write_adapter(tmp_path / "x", "lazy")
    served_names.announce(server.tokenizer_manager, "x", tmp_path / "x")
    assert not server.tokenizer_manager.loaded and served_names.names(server.tokenizer_manager) == {"x"}
    assert await server.answer("x") == "lazy"
    await adapters("x", "eager")
    assert await server.answer("x") == "eager"


async def test_a_name_that_is_withdrawn_is_unknown_once_its_requests_are_answered(server, adapters):
    await adapters("a", "one")
    under_way = await server.tokenizer_manager.begin("a")
    await served_names.withdraw(server.tokenizer_manager, "a")
    with pytest.raises(ValueError, match="never been loaded"):
        await server.answer("a")
    assert under_way in server.tokenizer_manager.loaded
    await server.tokenizer_manager.end(under_way)
    await eventually(lambda: not server.tokenizer_manager.loaded)
    await served_names.withdraw(server.tokenizer_manager, "unknown")


# --- names of jobs ----------------------------------------------------------------------------------------------------


async def test_an_adapter_has_its_jobs_suffix_or_a_name_of_its_own(server):
    assert (await server.create(suffix="My.model_2-b")).adapter_name == "My.model_2-b"
    job = await server.create()
    assert job.adapter_name == f"ft-{job.id[-8:]}"


@pytest.mark.parametrize(
    "suffix", ["", ".", "..", "../x", "a/b", "a:b", "a@b", "-a", "_a", "a b", "a\n", "ä", "a" * 65, "a\x00"]
)
async def test_a_suffix_that_could_mean_something_else_is_refused(server, suffix):
    with pytest.raises(RequestError, match="is not allowed") as caught:
        server.manager.adapter_name_for("ftjob-0", suffix)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "suffix", "invalid_value")


async def test_a_name_has_one_holder(server, adapters):
    await adapters("loaded", "one")
    job = await server.succeeded(suffix="mine")
    failed = await server.until(await server.create("{", suffix="bad"), "failed")
    for name in ("loaded", "mine"):
        with pytest.raises(RequestError, match=name) as caught:
            server.manager.adapter_name_for("ftjob-0", name)
        assert (caught.value.status, caught.value.param, caught.value.code) == (409, "suffix", "name_taken")
    assert server.manager.adapter_name_for("ftjob-0", failed.adapter_name) == "bad"
    with pytest.raises(RequestError, match=job.id):  # two at the same time
        await server.manager.create_job(job)


async def test_checkpoints_of_a_cancelled_job_hold_its_name_until_it_is_deleted(server, tmp_path):
    job = await server.running(suffix="mine")
    folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
    write_adapter(folder, "of step 4")
    server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
    await server.manager.cancel(job.id)
    with pytest.raises(RequestError, match=f"job {job.id} has that name"):
        server.manager.adapter_name_for("ftjob-0", "mine")
    await server.manager.delete_model("mine")
    assert server.manager.adapter_name_for("ftjob-0", "mine") == "mine"


# --- publishing -------------------------------------------------------------------------------------------------------


async def test_a_running_jobs_adapter_is_served_on_request_and_then_its_result(server, tmp_path):
    job = await server.running()
    for step in (4, 6):
        server.scheduler.report(StepTaken, step, max_steps=10, metrics={"loss": 0.6})
        assert await server.manager.publish_checkpoint(job.id, None) == f"opt:{job.adapter_name}"
        assert await server.answer(job.adapter_name) == f"step {step}"
    assert (server.store.job(job.id).version, server.store.job(job.id).fine_tuned_model) == (2, None)
    server.scheduler.succeed()
    done = await server.until(job, "succeeded")
    assert done.version == 3 and await server.answer(job.adapter_name) == "trained"
    folders = tmp_path / "jobs" / job.id / "adapters"
    await eventually(lambda: [folder.name for folder in folders.iterdir()] == ["v3"])
    assert await server.manager.publish_checkpoint(job.id, None) == done.fine_tuned_model


async def test_whoever_sees_that_a_job_has_succeeded_is_answered_by_its_model(server, monkeypatch):
    job = await server.running()
    known, update_job = {}, server.store.update_job

    def update(job_id, *events, **changes):
        stored = update_job(job_id, *events, **changes)
        known[stored.status] = job.adapter_name in served_names.names(server.tokenizer_manager)
        return stored

    monkeypatch.setattr(server.store, "update_job", update)
    server.scheduler.succeed()
    await server.until(job, "succeeded")
    assert known["succeeded"] is True


async def test_a_publication_that_fails_leaves_the_version_before(server, tmp_path):
    job = await server.running()
    await server.manager.publish_checkpoint(job.id, None)
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    server.tokenizer_manager.broken = "step 4"
    with pytest.raises(PublishError):
        await server.manager.publish_checkpoint(job.id, None)
    assert server.store.job(job.id).version == 1 and await server.answer(job.adapter_name) == "step 0"
    assert [folder.name for folder in (tmp_path / "jobs" / job.id / "adapters").iterdir()] == ["v1"]


async def test_a_checkpoint_is_loaded_on_request(server, tmp_path):
    job, other = await server.running(), await server.create()
    folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
    write_adapter(folder, "of step 4")
    server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
    [checkpoint] = server.store.checkpoints(job.id).data
    for _ in range(2):
        name = await server.manager.publish_checkpoint(job.id, checkpoint.id)
    assert name == f"opt:{job.adapter_name}:ckpt-step-4"
    assert [weights for _, weights in server.tokenizer_manager.loaded.values()] == ["of step 4"]
    for job_id, id in ((job.id, "ftckpt_unknown"), (other.id, checkpoint.id)):
        with pytest.raises(NotFound, match="checkpoint"):
            await server.manager.publish_checkpoint(job_id, id)


async def test_what_was_served_is_served_after_a_restart(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running(suffix="mine")
        folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
        write_adapter(folder, "of step 4")
        server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
        server.scheduler.succeed()
        await server.until(job, "succeeded")
        deleted = await server.succeeded(suffix="gone")
        await server.manager.delete_model("gone")
    async with serving(tmp_path, tokenizer) as server:
        assert await server.answer("mine") == "trained"
        assert await server.answer("mine:ckpt-step-4") == "of step 4"
        assert server.store.job(deleted.id).fine_tuned_model == "opt:gone"
        with pytest.raises(ValueError, match="never been loaded"):
            await server.answer("gone")


async def test_a_deleted_model_is_gone_and_cannot_be_worked_on(server):
    job = await succeeded_and_opened(server, suffix="mine")
    await server.manager.delete_model("mine")
    with pytest.raises(ValueError, match="never been loaded"):
        await server.answer("mine")
    with pytest.raises(NotFound):
        await server.manager.delete_model("mine")
    for call in (server.manager.publish_checkpoint(job.id, None), server.manager.update(job.id, 1, [0.5] * 8, 1e-3)):
        with pytest.raises(RequestError, match="has been deleted"):
            await call
    again = await server.succeeded(suffix="mine")
    assert again.adapter_name == "mine" and await server.answer("mine") == "trained"


async def test_what_cannot_be_deleted(server, tmp_path):
    job = await server.running(suffix="mine")
    folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
    write_adapter(folder, "of step 4")
    server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
    for name, status in (("mine", 409), ("mine:ckpt-step-4", 400), ("other", 404)):
        with pytest.raises(RequestError) as caught:
            await server.manager.delete_model(name)
        assert (caught.value.status, caught.value.param) == (status, "model")
    assert await server.answer("mine:ckpt-step-4") == "of step 4"
