"""A server with other flags, or another base model, than the one before: nothing is trained or served as what it is
not, and all goes on with the right ones."""

import asyncio
import copy

import pytest

from service_doubles import ENGINE, Refusal, write_adapter
from service_server import ROW, ROWS, anyio_backend, eventually, impatience, runtime_context, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.events import BaseModelReplaced, CheckpointSaved, Failed, StepTaken
from sglang.srt.mezo.service.wire.messages import StartJob

pytestmark = pytest.mark.anyio

OTHER_MODEL = {"base_model": "sha256:other"}


async def interrupted(directory, tokenizer, *rows, **config):
    """A job that a server was training when it ended."""
    async with serving(directory, tokenizer) as server:
        job = await server.running(*rows, **config)
        server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    return job


async def goes_on(directory, tokenizer, job) -> None:
    async with serving(directory, tokenizer) as server:
        await server.started(job)
        assert server.scheduler.job.config.resume_from_checkpoint and server.store.job(job.id).error is None
        server.scheduler.succeed()
        await server.until(job, "succeeded")
        assert await server.answer(job.adapter_name) == "trained"


@pytest.mark.parametrize(
    "engine, config, reason",
    [
        ({"max_lora_rank": 4}, {"r": 8}, "r=8 is not allowed: from 1 to 4, the server's --max-lora-rank"),
        ({"max_loras_per_batch": 4}, {"estimator": "two_sided"}, "--max-loras-per-batch=4"),
        ({"target_modules": ["q_proj"]}, {}, "some of q_proj, which this server adapts"),
        ({"kv_capacity": 100}, {"max_tokens_per_batch": 200}, "from 1 to 100, the size of the KV pool"),
        ({"no_alora": "a reason"}, {}, "cannot serve aLoRA adapters: a reason"),
        ({"context_length": 4}, {}, "more than the context of 4"),
        (OTHER_MODEL, {}, "another base model"),
    ],
)
async def test_a_job_that_the_flags_do_not_fit_waits_for_the_right_ones(tmp_path, tokenizer, engine, config, reason):
    job = await interrupted(tmp_path, tokenizer, **config)
    for _ in range(2):
        async with serving(tmp_path, tokenizer, **engine) as server:
            held = await server.until(job, "paused")
            assert (
                reason in held.error["message"]
                and reason in server.messages(job)[-1]
                and not server.scheduler.sent(StartJob)
            )
            fitting = await server.create(
                ROW, ROW, r=2, target_modules=["q_proj"], tuning="lora", invocation=None, max_tokens_per_batch=50
            )
            others = await server.until(fitting, "failed", "queued", "running")
            assert others.status != "failed" or "more than the context" in reason, "others are not kept waiting"
            if others.status != "failed":
                await server.manager.cancel(fitting.id)
    await goes_on(tmp_path, tokenizer, job)


async def test_a_job_that_the_engine_cannot_take_up_waits_too(tmp_path, tokenizer):
    """What only the engine knows of: its room, or the type of its weights."""
    job = await interrupted(tmp_path, tokenizer)
    async with serving(tmp_path, tokenizer, max_loras_per_batch=6) as server:
        server.scheduler.refuses[StartJob] = Refusal("5 adapter slots are needed", None)
        reason = "5 adapter slots are needed; of the server's settings max_loras_per_batch is 6 and was 8"
        assert (await server.until(job, "paused")).error == {"code": "does_not_fit", "message": reason, "param": None}
    async with serving(tmp_path, tokenizer, kv_capacity=1000) as server:
        await server.started(job)
        server.scheduler.report(Failed, 4, message="1000 tokens do not fit", code="CapacityError")
        assert "kv_capacity is 1000 and was 4000" in (await server.until(job, "paused")).error["message"]
        assert (await server.manager.resume(job.id)).status == "validating_files"
        await server.started(job)
        server.scheduler.report(Failed, 4, message="the losses are nan", code="DivergedError")
        assert (await server.until(job, "failed")).error["code"] == "DivergedError"


async def test_a_job_whose_rows_are_rendered_otherwise_now_waits(tmp_path, tokenizer):
    job = await interrupted(tmp_path, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    async with serving(tmp_path, other) as server:
        await server.started(job)
        server.scheduler.report(Failed, 4, message="the training examples are not those of the run", code="DataError")
        assert "of the server's settings rendering is" in (await server.until(job, "paused")).error["message"]
    await goes_on(tmp_path, tokenizer, job)


async def test_a_job_that_fails_with_the_flags_that_it_was_created_for_fails(tmp_path, tokenizer):
    job = await interrupted(tmp_path, tokenizer)
    async with serving(tmp_path, tokenizer, max_lora_rank=1) as server:
        await server.until(job, "paused")
    async with serving(tmp_path, tokenizer) as server:
        await server.started(job)
        server.scheduler.report(Failed, 4, message="1000 tokens do not fit", code="CapacityError")
        await server.until(job, "failed")


async def test_what_a_user_has_paused_stays_paused(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        await server.manager.pause(job.id)
    async with serving(tmp_path, tokenizer, **OTHER_MODEL) as server:
        with pytest.raises(RequestError, match="another base model") as caught:
            await server.manager.resume(job.id)
        assert (caught.value.status, caught.value.code) == (409, "base_model_changed")
        for call in (
            server.manager.evaluate(job.id, [ROW], 7, 1e-2),
            server.manager.update(job.id, 7, [0.5], 1e-3),
            server.manager.publish_checkpoint(job.id, None),
        ):
            with pytest.raises(RequestError, match="another base model"):
                await call
        await asyncio.sleep(0.05)
        assert server.store.job(job.id).status == "paused" and not server.scheduler.sent(StartJob)
    async with serving(tmp_path, tokenizer) as server:
        await asyncio.sleep(0.1)
        assert server.store.job(job.id).status == "paused" and server.store.job(job.id).error is None
        await server.manager.resume(job.id)
        await server.started(job)


async def test_waiting_jobs_wait_for_their_base_model_and_can_be_cancelled(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        await server.running()
        queued, other = [await server.until(await server.create(), "queued") for _ in range(2)]
    async with serving(tmp_path, tokenizer, **OTHER_MODEL) as server:
        for job in (queued, other):
            assert (await server.until(job, "paused")).error["code"] == "base_model_changed"
        assert (await server.manager.cancel(other.id)).status == "cancelled"
    async with serving(tmp_path, tokenizer) as server:
        await eventually(lambda: server.store.job(queued.id).status == "queued")
        assert server.store.job(other.id).status == "cancelled"


@pytest.mark.parametrize("engine", [{"max_lora_rank": 4}, {"target_modules": ["q_proj"]}, OTHER_MODEL], ids=str)
async def test_adapters_are_served_on_their_own_base_model_and_where_there_is_room_only(tmp_path, tokenizer, engine):
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running(suffix="mine", r=8)
        folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
        write_adapter(folder, "of step 4")
        server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
        server.scheduler.succeed()
        await server.until(job, "succeeded")
        [checkpoint] = server.store.checkpoints(job.id).data
        before = len(server.messages(job))
    for _ in range(2):
        async with serving(tmp_path, tokenizer, **engine) as server:
            for name in ("mine", checkpoint.name):
                assert not server.manager.serves(name)
                with pytest.raises(ValueError, match="never been loaded"):
                    await server.answer(name)
            await eventually(lambda: len(server.messages(job)) == before + 1)
            assert server.messages(job)[-1].startswith("The model is not served: ")
            for which in (None, checkpoint.id):
                with pytest.raises(RequestError) as caught:
                    await server.manager.publish_checkpoint(job.id, which)
                assert caught.value.status == 409
            with pytest.raises(RequestError, match="has that name"):
                server.manager.adapter_name_for("ftjob-0", "mine")
            await asyncio.sleep(0.05)
    async with serving(tmp_path, tokenizer) as server:
        assert await server.answer("mine") == "trained" and await server.answer(checkpoint.name) == "of step 4"
        assert server.manager.serves("mine")
        await eventually(lambda: server.messages(job)[-1] == "The model is served again")
    async with serving(tmp_path, tokenizer, **engine) as server:
        await server.manager.delete_model("mine")
        assert server.manager.adapter_name_for("ftjob-0", "mine") == "mine"


async def test_jobs_of_an_earlier_version_belong_to_the_model_that_they_are_found_with(tmp_path, tokenizer):
    job = await interrupted(tmp_path, tokenizer)
    async with serving(tmp_path, tokenizer, max_lora_rank=1) as server:
        await server.until(job, "paused")
        server.store.update_job(job.id, engine={})
    async with serving(tmp_path, tokenizer, **OTHER_MODEL) as server:
        await server.started(job)
        assert server.store.job(job.id).engine["base_model"] == "sha256:other"


async def test_weights_that_are_replaced_while_the_server_runs_are_another_base_model(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:
        done = await server.succeeded(suffix="mine")
        job = await server.running()
        waiting = await server.until(await server.create(), "queued")

        def replace_weights(fingerprint: str) -> None:
            server.manager.on_event(BaseModelReplaced(fingerprint=fingerprint))

        replace_weights("replaced:1")
        server.scheduler.report(Failed, 4, message="base_model=...", code="BaseModelError")
        for one in (job, waiting):
            assert (await server.until(one, "paused")).error["code"] == "base_model_changed"
        await eventually(lambda: not server.manager.serves("mine"))
        await eventually(lambda: not server.tokenizer_manager.loaded)
        new = await server.running()
        assert new.engine["base_model"] == "replaced:1"
        replace_weights(ENGINE.base_model)
        server.scheduler.report(Failed, 1, message="base_model=...", code="BaseModelError")
        assert (await server.until(new, "paused")).error["code"] == "base_model_changed"
        await server.started(job)
        assert await server.answer("mine") == "trained" and "The model is served again" in server.messages(done)
