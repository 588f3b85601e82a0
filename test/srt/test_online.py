"""Fine-tuning through a real server with the official client: the whole way from files to answers."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, NotFoundError

from live_server import ROOT, peft_log_probs, prompt_log_probs, reviews
from online_series import greedy, offline_series, series, server, traffic  # noqa: F401
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.estimator import projected_grads
from sglang.srt.mezo.core.seed_log import SeedLog

MAIN_JOB = {"invocation": " It was"}
OTHERS = [pytest.param(tuning, marks=pytest.mark.slow) for tuning in ("lora", "prefix")]


SHORT = {
    **MAIN_JOB,
    "max_steps": 30,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "num_perturbations": 7,
    "max_tokens_per_batch": 32,
}


TEXTS = [
    "the plot is thin, but the acting is superb. It was",
    "never again will i eat here. It was",
    "no such words in here",
]


@pytest.fixture(scope="module")
def files(server) -> tuple[str, str]:
    return server.upload(reviews("train", 1000), "train.jsonl"), server.upload(
        reviews("validation", 200), "validation.jsonl"
    )


@pytest.fixture(scope="module")
def trained(server, files):
    """The main job, trained by the server."""
    job = server.create_job(*files, suffix="reviews", **MAIN_JOB)
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.finished_at is None
    return server.wait_for(job.id, "succeeded")


def accuracy(server, model: str, rows: list[dict]) -> float:
    """Share of rows whose right option is the likelier one."""
    prompts = [row["prompt"] + option for row in rows for option in row["options"]]
    scores = [
        values[-1]
        for start in range(0, len(prompts), 100)
        for values in prompt_log_probs(server, model, prompts[start : start + 100])
    ]
    return sum((scores[2 * i] < scores[2 * i + 1]) == bool(row["label"]) for i, row in enumerate(rows)) / len(rows)


# --- from files to answers --------------------------------------------------------------------------------------------


def test_the_main_job_lifts_held_out_accuracy_as_it_does_offline(server, trained):
    assert trained.status == "succeeded" and trained.fine_tuned_model == "reviews-model:reviews"
    assert trained.trained_tokens > 50_000 and trained.finished_at >= trained.created_at and trained.error is None
    held_out = reviews("test", 600)
    assert accuracy(server, server.model, held_out) < 0.6
    assert accuracy(server, trained.fine_tuned_model, held_out) >= 0.85


def test_the_new_model_is_listed_and_answers_in_chat_and_completions(server, trained):
    listed = {model.id: model for model in server.client.models.list()}
    assert set(listed) == {server.model, trained.fine_tuned_model}
    assert server.client.models.retrieve(trained.fine_tuned_model).id == trained.fine_tuned_model
    options = {"good": [" great"], "bad": [" terrible"]}
    for text, kind in (("the acting is superb.", "good"), ("the acting is awful.", "bad")):
        other = options["bad" if kind == "good" else "good"][0]
        completion = server.client.completions.create(
            model=trained.fine_tuned_model, prompt=f"{text} It was", max_tokens=1, temperature=0, logprobs=5
        )
        chat = server.client.chat.completions.create(
            model=trained.fine_tuned_model,
            messages=[{"role": "user", "content": f"{text} It was"}],
            max_tokens=1,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
        )
        assert chat.choices[0].message.content == completion.choices[0].text
        (right, wrong) = (
            prompt_log_probs(server, trained.fine_tuned_model, [f"{text} It was{o}"])[0][-1]
            for o in (options[kind][0], other)
        )
        assert right > wrong


def test_a_jobs_name_is_neither_given_to_another_adapter_nor_taken_from_its_own(server, trained, tmp_path):
    folder = shutil.copytree(server.directory / "jobs" / trained.id / "adapters" / "v1", tmp_path / "adapter")
    for route, more in (("load", {"lora_path": str(folder)}), ("unload", {})):
        answer = server.http.post(f"/{route}_lora_adapter", json={"lora_name": "reviews", **more})
        assert answer.status_code == 400
        assert f"lora_name='reviews' is not allowed: job {trained.id} has that name" in answer.json()["error_message"]
    assert server.client.models.retrieve(trained.fine_tuned_model).owned_by == "sglang-mezo"


def test_a_fine_tuned_model_is_trained_further(server, files, trained):
    """Its adapter is the first of the new run, bit for bit; what nobody sends is as it was."""
    job = server.create_job(files[0], suffix="further", model=trained.fine_tuned_model, max_steps=1)
    job = server.wait_for(job.id, "succeeded")
    assert (job.model, job.fine_tuned_model) == (trained.fine_tuned_model, "reviews-model:further")
    sent = job.to_dict()["method"]["supervised"]["hyperparameters"]
    assert (sent["invocation"], sent["r"], sent["tuning"]) == (" It was", 8, "alora")
    weights = [
        server.run_directory(one) / name / "adapter_model.safetensors"
        for one, name in ((trained.id, "adapter"), (job.id, "initial_adapter"))
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    log = SeedLog.open(server.run_directory(job.id) / "seed_log")
    assert len(log) == 1 and log.header.initial_adapter is not None
    assert prompt_log_probs(server, job.fine_tuned_model, TEXTS) != prompt_log_probs(server, "reviews-model", TEXTS)


def test_events_and_checkpoints_tell_the_story_and_page(server, trained):
    jobs = server.client.fine_tuning.jobs
    events = list(jobs.list_events(trained.id, limit=7))  # pages by itself
    assert len({event.id for event in events}) == len(events) > 20
    messages = [event.message for event in reversed(events)]
    assert (
        messages[0] == f"Created fine-tuning job: {trained.id}" and messages[-1] == "The job has successfully completed"
    )
    assert "Step 250/250: training loss=" in " ".join(messages)
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
    assert steps == sorted(steps) and steps[-1] == 250
    checkpoints = list(jobs.checkpoints.list(trained.id, limit=2))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [250, 200, 150, 100, 50]
    assert checkpoints[0].metrics.valid_loss < checkpoints[-1].metrics.valid_loss
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{trained.fine_tuned_model}:ckpt-step-250"
    early = accuracy(server, checkpoints[-1].fine_tuned_model_checkpoint, reviews("test", 60))
    assert early > 0.6, "a checkpoint answers by its name"


def test_the_result_file_holds_the_metrics_of_the_steps(server, trained):
    run = server.run_directory(trained.id)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    header, *lines = server.client.files.content(trained.result_files[0]).text.splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    rows = {int(line.split(",")[0]): line.split(",")[1:] for line in lines}
    for name, column in (("loss", 0), ("eval_loss", 2), ("eval_accuracy", 3)):
        expected = {record["step"]: record[name] for record in records if name in record}
        assert {step: float(row[column]) for step, row in rows.items() if row[column]} == expected and len(
            expected
        ) >= 5, name


def test_lists_page(server, files, trained):
    listed = list(server.client.files.list(limit=1))
    assert {file.id for file in listed} >= set(files)
    assert server.client.files.content(files[1]).text.splitlines()[0] == json.dumps(reviews("validation", 1)[0])
    assert [job.id for job in server.client.fine_tuning.jobs.list(limit=1)][-1] == trained.id


def test_the_example_runs_against_the_server(server):
    command = [
        sys.executable,
        "examples/finetune_in_server.py",
        "--base-url",
        f"{server.url}/v1",
        "--suffix",
        "example",
    ]
    short = ["--hyperparameters", '{"max_steps": 20}']
    done = subprocess.run([*command, *short], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Step 20/20: training loss=" in done.stdout and "reviews-model:example is served:" in done.stdout
    refused = subprocess.run([*command, *short], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 2 and "example" in refused.stderr and "Traceback" not in refused.stderr


def test_a_job_can_be_paused_resumed_and_cancelled(server, files):
    jobs = server.client.fine_tuning.jobs
    job = server.create_job(files[0], suffix="stopped", **{**MAIN_JOB, "max_steps": 100_000})
    server.wait_for_step(job.id, 20)
    assert jobs.pause(job.id).status == "paused"
    steps = len(SeedLog.open(server.run_directory(job.id) / "seed_log"))
    assert steps >= server.last_step(job.id) >= 20
    other = server.create_job(files[0], suffix="meanwhile", **SHORT)
    server.wait_for(other.id, "succeeded")
    assert len(SeedLog.open(server.run_directory(job.id) / "seed_log")) == steps
    assert jobs.resume(job.id).status in ("queued", "running")
    server.wait_for_step(job.id, steps + 20)
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(NotFoundError):
        server.client.models.retrieve("reviews-model:stopped")


# --- what is served is what the files say -----------------------------------------------------------------------------


def test_a_job_trains_by_a_reward_of_the_operators_beside_requests(server, files):
    few = server.upload(reviews("validation", 10), "few.jsonl")
    settings = {**MAIN_JOB, "reward": "brevity", "max_new_tokens": 4, "temperature": 1.0, "zo_eps": 0.1}
    with traffic(server, TEXTS, clients=1) as answers:
        job = server.create_job(files[0], few, suffix="brief", batch_size=4, max_steps=3, **settings)
        server.wait_for_step(job.id, 1)
        server.until(lambda: len(answers) >= 2 * len(TEXTS))
    job = server.wait_for(job.id, "succeeded")
    assert len(set(answers)) == len(TEXTS), "greedy answers stay the same meanwhile"
    assert job.method.supervised.hyperparameters.model_dump()["reward"] == "brevity"
    run = server.run_directory(job.id)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first, last = [line for line in lines if "eval_reward" in line]
    assert -4 <= first["eval_reward"] == -first["eval_loss"] < 0
    assert any(gradient for record in SeedLog.open(run / "seed_log").records() for gradient in record.projected_grads)
    told = [event.message for event in server.client.fine_tuning.jobs.list_events(job.id)]
    assert f"Step 3/3: validation loss={last['eval_loss']:.4f}, reward={last['eval_reward']:.4f}" in told


def test_a_reward_that_is_not_registered_is_refused(server, files):
    with pytest.raises(BadRequestError, match="one of brevity, the server's --mezo-rewards") as caught:
        server.create_job(files[0], suffix="bad", reward="os:system")
    assert caught.value.param == "method.supervised.hyperparameters.reward"


def published(server, job_id: str) -> Path:
    """The newest version of the job's adapter on disk."""
    return max((server.directory / "jobs" / job_id / "adapters").glob("v*"), key=lambda path: int(path.name[1:]))


@pytest.mark.parametrize("tuning", ["alora", *OTHERS])
def test_answers_equal_peft_on_the_saved_files_before_and_after_updates(server, files, tuning):
    settings = {**SHORT, "tuning": tuning, "invocation": " It was" if tuning == "alora" else None}
    job = server.create_job(files[0], suffix=f"peft-{tuning}", **settings)
    job = server.wait_for(job.id, "succeeded")
    before = None
    for update in range(4):
        served = prompt_log_probs(server, job.fine_tuned_model, TEXTS)
        again = prompt_log_probs(server, job.fine_tuned_model, TEXTS)  # from the cache
        for expected, got, cached in zip(peft_log_probs(published(server, job.id), TEXTS), served, again, strict=True):
            assert torch.allclose(torch.tensor(got), expected, atol=1e-4, rtol=0)
            assert torch.allclose(torch.tensor(cached), expected, atol=1e-4, rtol=0)
        assert before is None or abs(served[0][-1] - before) > 1e-3, "an update must matter"
        before = served[0][-1]
        batch = {"rows": reviews("train", 4), "zo_random_seed": 1000 + update}
        losses = server.http.post(f"/mezo/jobs/{job.id}/evaluate", json=batch).raise_for_status().json()
        estimates = projected_grads(
            losses["loss_plus"], losses["loss_minus"], MezoConfig.zo_eps, MezoConfig().estimator, scale_by_loss_std=True
        )
        assert losses["projected_grad"] == pytest.approx(estimates, rel=1e-5) and len(estimates) == 7
        step = {
            "zo_random_seed": 1000 + update,
            "projected_grad": [1.0, -1.0, 0.5, 0.0, 2.0, -0.5, -1.0],
            "learning_rate": 0.3,
        }
        answer = server.http.post(f"/mezo/jobs/{job.id}/update", json=step).raise_for_status().json()
        assert answer == {"step": 31 + update, "model": job.fine_tuned_model}


@pytest.mark.parametrize("tuning", ["alora", *OTHERS])
def test_a_quiet_server_makes_the_offline_series_bit_for_bit_and_a_busy_one_nearly(server, tmp_path, tuning):
    rows = reviews("train", 64)
    file = server.upload(rows)
    # More directions than the server has slots for.
    settings = {**SHORT, "tuning": tuning, "invocation": " It was", "save_steps": 0, "num_perturbations": 15}
    if tuning != "alora":  # whole prompts run at every point, and beside requests a tenth of the time is little
        settings |= {"invocation": None, "max_steps": 10, "batch_size": 8}
    assert server.http.post("/flush_cache").status_code == 200
    quiet = server.create_job(file, suffix=f"quiet-{tuning}", **settings)
    server.wait_for(quiet.id, "succeeded")
    online = series(server.run_directory(quiet.id))
    assert len(online) == settings["max_steps"]
    assert online == offline_series(server, quiet, rows, tmp_path)
    with traffic(server, [row["prompt"] for row in rows]) as answers:
        busy = server.create_job(file, suffix=f"busy-{tuning}", **settings)
        server.wait_for(busy.id, "succeeded")
    assert len(answers) > 10
    for beside, alone in zip(series(server.run_directory(busy.id)), online, strict=True):
        assert beside[0] == alone[0]
        assert beside[1] == pytest.approx(alone[1], rel=1e-4)
        assert beside[2] == pytest.approx(alone[2], rel=1e-4, abs=2e-4)


def test_answers_of_the_base_model_are_the_same_while_a_job_trains(server, files):
    prompts = [row["prompt"].removesuffix(" It was") for row in reviews("test", 24)]
    alone = {prompt: greedy(server, prompt) for prompt in prompts}
    job = server.create_job(files[0], suffix="beside", **{**MAIN_JOB, "max_steps": 100_000})
    server.wait_for_step(job.id, 5)
    first = server.last_step(job.id)
    with traffic(server, prompts) as answers:
        server.until(lambda: len(answers) > 3 * len(prompts))
    server.wait_for_step(job.id, first + 5)
    server.client.fine_tuning.jobs.cancel(job.id)
    assert [answer for prompt, answer in answers if answer != alone[prompt]] == []


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_examples_are_added_and_the_adapter_is_served_while_the_job_runs(server, files):
    job = server.create_job(files[0], suffix="growing", **{**MAIN_JOB, "max_steps": 100_000})
    server.wait_for_step(job.id, 10)
    added = (
        server.http.post(f"/mezo/jobs/{job.id}/examples", json={"rows": reviews("test", 20)}).raise_for_status().json()
    )
    assert added["added"] == 20 and added["step"] > 10
    model = server.http.post(f"/mezo/jobs/{job.id}/publish", json={}).raise_for_status().json()["model"]
    first = prompt_log_probs(server, model, TEXTS)
    server.wait_for_step(job.id, added["step"] + 20)
    assert server.http.post(f"/mezo/jobs/{job.id}/publish", json={}).raise_for_status().json()["model"] == model
    assert prompt_log_probs(server, model, TEXTS) != first
    server.client.fine_tuning.jobs.cancel(job.id)


def test_flush_pause_and_health_go_together_with_a_running_job(server, files):
    job = server.create_job(files[0], suffix="flushed", **{**MAIN_JOB, "max_steps": 100_000})
    server.wait_for_step(job.id, 5)
    for _ in range(3):
        step = server.last_step(job.id)
        assert server.http.post("/flush_cache").status_code == 200
        assert server.http.get("/health_generate").status_code == 200
        server.wait_for_step(job.id, step + 5)
    assert server.http.post("/pause_generation", json={"mode": "in_place"}).status_code == 200
    paused = len(SeedLog.open(server.run_directory(job.id) / "seed_log"))
    threading.Event().wait(1.5)
    assert len(SeedLog.open(server.run_directory(job.id) / "seed_log")) <= paused + 1
    assert server.http.post("/continue_generation", json={}).status_code == 200
    server.wait_for_step(job.id, paused + 5)
    server.client.fine_tuning.jobs.cancel(job.id)
    assert server.http.post("/flush_cache").status_code == 200


def test_metrics_are_beside_those_of_sglang(server, trained):
    metrics = server.http.get("/metrics/").text
    values = {
        line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("sglang:mezo")
    }
    assert values["sglang:mezo_steps_total"] >= 250
    assert values["sglang:mezo_prefix_tokens_reused_total"] > values["sglang:mezo_prefix_tokens_computed_total"] > 0
    for name in ("train_loss", "projected_grad", "learning_rate", "share", "step_seconds_count", "piece_seconds_count"):
        assert f"sglang:mezo_{name}" in values
