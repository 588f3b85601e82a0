"""Jobs from their creation to their end, with a scheduler that says what a test lets it say."""

import asyncio
import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from service_doubles import ENGINE, Refusal, write_adapter
from service_server import ROW, ROWS, Server, anyio_backend, eventually, runtime_context, server, serving, tokenizer  # noqa: F401
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.service.jobs import publish, tokenising
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.job_data import JobReader, shared_tokenizer
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError
from sglang.srt.mezo.service.wire.events import (
    CheckpointSaved,
    Evaluated,
    Failed,
    Started,
    StepTaken,
    Succeeded,
    Warned,
)
from sglang.srt.mezo.service.wire.messages import AppendExamples, LoadExamples, MezoReqOutput, StartJob, StopJob
from sglang.srt.mezo.service.wire.packed import parts, unpack
from sglang.srt.mezo.training.run_directory import read_segments

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
    assert start.segments == [(0, 3)] and start.objective == "classification"
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
        ({"text": " It was great and the staff is great"}, "language_modeling"),
    ],
)
async def test_the_data_decides_the_objective_of_a_job_that_names_none(server, row, objective):
    job = await server.running(row, **({"tuning": "lora", "invocation": None} if "text" in row else {}))
    assert server.scheduler.job.objective == server.store.job(job.id).config["objective"] == objective
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


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{not json", "not JSON"),
        ("[1]", "a JSON object is needed"),
        ({"question": "?"}, "have none of the forms"),
        ({**ROW, "label": 2}, "label=2"),
        ({**ROW, "prompt": "no invocation"}, "invocation tokens"),
        ({**ROW, "prompt": "good " * 70 + "It was"}, "more than the context of 64"),
        ({**ROW, "options": [" good"] * 129}, "129 options are too many: at most 128"),
        (
            {**ROW, "prompt": "all right. It was", "options": [f" {i}" + " good film" * 20 for i in range(100)]},
            "its 100 options take",
        ),
        ('{"prompt": "%s"}' % ("x" * (4 << 20)), "the line is longer than 4194304 bytes"),
        ({"prompt": "all right. It was", "completion": " great"}, "nothing to choose from"),
    ],
)
async def test_a_bad_row_fails_the_job_with_its_place(server, line, reason, monkeypatch):
    monkeypatch.setattr(tokenising, "_SMALL_BYTES", 8 << 20)  # in this process, whatever its size
    bad = await server.create(ROW, "", line)
    failed = await server.until(bad, "failed")
    assert failed.error["code"] == "invalid_training_file" and failed.error["param"] == "training_file"
    assert failed.error["message"].startswith("train.jsonl:3: ") and reason in failed.error["message"]
    assert failed.finished_at is not None
    assert failed.error["message"] in server.messages(bad)[-1]
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
    assert job.adapter_name not in publish.names(server.tokenizer_manager)


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


# --- rows that come later ---------------------------------------------------------------------------------------------


async def test_rows_are_added_to_a_running_job(server, tmp_path):
    job = await server.running()
    server.scheduler.report(StepTaken, 4, max_steps=10, metrics={"loss": 0.6})
    assert await server.manager.append_rows(job.id, [ROW, ROW]) == {"examples": 2, "step": 5}
    assert await server.manager.append_rows(job.id, [ROW]) == {"examples": 1, "step": 5}
    assert [len(command.examples) for command in server.scheduler.sent(AppendExamples)] == [2, 1]
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
    assert server.scheduler.segments == [(0, 3), (1, 3)]


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
    assert read_segments(tmp_path / "jobs" / job.id / "run" / "segments.json") == [(0, 3), (5, 3), (7, 4)]
    await server.manager.resume(job.id)
    await eventually(lambda: server.scheduler.job is not None)
    assert server.scheduler.job.segments == [(0, 3), (5, 3), (7, 4)]
    assert server.scheduler.train == trained
    before = len(server.scheduler.sent(AppendExamples))
    server.scheduler.report(Started, 6)
    await eventually(lambda: len(server.scheduler.sent(AppendExamples)) == before + 1)
    assert len(server.scheduler.sent(AppendExamples)[-1].examples) == 5


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
        assert server.scheduler.job.segments == [(0, 3), (5, 1)]
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
        assert len(server.scheduler.sent(AppendExamples)[0].examples) == 2


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
