"""Jobs from their creation to their end, with a scheduler that says what a test lets it say."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from service_doubles import ENGINE, Refusal, write_adapter
from service_server import ROW, ROWS, Server, anyio_backend, eventually, runtime_context, server, serving, tokenizer  # noqa: F401
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.service.jobs import tokenising
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.job_data import JobReader, shared_tokenizer
from sglang.srt.mezo.service.wire.events import CheckpointSaved, Evaluated, Failed, StepTaken, Warned
from sglang.srt.mezo.service.wire.messages import LoadExamples, MezoReqOutput, StartJob, StopJob
from sglang.srt.mezo.service.wire.packed import parts, unpack

pytestmark = pytest.mark.anyio


# --- from creation to success -----------------------------------------------------------------------------------------


async def test_a_job_trains_and_its_adapter_is_served(server):
    job = await server.create(
        validation=server.upload({**ROW, "prompt": "the plot is dull. It was"}, filename="dev.jsonl")
    )
    assert job.status == "validating_files"
    await server.started(job)
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6, "learning_rate": 0.001})
    server.scheduler.report(Evaluated, 4, max_steps=10, metrics={"eval_loss": 0.5, "eval_accuracy": 0.75})
    assert server.store.job(job.id).step == 4
    server.scheduler.report(Warned, 5, message="zo_eps is lost")
    assert server.store.job(job.id).fine_tuned_model is None
    server.scheduler.succeed(step=10)
    done = await server.until(job, "succeeded")
    assert (done.fine_tuned_model, done.trained_tokens, done.step, done.version, done.error) == (
        f"opt:{job.adapter_name}",
        123,
        10,
        1,
        None,
    )
    assert done.finished_at >= done.created_at
    assert server.messages(job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 4/10: training loss=0.6000",
        "Step 4/10: validation loss=0.5000, accuracy=0.7500",
        "zo_eps is lost",
        f"New fine-tuned model created: opt:{job.adapter_name}",
        "The job has successfully completed",
    ]
    step, evaluated = server.store.events(job.id, limit=5).data[4:2:-1]
    assert step.type == evaluated.type == "metrics"
    assert (step.data["step"], step.data["train_loss"], step.data["max_steps"]) == (4, 0.6, 10)
    assert (evaluated.data["valid_loss"], evaluated.data["eval_accuracy"]) == (0.5, 0.75)
    assert await server.answer(job.adapter_name) == "trained"


async def test_a_succeeded_job_leaves_the_metrics_of_its_steps_as_a_file(server, tmp_path):
    job = await server.running()
    lines = [
        {"step": 1, "loss": 0.75, "learning_rate": 1e-3},
        {"step": 2, "loss": 0.5},
        {"step": 2, "eval_loss": 0.625, "eval_accuracy": 0.5},
        {"step": 4, "eval_loss": 0.25},
        {"step": 3, "loss": 9.0},
        {"step": 3, "loss": 0.375},
    ]
    metrics = tmp_path / "jobs" / job.id / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert server.store.files(purpose="fine-tune-results").data == [] and job.result_files == []
    server.scheduler.succeed()
    done = await server.until(job, "succeeded")
    [result] = done.result_files
    file = server.store.file(result)
    assert (file.filename, file.purpose) == ("step_metrics.csv", "fine-tune-results") and server.store.files(
        purpose="fine-tune-results"
    ).data == [file]
    assert server.store.content(file).read_text() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
        "1,0.75,,,\n2,0.5,,0.625,0.5\n3,0.375,,,\n4,,,0.25,\n"
    )
    server.store.delete_file(result)
    assert server.store.files(purpose="fine-tune-results").data == [] and server.store.job(job.id).result_files == [
        result
    ]


async def test_a_job_whose_adapter_is_not_served_leaves_no_file(server):
    job = await server.running()
    server.tokenizer_manager.broken = "broken weights"
    server.scheduler.succeed(weights="broken weights")
    assert (await server.until(job, "failed")).result_files == []
    assert server.store.files(purpose="fine-tune-results").data == []


async def test_the_engine_gets_examples_and_configuration(server, tokenizer, tmp_path):
    job = await server.running(validation=server.upload(ROW))
    [train, evaluation] = server.scheduler.sent(LoadExamples)
    encoder = Encoder(tokenizer, ENGINE.context_length)
    expected = [encoder.encode(row)[0] for row in ROWS]
    assert (train.split, evaluation.split) == ("train", "eval")
    assert unpack(train.examples) == expected and unpack(evaluation.examples) == expected[:1]
    [start] = server.scheduler.sent(StartJob)
    assert start.portions == [(0, 3)] and start.config.objective == "classification"
    assert start.invocation == tokenizer(" It was", add_special_tokens=False).input_ids
    assert (start.base_model, start.config.target_modules) == ("/models/opt", ["q_proj", "v_proj"])
    config = start.config
    assert config.output_dir == str(tmp_path / "jobs" / job.id / "run")
    assert config.disable_tqdm and not config.resume_from_checkpoint and config.max_steps == 10


@pytest.mark.parametrize(
    "row, objective",
    [
        (ROW, "classification"),
        ({"prompt": "the food It was", "completion": " great"}, "completion"),
        ({"text": " It was great and the staff is great"}, "completion"),
    ],
)
async def test_the_data_decides_the_objective_of_a_job_that_names_none(server, row, objective):
    job = await server.running(row, **({"tuning": "lora", "invocation": None} if "text" in row else {}))
    assert server.scheduler.job.config.objective == server.store.job(job.id).config["objective"] == objective
    assert bool(server.scheduler.job.invocation) == ("text" not in row)


def test_commands_carry_bounded_parts(tokenizer):
    [example] = Encoder(tokenizer, 64).encode(ROW)
    assert [len(part) for part in parts([example] * 600)] == [256, 256, 88]
    long = replace(example, prompt=(5,) * 40_000)
    assert [len(part) for part in parts([example, long, long, example])] == [2, 2]
    assert [len(part) for part in parts([replace(example, prompt=(5,) * 70_000)] * 2)] == [1, 1]


def test_threads_share_a_tokenizer_that_others_change(tokenizer):
    used_elsewhere = deepcopy(tokenizer)
    used_elsewhere.backend_tokenizer.enable_truncation(3)
    encoder = Encoder(shared_tokenizer(used_elsewhere), 64)
    with ThreadPoolExecutor(4) as pool:
        examples = list(pool.map(encoder.encode, [ROW] * 400))
    assert examples == [Encoder(tokenizer, 64).encode(ROW)] * 400


async def test_jobs_run_one_at_a_time_in_their_order(server):
    jobs = [await server.create() for _ in range(3)]
    for job in jobs:
        await server.started(job)
        statuses = [server.store.job(other.id).status for other in jobs]
        assert statuses.count("running") == 1 and "queued" not in statuses[: jobs.index(job)]
        server.scheduler.succeed()
    await server.until(jobs[-1], "succeeded")


async def test_checkpoints_are_stored_and_served(server, tmp_path):
    job = await server.running()
    folder = tmp_path / "jobs" / job.id / "run" / "checkpoint-4"
    write_adapter(folder, "of step 4")
    server.scheduler.report(Evaluated, 2, max_steps=10, metrics={"eval_loss": 0.9})
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    for _ in range(2):
        server.scheduler.report(CheckpointSaved, 4, directory=str(folder))
    [checkpoint] = server.store.checkpoints(job.id).data
    assert checkpoint.metrics == {"step": 4, "train_loss": 0.6}
    server.scheduler.report(Evaluated, 4, max_steps=10, metrics={"eval_loss": 0.5, "eval_accuracy": 0.75})
    server.scheduler.report(Evaluated, 6, max_steps=10, metrics={"eval_loss": 0.4})
    [checkpoint] = server.store.checkpoints(job.id).data
    assert (checkpoint.step, checkpoint.name) == (4, f"{job.adapter_name}:ckpt-step-4")
    assert checkpoint.metrics == {
        "step": 4,
        "train_loss": 0.6,
        "valid_loss": 0.5,
        "full_valid_loss": 0.5,
        "valid_mean_token_accuracy": 0.75,
        "full_valid_mean_token_accuracy": 0.75,
    }
    assert server.messages(job).count("Checkpoint created at step 4") == 1
    assert await server.answer(checkpoint.name) == "of step 4"


async def test_a_command_gets_its_own_answer_after_one_whose_caller_went_away():
    """With SGLang's communicator, which gives an answer to whoever waits."""
    sent = []
    communicator = FanOutCommunicator(sent.append, fan_out=1)
    client = EngineClient(SimpleNamespace(auto_create_handle_loop=lambda: None, mezo_control_communicator=communicator))
    gone, waiting = (asyncio.create_task(client.call(StopJob(job_id=job_id))) for job_id in ("a", "b"))
    await eventually(lambda: sent)
    gone.cancel()
    await asyncio.wait([gone])
    for answered in ("a", "b"):
        await eventually(lambda: sent[-1].command.job_id == answered)
        communicator.handle_recv(MezoReqOutput(success=True, result={"job": answered}))
    assert await waiting == {"job": "b"}


# --- examples that are learned and judged by --------------------------------------------------------------------------


async def test_examples_of_the_validation_file_that_are_trained_on_are_counted(server):
    """As tokens: what is written otherwise is the same."""
    again = [
        {**ROW, "label": 0},
        {"label": 1, "options": ROW["options"], "prompt": ROW["prompt"]},
        {**ROW, "prompt": "the plot is dull. It was"},
    ]
    job = await server.until(
        await server.create(validation=server.upload(*again, filename="dev.jsonl")), "queued", "running"
    )
    [warning] = [event for event in server.store.events(job.id, limit=1000).data if event.level == "warn"]
    assert (
        warning.message
        == "2 of 3 examples of the validation file are in the training file too: the validation loss is in part of "
        "what is learned"
    )
    assert warning.data == {"shared_examples": 2}


async def test_appended_examples_that_are_judged_by_are_counted(server):
    dev = [{**ROW, "prompt": "the plot is dull. It was"}, {**ROW, "prompt": "the cast is fine. It was"}]
    job = await server.running(validation=server.upload(*dev, filename="dev.jsonl"))
    assert not [event for event in server.store.events(job.id, limit=1000).data if event.level == "warn"]
    await server.manager.append_rows(job.id, [ROW, dev[1], dev[1]])
    [warning] = [event for event in server.store.events(job.id, limit=1000).data if event.level == "warn"]
    assert (
        warning.message
        == "1 of 2 examples of the validation file are among the appended ones: the validation loss is in part of "
        "what is learned"
    )
    await server.manager.append_rows(job.id, [ROW])
    assert len([event for event in server.store.events(job.id, limit=1000).data if event.level == "warn"]) == 1


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def test_a_row_of_a_bad_line_fails_the_job_with_its_place(server, monkeypatch):
    monkeypatch.setattr(tokenising, "_SMALL_BYTES", 8 << 20)  # in this process, whatever its size
    bad = await server.create(ROW, "", '{"prompt": "%s"}' % ("x" * (4 << 20)))
    failed = await server.until(bad, "failed")
    assert failed.error["message"] == "train.jsonl:3: the line is longer than 4194304 bytes"
    await server.running()


async def test_a_bad_validation_file_is_named(server):
    for rows, message in ((["{"], "dev.jsonl:1: not JSON"), (["", " "], "dev.jsonl: no row")):
        failed = await server.until(
            await server.create(validation=server.upload(*rows, filename="dev.jsonl")), "failed"
        )
        assert failed.error["param"] == "validation_file" and failed.error["code"] == "invalid_validation_file"
        assert failed.error["message"].startswith(message)


async def test_a_job_that_the_engine_refuses_fails_alone(server):
    server.scheduler.refuses[StartJob] = Refusal("r=99 is not allowed: at most 16", "r")
    failed = await server.until(await server.create(), "failed")
    assert failed.error == {"code": "engine_refused", "message": "r=99 is not allowed: at most 16", "param": "r"}
    del server.scheduler.refuses[StartJob]
    await server.running()


async def test_a_job_that_fails_in_training_fails_alone(server):
    job = await server.running()
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    server.scheduler.report(Failed, 5, message="the losses are nan", code="DivergedError")
    failed = await server.until(job, "failed")
    assert (
        failed.error == {"code": "DivergedError", "message": "the losses are nan", "param": None} and failed.step == 4
    )
    await server.running()


@pytest.mark.parametrize("method", ["read", "invocation"])
async def test_a_bug_fails_the_job_and_not_the_service(server, monkeypatch, method):
    """``read`` is called in validation, ``invocation`` before the start as well."""
    calls = []

    def broken(self, job, *files):
        calls.append(job.id)
        if method == "read" or server.store.job(job.id).status == "running":
            raise ZeroDivisionError("secret")
        return original(self, job, *files)

    original = getattr(JobReader, method)
    with monkeypatch.context() as patch:
        patch.setattr(JobReader, method, broken)
        failed = await server.until(await server.create(), "failed")
    assert failed.error["code"] == "internal_error" and "ZeroDivisionError" in failed.error["message"]
    assert "secret" not in json.dumps(failed.error)
    await server.running()


async def test_an_adapter_that_cannot_be_loaded_fails_the_job(server, tmp_path):
    job = await server.running()
    server.tokenizer_manager.broken = "broken weights"
    server.scheduler.succeed(weights="broken weights")
    failed = await server.until(job, "failed")
    assert failed.error["code"] == "publish_failed" and "the weights are broken" in failed.error["message"]
    assert failed.version == 0 and not list((tmp_path / "jobs" / job.id / "adapters").iterdir())
    await server.running()
