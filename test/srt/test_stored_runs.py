"""What an earlier version has written is read, gone on with and served: stored_runs.tar.xz has a run and a server's
store.

Both are of the embedded model, with an adapter of rank 1 on q_proj along three directions, written by version 0.1.0: a
run of 20 steps, and a server that was killed after step 45 of a job of 200 steps, and had done a job of 20.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from live_server import MODEL, ROOT, LiveServer, peft_log_probs, prompt_log_probs, reviews
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec, Site
from sglang.srt.mezo.core.seed_log import SeedLog

TEXTS = ["the plot is thin, but the acting is superb. It was", "never again will i eat here. It was"]
CONFIG = json.loads((MODEL / "config.json").read_text())
STEPS, INTERRUPTED_STEPS, ALL_STEPS = 20, 45, 200


@pytest.fixture
def stored(tmp_path) -> Path:
    with tarfile.open(Path(__file__).with_name("stored_runs.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def replayed(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """The adapter after so many records of a run's seed log."""
    width, layers = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
    sites = [Site(f"model.decoder.layers.{i}.self_attn.q_proj", width, width) for i in range(layers)]
    adapter = Adapter(AdapterSpec("base", 1, 16, ("q_proj",)), sites)
    adapter.load_weights(run / "initial_adapter")
    SeedLog.open(run / "seed_log").replay(adapter.theta, steps)
    return adapter.state_dict()


def run_of(stored: Path, steps: int) -> Path:
    """The run of the one job that has so many records."""
    [run] = [log.parent for log in stored.glob("store/jobs/*/run/seed_log") if len(SeedLog.open(log)) == steps]
    return run


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_seed_log_gives_the_checkpoints_that_were_written_beside_it(stored, step):
    for run in (stored / "run", run_of(stored, STEPS)):
        saved = load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in replayed(run, step).items())


def test_a_run_goes_on(stored, tmp_path):
    run, rows = stored / "run", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reviews("train", 24)))
    before = SeedLog.open(run / "seed_log").records()
    command = [
        sys.executable,
        "examples/mezo_opt_training.py",
        "--model",
        "examples/assets/opt-reviews",
        "--dtype",
        "float32",
        "--dataset",
        str(rows),
        "--invocation",
        " It was",
        "--r",
        "1",
        "--target_modules",
        "q_proj",
        "--num_perturbations",
        "3",
        "--eval_steps",
        "10",
        "--output_dir",
        str(run),
        "--resume_from_checkpoint",
        "--max_steps",
        str(STEPS + 5),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    after = SeedLog.open(run / "seed_log").records()
    assert after[:STEPS] == before and len(after) == STEPS + 5
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS + 5


def test_a_store_is_served_and_its_job_goes_on(stored):
    interrupted = run_of(stored, INTERRUPTED_STEPS)
    before = SeedLog.open(interrupted / "seed_log").records()
    with LiveServer(stored / "store") as server:
        jobs = {job.id: job for job in server.client.fine_tuning.jobs.list()}
        done = jobs.pop(run_of(stored, STEPS).parent.name)
        assert done.status == "succeeded" and done.fine_tuned_model == "reviews-model:done"
        assert {file.filename for file in server.client.files.list()} >= {"rows.jsonl", "held.jsonl"}
        [adapter] = (stored / "store" / "jobs" / done.id / "adapters").iterdir()
        for expected, served in zip(
            peft_log_probs(adapter, TEXTS), prompt_log_probs(server, done.fine_tuned_model, TEXTS), strict=True
        ):
            assert torch.allclose(torch.tensor(served), expected, atol=1e-4, rtol=0)
        [job] = jobs
        assert job == interrupted.parent.name
        server.wait_for(job, "succeeded")
        after = SeedLog.open(interrupted / "seed_log").records()
        assert after[:INTERRUPTED_STEPS] == before and len(after) == ALL_STEPS
        assert (
            server.client.completions.create(model="reviews-model:interrupted", prompt=TEXTS[0], max_tokens=1)
            .choices[0]
            .text
        )
