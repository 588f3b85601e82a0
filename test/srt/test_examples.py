"""The examples as a user runs them: as programs, on the embedded model, and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from live_server import reviews
from sglang.srt.mezo.experiments.reference import measure_by_transformers
from sglang.srt.mezo.training.evaluate import EvaluateArguments, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.replay import ReplayArguments, replay

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "zero_shot_accuracy",
    "accuracy",
    "steps",
    "train_seconds",
    "steps_per_second",
    "prefix_tokens_reused",
    "prefix_tokens_total",
    "peak_rss_bytes",
    "adapter_dir",
}


def run(*arguments: str, succeed: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == succeed, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("tuning", ["alora", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_main_job_runs_and_resumes(tmp_path, tuning):
    folder = tmp_path / "run"
    command = (
        "examples/mezo_opt_training.py",
        "--output_dir",
        str(folder),
        "--tuning",
        tuning,
        "--num_test",
        "40",
        "--num_dev",
        "20",
        "--lr_scheduler_type",
        "constant",
    )
    first = run(*command, "--max_steps", "10")
    titles = (
        "zero-shot accuracy",
        "trained accuracy",
        "speed",
        "prefix tokens reused",
        "peak memory",
        "adapter",
        "plot",
    )
    lines = first.stdout.splitlines()
    assert [title for title in titles if sum(line.startswith(f"{title:<22} ") for line in lines) != 1] == []
    [served] = [line for line in lines if line.startswith("  python -m sglang.launch_server --model-path ")]
    assert f"--lora-paths run={folder}/adapter" in served
    assert SUMMARY <= summary_of(folder).keys()
    assert "MeZO: 100%" in first.stderr
    if tuning == "alora":
        refused = run(*command, "--max_steps", "14", succeed=False)
        assert "error: output_dir=" in refused.stderr
    run(*command, "--max_steps", "14", "--resume_from_checkpoint")
    assert summary_of(folder)["steps"] == 14
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "curves.png").stat().st_size > 10_000


PREFIX = (
    *("examples/mezo_opt_training.py", "--prefix_tuning", "true", "--num_prefix", "3", "--num_test", "none"),
    *("--num_dev", "20"),
)


def peft_loss(adapter: Path) -> float:
    """Mean classification loss of a prefix on the reviews' test rows, by Transformers and PEFT alone."""
    model = ROOT / "examples" / "assets" / "opt-reviews"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prefixed = PeftModel.from_pretrained(base, adapter).eval()
    losses = []
    for row in reviews("test", 10**6):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        options = [tokenizer(option, add_special_tokens=False).input_ids[0] for option in row["options"]]
        with torch.no_grad():
            losses.append(-torch.log_softmax(prefixed(input_ids=ids).logits[0, -1, options], 0)[row["label"]].item())
    return sum(losses) / len(losses)


def test_a_trained_prefix_is_run_by_peft(tmp_path):
    folder = tmp_path / "run"
    printed = run(*PREFIX, "--max_steps", "4", "--output_dir", str(folder)).stdout
    assert f"adapter                {folder}/adapter" in printed and "launch_server" not in printed
    assert peft_loss(folder / "adapter") == pytest.approx(summary_of(folder)["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_prefix_is_resumed_replayed_evaluated_and_trained_on(tmp_path):
    folder = tmp_path / "run"
    command = (*PREFIX, "--output_dir", str(folder))
    run(*command, "--max_steps", "4")
    run(*command, "--max_steps", "6", "--resume_from_checkpoint")
    assert summary_of(folder)["steps"] == 6
    replay(ReplayArguments(str(folder), summary_of(folder)["best_step"], str(tmp_path / "again")))
    kept, again = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapter", tmp_path / "again"))
    assert torch.equal(kept["prompt_embeddings"], again["prompt_embeddings"])
    assert peft_loss(folder / "adapter") == pytest.approx(summary_of(folder)["loss"], abs=1e-4)
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reviews("test", 10**6)))
    program = ("-m", "sglang.srt.mezo.commands.main", "evaluate", "--dtype", "float32")
    model = ("--model", "examples/assets/opt-reviews")
    evaluated = json.loads(run(*program, *model, "--dataset", str(rows), "--adapter", str(folder / "adapter")).stdout)
    assert evaluated["loss"] == pytest.approx(summary_of(folder)["loss"], abs=1e-5)
    further = tmp_path / "further"
    run(*PREFIX, "--output_dir", str(further), "--init_from", str(folder / "adapter"), "--max_steps", "1")
    begun = load_file(further / "initial_adapter" / "adapter_model.safetensors")
    assert torch.equal(begun["prompt_embeddings"], kept["prompt_embeddings"])


@pytest.mark.slow
def test_a_run_goes_on_from_the_adapter_of_another(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    command = (
        "examples/mezo_opt_training.py",
        "--num_test",
        "8",
        "--num_dev",
        "20",
        "--learning_rate",
        "0.05",
        "--no_load_best_model_at_end",
    )
    run(*command, "--output_dir", str(first), "--max_steps", "4")
    command += ("--output_dir", str(second), "--init_from", str(first / "adapter"))
    refused = run(*command, "--r", "3", succeed=False)
    assert refused.returncode == 2 and "r=3 is not allowed" in refused.stderr.splitlines()[-1]
    run(*command, "--max_steps", "2")
    weights = [
        load_file(folder / "adapter_model.safetensors") for folder in (first / "adapter", second / "initial_adapter")
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    before, after = eval_losses(first), eval_losses(second)
    assert after[0] == pytest.approx(before[4], abs=1e-5) and after[0] != pytest.approx(before[0], abs=1e-3)
    run(*command, "--max_steps", "3", "--resume_from_checkpoint")
    assert summary_of(second)["steps"] == 3


def eval_losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {record["step"]: record["eval_loss"] for record in history}


@pytest.mark.slow
def test_a_plain_text_is_learned_as_a_language_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the plot is dull. the acting is superb.\n" * 40)
    folder = tmp_path / "run"
    run(
        "examples/mezo_opt_training.py",
        "--model",
        "examples/assets/opt-reviews",
        "--dataset",
        str(text),
        "--tuning",
        "lora",
        "--dtype",
        "float32",
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--output_dir",
        str(folder),
    )
    summary = summary_of(folder)
    assert summary["accuracy"] is None
    assert json.loads((folder / "config.json").read_text())["tuning"] == "lora"
    assert 0 < summary["loss"] < 10


def test_a_task_with_answers_is_reported_by_what_the_model_writes(tmp_path):
    """The F1 of the trained adapter is that of what Transformers and PEFT write with it."""
    rows = [
        {"title": "Film", "context": f"Scene {n} is {word}.", "question": "How is it?", "answers": {"text": [word]}}
        for n in range(12)
        for word in ("superb", "thin")
    ]
    for split, part in (("train", rows[:16]), ("validation", rows[16:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ("--task", "squad", "--dataset", str(tmp_path))
    run(
        "examples/mezo_opt_training.py",
        *data,
        "--num_dev",
        "4",
        "--max_steps",
        "3",
        "--output_dir",
        str(tmp_path / "run"),
    )
    summary = summary_of(tmp_path / "run")
    model = ModelArguments(str(ROOT / "examples" / "assets" / "opt-reviews"), "float32")
    asked = EvaluateArguments(task="squad", dataset=str(tmp_path), adapter=summary["adapter_dir"])
    metrics, told = measure_by_transformers(model, read_evaluation(model, asked), asked)
    assert len(told) == 8 and metrics["f1"] == pytest.approx(summary["f1"]) and summary["zero_shot_f1"] is not None


def test_the_minimal_loop_runs():
    assert "trained accuracy" in run("examples/mezo_minimal_loop.py", "--steps", "5").stdout
    assert len((ROOT / "examples" / "mezo_minimal_loop.py").read_text().splitlines()) < 150


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    cells = json.loads((ROOT / "examples" / "mezo_notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = "\n".join([*code, "figure.savefig('curve.png')"])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "before, " in done.stdout and (tmp_path / "curve.png").stat().st_size > 5000
    assert (tmp_path / "runs/notebook/adapter/adapter_config.json").is_file()


def test_a_mistake_ends_with_one_line():
    done = run("examples/mezo_opt_training.py", "--task_name", "sst3", "--trainer", "zo", succeed=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unknown task 'sst3'; known tasks: boolq, cb, copa, ")


@pytest.mark.slow
def test_a_masked_language_model_learns(tmp_path):
    masked = ("--model", "examples/assets/roberta-reviews", "--dtype", "float32", "--tuning", "lora", "--task", "sst2")
    data = ("--dataset", "examples/assets/reviews", "--dev_split", "validation", "--test_split", "test")
    run("examples/mezo_opt_training.py", *masked, *data, "--max_steps", "250", "--output_dir", str(tmp_path / "run"))
    assert summary_of(tmp_path / "run")["zero_shot_accuracy"] < 0.60
    assert summary_of(tmp_path / "run")["accuracy"] >= 0.85


@pytest.mark.slow
def test_the_main_job_learns(tmp_path):
    run("examples/mezo_opt_training.py", "--output_dir", str(tmp_path / "run"))
    summary = summary_of(tmp_path / "run")
    assert summary["zero_shot_accuracy"] < 0.60
    assert summary["accuracy"] >= 0.85
    assert summary["prefix_tokens_reused"] >= 0.9 * summary["prefix_tokens_total"]
