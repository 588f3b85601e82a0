"""A server whose disk fills up, that is asked to end in the midst of work, and that is started anew with other flags
and on another model: one store goes through all of it, in the order of the tests."""

import shutil
import threading

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from clients import http_client
from live_server import MODEL, LiveServer, reviews
from small_disk import small_disk

JOB = {"invocation": " It was", "num_perturbations": 7, "logging_steps": 1, "save_steps": 20, "r": 8}
SECONDS = 60  # a server that does not end within these does not end


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with small_disk(tmp_path_factory.mktemp("lifecycle") / "disk", megabytes=24) as disk:
        yield disk


@pytest.fixture(scope="module")
def server(disk):
    server = LiveServer(disk.path / "mezo")
    server.log = disk.path.with_name("server.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def jobs(server):
    """One that has succeeded, and one that is being trained and goes on for ever."""
    file = server.upload(reviews("train", 64))
    done = server.create_job(file, suffix="done", max_steps=5, **JOB)
    server.wait_for(done.id, "succeeded")
    running = server.create_job(file, suffix="running", max_steps=100_000, **JOB)
    server.wait_for_step(running.id, 3)
    return done, running


def answer(server, model: str) -> str:
    return server.client.completions.create(model=model, prompt="good food. It was", max_tokens=1).choices[0].text


def restart(server, *flags: str) -> None:
    """With these flags, whatever the test before has left."""
    if server._process is not None:
        server.kill()
    server._flags = flags
    server.start()


def makes_steps(server, job) -> None:
    server.wait_for(job.id, "running")
    server.wait_for_step(job.id, server.last_step(job.id) + 5)


def messages(server, job) -> list[str]:
    return [event.message for event in server.client.fine_tuning.jobs.list_events(job.id, limit=50)]


def test_a_full_disk_loses_nothing(server, jobs, disk):
    _, running = jobs
    disk.fill()
    refused = 0
    while refused < 20:  # what the disk's last pages have room for is taken
        try:
            server.upload(reviews("train", 50))
        except openai.APIStatusError as error:
            assert (error.status_code, error.code) == (507, "disk_full")
            refused += 1
    # The run finds the room gone, sooner or later; its wait is told now, or once there is room to tell it.
    untold = "the state of a job could not be stored, which is tried again"
    server.until(lambda: "The job waits" in " ".join(messages(server, running)) or untold in server.log_text())
    for path, body in (("examples", {"rows": reviews("train", 50)}), ("publish", {"checkpoint": None})):
        refusal = server.http.post(f"/mezo/jobs/{running.id}/{path}", json=body)
        assert (refusal.status_code, refusal.json()["error"]["code"]) in ((507, "disk_full"), (400, "invalid_state")), (
            refusal.text
        )
    assert answer(server, "reviews-model:done") and answer(server, "reviews-model")
    disk.free()
    makes_steps(server, running)
    assert any(
        message.startswith("The job waits: the server's disk takes no more") for message in messages(server, running)
    )


def test_sigterm_ends_a_server_whatever_is_under_way(server, jobs):
    done, running = jobs
    answers, ended, asked = [], threading.Event(), threading.Semaphore(0)

    def ask(path: str, body: dict) -> None:
        with http_client(server.url, timeout=2 * SECONDS) as http:
            while not ended.is_set():
                try:
                    response = http.post(path, json=body)
                except httpx.TransportError as error:
                    return answers.append((path, str(error)))
                asked.release()
                if response.status_code == 503:
                    return answers.append((path, response.json()["error"]["code"]))

    work = [
        *[(f"/mezo/jobs/{running.id}/publish", {"checkpoint": None})] * 3,
        *[(f"/mezo/jobs/{running.id}/examples", {"rows": reviews("train", 2)})] * 2,
        (f"/mezo/jobs/{done.id}/evaluate", {"rows": reviews("train", 4), "zo_random_seed": 1}),
        ("/v1/completions", {"model": "reviews-model:running", "prompt": "good food. It was", "max_tokens": 1}),
    ]
    threads = [threading.Thread(target=ask, args=arguments) for arguments in work]
    for thread in threads:
        thread.start()
    for _ in range(5 * len(work)):  # each of them is at it
        assert asked.acquire(timeout=SECONDS)
    server._process.terminate()
    assert server._process.wait(SECONDS) == 0
    ended.set()
    for thread in threads:
        thread.join()
    assert len(answers) == len(work) and "shutting_down" in [answer for _, answer in answers], answers
    server.kill()


@pytest.mark.slow
def test_with_other_flags_a_job_waits_and_its_adapters_are_not_served(server, jobs):
    done, running = jobs
    restart(server, "--max-lora-rank", "4")
    held = server.wait_for(running.id, "paused")
    assert held.error.code == "does_not_fit" and "--max-lora-rank" in held.error.message
    not_served(server, done, "--max-lora-rank")
    server.kill()


def not_served(server, done, reason: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        answer(server, "reviews-model:done")
    assert caught.value.status_code in (400, 404)
    assert answer(server, "reviews-model")
    assert "reviews-model:done" not in {model.id for model in server.client.models.list()}
    server.until(
        lambda: any(text.startswith("The model is not served") and reason in text for text in messages(server, done))
    )


@pytest.mark.slow
def test_on_another_model_of_that_name_too_until_the_right_weights_are_loaded(server, jobs, tmp_path):
    done, running = jobs
    other = tmp_path / "opt-reviews"
    shutil.copytree(MODEL, other)
    weights = load_file(MODEL / "model.safetensors")
    save_file(
        {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    restart(server, "--model-path", str(other))
    assert server.wait_for(running.id, "paused").error.code == "base_model_changed"
    not_served(server, done, "another base model")
    refusal = server.http.post(f"/v1/fine_tuning/jobs/{running.id}/resume")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "base_model_changed")

    right = server.http.post("/update_weights_from_disk", json={"model_path": str(MODEL)})
    assert right.json()["success"], right.text
    makes_steps(server, running)
    assert answer(server, "reviews-model:done")
    assert "The model is served again" in messages(server, done)

    assert server.http.post("/update_weights_from_disk", json={"model_path": str(other)}).json()["success"]
    assert server.wait_for(running.id, "paused").error.code == "base_model_changed"
