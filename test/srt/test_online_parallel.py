"""Training in a server of two tensor-parallel ranks follows the path of one rank."""

import json

import pytest
from engine_process import require_devices
from live_server import LiveServer, reviews

from sglang.srt.mezo.seed_log import SeedLog

JOB = {
    "learning_rate": 1e-2, "zo_eps": 3e-3, "logging_steps": 1, "eval_steps": 5, "save_steps": 5, "max_steps": 12, "num_perturbations": 3,
    "max_tokens_per_batch": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "alora"])
def test_two_ranks_make_the_steps_of_one(tmp_path, tuning):
    require_devices(2)
    settings = {**JOB, "tuning": tuning, "invocation": " It was" if tuning == "alora" else None}
    runs = []
    for ranks in (1, 2):
        with LiveServer(tmp_path / f"mezo-{ranks}", "--tp-size", str(ranks)) as server:
            files = [server.upload(reviews("train", 48)), server.upload(reviews("validation", 16))]
            job = server.create_job(*files, suffix="ranks", **settings)
            if ranks == 2:  # and through a pause: every rank goes back to where the log ends
                server.wait_for_step(job.id, 3)
                server.client.fine_tuning.jobs.pause(job.id)
                server.client.fine_tuning.jobs.resume(job.id)
            server.wait_for(job.id, "succeeded")
            text = server.client.completions.create(model="reviews-model:ranks", prompt="the plot is thin. It was", max_tokens=4, temperature=0)
            runs.append((server.run_directory(job.id), text.choices[0].text))
    (one, text), (two, text_of_two) = runs
    assert text == text_of_two
    for single, double in zip(losses(one), losses(two), strict=True):
        assert double == pytest.approx(single, rel=1e-4)
    first, second = (SeedLog.open(run / "seed_log").records() for run in (one, two))
    assert [record.seed for record in first] == [record.seed for record in second]


def losses(run) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss_plus"] + line["loss_minus"] for line in lines if "loss_plus" in line]
