"""Training in a server of two tensor-parallel ranks follows the path of one rank."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
import tiny_models
from engine_process import require_devices
from live_server import MODEL, LiveServer, reviews
from sglang.srt.mezo.core.seed_log import SeedLog

JOB = {
    "learning_rate": 1e-2,
    "zo_eps": 3e-3,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 5,
    "max_steps": 12,
    "num_perturbations": 3,
    "max_tokens_per_batch": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "alora", "prefix"])
def test_two_ranks_make_the_steps_of_one(tmp_path, tuning):
    two_ranks_make_the_steps_of_one(tmp_path, tuning, ["q_proj", "k_proj", "v_proj", "out_proj"])


@pytest.mark.slow
def test_layers_that_two_ranks_widen_keep_the_checkpoints_shapes(tmp_path):
    """On CPU, SGLang makes a multiple of 64 of the 96 that this model's intermediate_size is."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = Path(tiny_models.save_model("LlamaForCausalLM", tmp_path / "llama", vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(model)
    adapter = two_ranks_make_the_steps_of_one(tmp_path, "lora", list(oracle.LLAMA_TARGETS), "--model-path", str(model))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, adapter).base_model.model.model.layers[0].mlp
    assert loaded.down_proj.lora_A["default"].weight.shape == (8, 96)
    assert loaded.gate_proj.lora_B["default"].weight.shape == (96, 8)


def two_ranks_make_the_steps_of_one(tmp_path, tuning: str, target_modules: list[str], *flags: str) -> Path:
    """Returns the folder of the adapter that two ranks made."""
    require_devices(2)
    settings = {**JOB, "tuning": tuning, "invocation": " It was" if tuning == "alora" else None}
    if tuning != "prefix":
        settings["target_modules"] = target_modules
    runs = []
    for ranks in (1, 2):
        pool = ["--lora-target-modules", *target_modules]
        with LiveServer(tmp_path / f"mezo-{ranks}", "--tp-size", str(ranks), *flags, *pool) as server:
            files = [server.upload(reviews("train", 48)), server.upload(reviews("validation", 16))]
            job = server.create_job(*files, suffix="ranks", **settings)
            if ranks == 2:  # and through a pause: every rank goes back to where the log ends
                server.wait_for_step(job.id, 3)
                server.client.fine_tuning.jobs.pause(job.id)
                server.client.fine_tuning.jobs.resume(job.id)
            server.wait_for(job.id, "succeeded")
            text = server.client.completions.create(
                model="reviews-model:ranks", prompt="the plot is thin. It was", max_tokens=4, temperature=0
            )
            runs.append((server.run_directory(job.id), text.choices[0].text))
    (one, text), (two, text_of_two) = runs
    assert text == text_of_two
    for single, double in zip(losses(one), losses(two), strict=True):
        assert double == pytest.approx(single, rel=1e-4)
    first, second = (SeedLog.open(run / "seed_log").records() for run in (one, two))
    assert [record.seed for record in first] == [record.seed for record in second]
    return two / "adapter"


def losses(run) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss_plus"] + line["loss_minus"] for line in lines if "loss_plus" in line]
