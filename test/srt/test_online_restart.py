"""A server that is killed loses nothing that it has told of, and its job goes on where the seed log ends."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from live_server import LiveServer, reviews
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec, Site
from sglang.srt.mezo.core.seed_log import SeedLog

JOB = {
    "invocation": " It was",
    "num_perturbations": 7,
    "logging_steps": 1,
    "eval_steps": 40,
    "save_steps": 20,
    "max_tokens_per_batch": 32,
}
STEPS_BETWEEN_KILLS = 40


def losses(run: Path) -> dict[int, tuple[list[float], list[float]]]:
    """loss_plus and loss_minus of each step; of a step that was run twice, as its record was lost with the process,
    the later ones."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss_plus"], line["loss_minus"]) for line in lines if "loss_plus" in line}


def rebuilt(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """The adapter after ``steps`` steps, from the initial one and the seed log."""
    weights = load_file(run / "initial_adapter" / "adapter_model.safetensors")
    config = json.loads((run / "initial_adapter" / "adapter_config.json").read_text())
    paths = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in weights if "lora_A" in name
    ]
    order = sorted(paths, key=lambda path: (int(path.split("layers.")[1].split(".")[0]), *_place(path)))
    sites = [
        Site(
            path,
            weights[f"base_model.model.{path}.lora_A.weight"].shape[1],
            weights[f"base_model.model.{path}.lora_B.weight"].shape[0],
        )
        for path in order
    ]
    adapter = Adapter(AdapterSpec("base", config["r"], config["lora_alpha"], tuple(config["target_modules"])), sites)
    adapter.load_weights(run / "initial_adapter")
    SeedLog.open(run / "seed_log").replay(adapter.theta, steps)
    return adapter.state_dict()


def _place(path: str) -> tuple[int]:
    """The model's own order of layers, which is the flat vector's."""
    return (["q_proj", "k_proj", "v_proj", "out_proj"].index(path.rsplit(".", 1)[1]),)


def equal_to_the_log(run: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint, which the run wrote as it went, is what the log says, bit for bit."""
    saved = load_file(checkpoint / "adapter_model.safetensors")
    replayed = rebuilt(run, int(checkpoint.name.removeprefix("checkpoint-")))
    return saved.keys() == replayed.keys() and all(torch.equal(saved[name], replayed[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_at_random_moments_a_job_ends_as_if_it_had_not_been(tmp_path, kills):
    moments = random.Random(kills)
    steps = STEPS_BETWEEN_KILLS * (kills + 1)
    server = LiveServer(tmp_path / "mezo")
    server.start()
    try:
        files = [server.upload(reviews("train", 64)), server.upload(reviews("validation", 32))]
        whole = server.create_job(*files, suffix="whole", max_steps=steps, **JOB)
        server.wait_for(whole.id, "succeeded")
        job = server.create_job(*files, suffix="killed", max_steps=steps, **JOB)
        waiting = server.create_job(*files, suffix="waiting", max_steps=5, **JOB)
        for kill in range(kills):
            server.wait_for_step(job.id, 1 + STEPS_BETWEEN_KILLS * kill)
            time.sleep(moments.uniform(0, 0.6))
            uploaded = server.upload(reviews("test", 3), f"{kill}.jsonl")
            files.append(uploaded)
            acknowledged = server.last_step(job.id)
            server.kill()
            run = server.run_directory(job.id)
            assert acknowledged <= len(SeedLog.open(run / "seed_log")) < steps, (
                "killed in the middle, and no step is lost"
            )
            server.start()
            assert {file.id for file in server.client.files.list(purpose="fine-tune")} == set(files)
            assert server.client.files.content(uploaded).read().count(b"\n") == 3
            assert {one.id for one in server.client.fine_tuning.jobs.list()} == {whole.id, job.id, waiting.id}
            assert server.job(whole.id).status == "succeeded"
            assert server.client.models.retrieve("reviews-model:whole").id == "reviews-model:whole"
        server.wait_for(job.id, "succeeded")
        server.wait_for(waiting.id, "succeeded")
        messages = [event.message for event in server.client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert any("restart" in message for message in messages)
        text = server.client.completions.create(
            model="reviews-model:killed", prompt="the plot is thin. It was", max_tokens=1
        )
        assert text.choices[0].text
        check_run(run, server.run_directory(whole.id), steps, kills)
    finally:
        server.stop()


def check_run(run: Path, whole: Path, steps: int, kills: int) -> None:
    log, uninterrupted = (SeedLog.open(folder / "seed_log").records() for folder in (run, whole))
    assert [record.seed for record in log] == [record.seed for record in uninterrupted] and len(log) == steps
    killed, quiet = losses(run), losses(whole)
    assert killed.keys() <= quiet.keys() and len(quiet) - len(killed) <= kills, (
        "one line of metrics may go with a process"
    )
    assert killed == {step: quiet[step] for step in killed}, "bit for bit, on a server without other traffic"
    checkpoints = sorted(run.glob("checkpoint-*"))
    assert len(checkpoints) == steps // JOB["save_steps"]
    assert all(equal_to_the_log(run, checkpoint) for checkpoint in checkpoints)


@pytest.mark.slow
def test_a_server_may_rather_fail_the_job_that_its_end_interrupted(tmp_path):
    with LiveServer(tmp_path / "mezo", "--mezo-on-restart", "fail") as server:
        file = server.upload(reviews("train", 64))
        job = server.create_job(file, suffix="lost", max_steps=100_000, **JOB)
        server.wait_for_step(job.id, 3)
        server.kill()
        server.start()
        job = server.job(job.id)
        assert job.status == "failed" and job.error.code == "server_restarted" and "restart" in job.error.message
        again = server.create_job(file, suffix="again", max_steps=5, **JOB)
        server.wait_for(again.id, "succeeded")
