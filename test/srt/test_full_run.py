"""Full tuning as a user runs it: as a program that is killed and goes on; its model in Transformers and in SGLang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from engine_process import EngineProcess, ServingEngine
from sglang.srt.mezo.adapters.weights import WeightsSpec, checkpoint_weights
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.training.replay import ReplayArguments, replay
from test_examples import ROOT, run, summary_of

MODEL = ROOT / "examples" / "assets" / "opt-reviews"
STEPS, SAVED = 12, 6
COMMAND = [
    *("examples/mezo_opt_training.py", "--tuning", "full", "--num_test", "20", "--num_dev", "20", "--eval_steps", "4"),
    *("--max_steps", str(STEPS), "--save_steps", str(SAVED), "--num_perturbations", "2", "--learning_rate", "1e-5"),
    *("--lr_scheduler_type", "constant", "--disable_tqdm", "true"),
]
TEXTS = ["the plot is thin, but the acting is superb. It was", "never again. It was"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """Folders of a run and of the same that was killed in the middle and went on, and what the first printed."""
    folder = tmp_path_factory.mktemp("full")
    whole, killed = folder / "whole", folder / "killed"
    printed = run(*COMMAND, "--output_dir", str(whole)).stdout
    started = subprocess.Popen(
        [sys.executable, *COMMAND, "--output_dir", str(killed)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((killed / "seed_log").is_file() and steps_of(killed) > 2):
        assert started.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert 2 < steps_of(killed) < STEPS and not (killed / "model").exists()
    run(*COMMAND, "--output_dir", str(killed), "--resume_from_checkpoint")
    return whole, killed, printed


def steps_of(folder: Path) -> int:
    return len(SeedLog.open(folder / "seed_log"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_goes_on_to_the_same_bits(runs):
    whole, killed, _ = runs
    assert SeedLog.open(whole / "seed_log").records() == SeedLog.open(killed / "seed_log").records()
    assert same(weights(whole / "model"), weights(killed / "model"))
    assert not same(weights(whole / "model"), weights(MODEL))
    assert summary_of(whole)["accuracy"] == summary_of(killed)["accuracy"]


def test_the_model_of_any_step_is_replayed(runs, tmp_path):
    whole, _, _ = runs
    for step, held in ((0, MODEL), (SAVED, whole / f"checkpoint-{SAVED}"), (STEPS, whole / f"checkpoint-{STEPS}")):
        replay(ReplayArguments(str(whole), step, str(tmp_path / str(step))))
        assert same(weights(tmp_path / str(step)), weights(held)), step


def test_a_replay_without_its_base_model_is_refused(runs, tmp_path):
    whole, _, _ = runs
    (tmp_path / "seed_log").write_bytes((whole / "seed_log").read_bytes())
    settings = json.loads((whole / "config.json").read_text())
    for base in ("/nowhere", str(whole / "model")):  # there is none, or it is another
        settings["base_model"]["name"] = base
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ConfigError, match=base):
            replay(ReplayArguments(str(tmp_path), 1, str(tmp_path / "again")))


def test_what_is_printed_is_how_it_is_served(runs):
    whole, _, printed = runs
    assert f"  python -m sglang.launch_server --model-path {whole}/model --dtype float32\n" in printed
    assert f"model                  {whole}/model" in printed
    assert not (whole / "initial_adapter").exists() and not (whole / "adapter").exists()


def test_chat_templates_that_have_names_go_along(tmp_path):
    base = Path(oracle.save_model("opt-125m", tmp_path / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, base / name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint_weights(WeightsSpec(str(base)), "float32").save_pretrained(tmp_path / "model")
    templates = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.mark.slow
def test_the_model_answers_alike_in_transformers_and_in_sglang(runs):
    whole, _, _ = runs
    folder = str(whole / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.float32
    engine = ServingEngine(model_path=folder, dtype="float32", disable_cuda_graph=True, log_level="error")
    try:
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            with torch.no_grad():
                logits = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            expected = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            answer = engine.generate(
                input_ids=ids, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
            )
            ours = torch.tensor([logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]])
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    finally:
        engine.shutdown()
        engine.close()


# --- in one engine ----------------------------------------------------------------------------------------------------


def make_trainer(engine, folder, examples, **settings):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    config = MezoConfig(
        **{"tuning": "full", "output_dir": str(folder), "num_perturbations": 2, "zo_eps": 1e-3, "disable_tqdm": True},
        lr_scheduler_type="constant",
        **settings,
    )
    path = engine.server_args.model_path
    return MezoTrainer(engine.handle, config, WeightsSpec(path), examples, examples)


def damage_of_the_best(engine, folder, examples):
    """The best step, theta at every evaluation, and theta in the end, where the files of the best model are damaged."""
    trainer = make_trainer(engine, folder, examples, max_steps=4, eval_steps=1, learning_rate=0.5, momentum=0.5)
    start, thetas, evaluated = trainer.trainable.theta.clone(), [], trainer.evaluation_passes

    def evaluation_passes(plans=None):
        thetas.append(trainer.trainable.theta.clone())
        for path in Path(folder).glob("best-*/model.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        return evaluated(plans)

    trainer.evaluation_passes = evaluation_passes
    result = trainer.train()
    trainer.trainable.theta.copy_(start)
    trainer.close()
    return result.best_step, thetas


def runs_in_turn(engine, folder, examples):
    """Theta at the end of a run of three steps, and of one of two that goes on in the engine which it has left
    trained."""
    ends = []
    for name, settings in (
        ("whole", {"max_steps": 3}),
        ("parts", {"max_steps": 2}),
        ("parts", {"max_steps": 3, "resume_from_checkpoint": True}),
    ):
        trainer = make_trainer(engine, folder / name, examples, learning_rate=1e-3, **settings)
        trainer.train()
        ends.append(trainer.trainable.theta.clone())
        trainer.close()
    return ends


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = oracle.save_model("opt-125m", tmp_path_factory.mktemp("model") / "model")
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=2000)
    yield engine
    engine.close()


def test_a_best_model_that_is_damaged_is_made_anew_from_the_log(engine, tmp_path):
    best, thetas = engine.call(damage_of_the_best, tmp_path / "run", oracle.examples(4))
    assert 0 < best < 4 and len(thetas) == 6  # at every step, and at the end
    assert torch.equal(thetas[best], thetas[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(torch.cat([one.detach().flatten() for one in model.parameters()]), thetas[best])


def test_a_run_starts_from_the_checkpoint_whatever_the_engine_has_been_trained_to(engine, tmp_path):
    whole, part, resumed = engine.call(runs_in_turn, tmp_path, oracle.examples(4))
    assert torch.equal(whole, resumed) and not torch.equal(whole, part)
