"""Prefixes in a real server, with the official client: trained by jobs, published while requests run, and answered as
PEFT answers, through a flush, eviction and a restart."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import APIStatusError, BadRequestError
from transformers import AutoModelForCausalLM, AutoTokenizer

from foreign_adapters import change_tensors, edit
from foreign_prefixes import saved_prefix
from live_server import MODEL, LiveServer, peft_log_probs, prompt_log_probs, reviews
from sglang.srt.mezo.core.seed_log import SeedLog

TEXTS = [
    "the plot is thin, but the acting is superb. It was",
    "never again will i eat here. It was",
    "no such words in here",
]
SHORT = {"tuning": "prefix", "max_steps": 12, "num_perturbations": 3, "batch_size": 4, "logging_steps": 1}
POOL = 2000
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("prefix") / "mezo", "--max-total-tokens", str(POOL)) as server:
        yield server
        assert "Traceback" not in server.log_text()


@pytest.fixture(scope="module")
def rows(server) -> str:
    return server.upload(reviews("train", 48))


@pytest.fixture(scope="module")
def trained(server, rows):
    """A job that trains a prefix of as many tokens as the paper's."""
    job = server.create_job(rows, suffix="trained", save_steps=6, eval_steps=6, **SHORT)
    return server.wait_for(job.id, "succeeded")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """One that PEFT has made."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return saved_prefix(base, tmp_path_factory.mktemp("peft") / "prefix", tokens=7)


def newest(server, job_id: str) -> Path:
    """Files of the version of a job's prefix that is served."""
    return max((server.directory / "jobs" / job_id / "adapters").glob("v*"), key=lambda path: int(path.name[1:]))


def require_pefts_answers(server, model: str, folder: Path) -> None:
    for _ in range(2):  # the second time from the cache
        for ours, expected in zip(prompt_log_probs(server, model, TEXTS), peft_log_probs(folder, TEXTS), strict=True):
            torch.testing.assert_close(torch.tensor(ours), expected, atol=TOLERANCE, rtol=0)


# --- a job ------------------------------------------------------------------------------------------------------------


def test_a_job_trains_a_prefix_that_answers_as_in_peft(server, trained):
    sent = trained.to_dict()["method"]["supervised"]["hyperparameters"]
    assert (sent["tuning"], sent["num_virtual_tokens"], sent["r"], sent["invocation"]) == ("prefix", 5, "auto", None)
    assert trained.fine_tuned_model == "reviews-model:trained"
    assert trained.fine_tuned_model in {model.id for model in server.client.models.list()}
    require_pefts_answers(server, trained.fine_tuned_model, newest(server, trained.id))
    checkpoints = list(server.client.fine_tuning.jobs.checkpoints.list(trained.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [12, 6]
    early = server.run_directory(trained.id) / "checkpoint-6"
    require_pefts_answers(server, checkpoints[-1].fine_tuned_model_checkpoint, early)


def test_a_prefix_is_trained_further(server, rows, trained):
    job = server.create_job(rows, suffix="further", model=trained.fine_tuned_model, max_steps=2)
    job = server.wait_for(job.id, "succeeded")
    folders = [
        server.run_directory(trained.id) / "adapter" / "adapter_model.safetensors",
        server.run_directory(job.id) / "initial_adapter" / "adapter_model.safetensors",
    ]
    assert folders[0].read_bytes() == folders[1].read_bytes()
    require_pefts_answers(server, job.fine_tuned_model, newest(server, job.id))
    with pytest.raises(BadRequestError, match="num_virtual_tokens"):
        server.create_job(rows, model=trained.fine_tuned_model, num_virtual_tokens=9)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_virtual_tokens": POOL}, f"num_virtual_tokens={POOL} is not allowed: from 1 to"),
        ({"r": 4}, "r=4 is not allowed: nothing beside tuning=prefix"),
        ({"invocation": " It was"}, "invocation=' It was' is not allowed: nothing beside tuning=prefix"),
        ({"prefix_positions": "unshifted"}, "prefix_positions is not a hyperparameter"),
        ({"tuning": "full"}, "is not allowed: one of alora, lora, prefix"),
    ],
    ids=str,
)
def test_what_a_job_cannot_train_is_refused_before_it_starts(server, rows, settings, message):
    with pytest.raises(BadRequestError) as error:
        server.create_job(rows, **{**SHORT, **settings})
    assert message in str(error.value)


def test_a_job_is_paused_flushed_resumed_and_cancelled(server, rows):
    job = server.create_job(rows, suffix="stopped", **{**SHORT, "max_steps": 100_000})
    server.wait_for_step(job.id, 2)
    assert server.client.fine_tuning.jobs.pause(job.id).status == "paused"
    steps = len(SeedLog.open(server.run_directory(job.id) / "seed_log"))
    assert server.client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    server.wait_for_step(job.id, steps + 2)
    for _ in range(2):  # its points go with the cache, and are there again
        step = server.last_step(job.id)
        assert server.http.post("/flush_cache").status_code == 200
        server.wait_for_step(job.id, step + 2)
    assert server.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert server.http.get("/health_generate").status_code == 200


def test_requests_that_need_the_room_of_a_jobs_points_get_it(server, rows):
    """Its prefixes take a tenth of the pool, and requests want it all."""
    settings = {**SHORT, "max_steps": 100_000, "num_virtual_tokens": 45}
    job = server.create_job(rows, suffix="crowded", **settings)
    server.wait_for_step(job.id, 1)
    crowd_out(server)
    step = server.last_step(job.id)
    server.wait_for_step(job.id, step + 1)
    server.client.fine_tuning.jobs.cancel(job.id)


# --- versions during traffic ------------------------------------------------------------------------------------------


def crowd_out(server) -> None:
    """Requests of the base model that want half again as much as the pool has, at once."""
    sampling = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    prompts = [[seed, *range(10, 90)] for seed in range(POOL * 3 // 2 // 140)]
    answers = server.http.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    assert len(answers.raise_for_status().json()) == len(prompts)


@contextmanager
def traffic(server, model: str, clients: int = 2) -> Iterator[list]:
    """(text, log-probabilities of its tokens, usage) of answers under a prefix, in the order in which they came."""
    stop, answers = threading.Event(), []

    def client(index: int) -> None:
        while not stop.is_set():
            text = TEXTS[index % len(TEXTS)]
            answers.append((text, *answer(server, model, text)))
            index += 1
            time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def answer(server, model: str, text: str):
    try:
        answer = server.client.completions.create(
            model=model, prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0
        )
    except APIStatusError as error:
        return error, None
    return answer.choices[0].logprobs.token_logprobs[1:-1], answer.usage


def test_every_answer_is_one_versions_while_versions_are_published(server, trained, tmp_path):
    """Also with the cache flushed and the pool overrun in between; no request is without an answer."""
    folders, ends = [tmp_path / "0"], []
    shutil.copytree(newest(server, trained.id), folders[0])
    with traffic(server, trained.fine_tuned_model) as answers:
        for version in (1, 2, 3):
            server.until(lambda: len(answers) >= (ends[-1] if ends else 0) + 12)
            server.until(lambda: server.http.post("/flush_cache").status_code == 200, every=0.01)
            crowd_out(server)
            grads = {"zo_random_seed": version, "projected_grad": [1.0, -1.0, 0.5], "learning_rate": 0.3}
            server.http.post(f"/mezo/jobs/{trained.id}/update", json=grads).raise_for_status()
            ends.append(len(answers))
            folders.append(tmp_path / str(version))
            shutil.copytree(newest(server, trained.id), folders[-1])
        server.until(lambda: len(answers) >= ends[-1] + 12)
    expected = [dict(zip(TEXTS, peft_log_probs(folder, TEXTS), strict=True)) for folder in folders]
    tokenizer, seen = AutoTokenizer.from_pretrained(MODEL), []
    for text, values, usage in answers:
        assert usage is not None, values
        assert usage.prompt_tokens == len(tokenizer(text).input_ids) and usage.completion_tokens == 1
        distances = [(torch.tensor(values) - version[text]).abs().max() for version in expected]
        (found,) = [number for number, distance in enumerate(distances) if distance < TOLERANCE]
        seen.append(found)
    assert set(seen) == {0, 1, 2, 3}
    for version, end in enumerate(ends):  # what was asked for before may still come
        assert all(number > version for number in seen[end + 4 :])


# --- a prefix from outside --------------------------------------------------------------------------------------------


def load(server, name: str, folder: Path):
    return server.http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})


def test_a_prefix_of_pefts_answers_on_every_route(server, prefix):
    load(server, "peft", prefix).raise_for_status()
    model = "reviews-model:peft"
    require_pefts_answers(server, model, prefix)
    asked = {"model": model, "prompt": TEXTS[0], "max_tokens": 6, "temperature": 0}
    whole = server.client.completions.create(**asked)
    *parts, last = server.client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    tokens = AutoTokenizer.from_pretrained(MODEL)(TEXTS[0]).input_ids
    assert last.usage == whole.usage and whole.usage.prompt_tokens == len(tokens)
    chat = server.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": TEXTS[0]}], max_tokens=6, temperature=0
    )
    assert chat.choices[0].message.content == whole.choices[0].text
    native = server.http.post(
        "/generate",
        json={
            "text": TEXTS[0],
            "lora_path": "peft",
            "sampling_params": {"max_new_tokens": 6, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 3,
        },
    ).json()
    assert native["text"] == whole.choices[0].text
    values = [value for value, *_ in native["meta_info"]["input_token_logprobs"][1:]]
    expected = peft_log_probs(prefix, TEXTS[:1])[0][3:]
    torch.testing.assert_close(torch.tensor(values), expected, atol=TOLERANCE, rtol=0)
    server.http.post("/unload_lora_adapter", json={"lora_name": "peft"}).raise_for_status()


def test_bad_folders_are_refused_and_the_server_goes_on(server, trained, prefix, tmp_path):
    damages = {
        "another model's": lambda folder: edit(folder, num_layers=31),
        "the paper's positions": lambda folder: edit(folder, prefix_positions="unshifted"),
        "no numbers": lambda folder: change_tensors(folder, lambda tensors: {n: t * 1e39 for n, t in tensors.items()}),
        "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    }
    for name, damage in damages.items():
        shutil.copytree(prefix, tmp_path / name)
        damage(tmp_path / name)
        refused = load(server, "bad", tmp_path / name)
        assert refused.status_code == 400 and "is not allowed: " in refused.text, refused.text
    require_pefts_answers(server, trained.fine_tuned_model, newest(server, trained.id))


# --- a restart --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_go_on_and_prefixes_are_served_after_a_restart(server, rows, trained):
    job = server.create_job(rows, suffix="killed", **{**SHORT, "max_steps": 30})
    server.wait_for_step(job.id, 3)
    server.kill()
    steps = len(SeedLog.open(server.run_directory(job.id) / "seed_log"))
    server.start()
    require_pefts_answers(server, trained.fine_tuned_model, newest(server, trained.id))
    done = server.wait_for(job.id, "succeeded")
    assert steps < len(SeedLog.open(server.run_directory(job.id) / "seed_log")) == 30
    require_pefts_answers(server, done.fine_tuned_model, newest(server, job.id))
