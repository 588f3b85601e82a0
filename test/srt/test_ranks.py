"""Tensor-parallel ranks by the front door: their run is that of one rank, and where one dies all end."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from engine_process import require_devices
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import RankError
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.engine.ranks import Rank, other_ranks
from sglang.srt.mezo.training.arguments import status_of
from sglang.srt.mezo.training.finetune import ModelArguments, open_trainer
from test_examples import ROOT, run

ASSETS = ROOT / "examples" / "assets"
SECONDS = 10
MASKED = (
    *("--model", "examples/assets/roberta-reviews", "--dtype", "float32", "--task", "sst2"),
    *("--dataset", "examples/assets/reviews", "--dev_split", "validation", "--test_split", "test"),
)
"""The repository's masked language model, and what a command line that names no model gets."""


def command(folder: Path, tuning: str, steps: int, ranks: int) -> list[str]:
    return [
        *("examples/mezo_opt_training.py", "--output_dir", str(folder), "--tuning", tuning, "--tp_size", str(ranks)),
        *("--max_steps", str(steps), "--save_steps", str(steps), "--eval_steps", "10", "--disable_tqdm", "true"),
        *("--num_test", "8", "--num_dev", "20", "--max_total_tokens", "8000"),
    ]


def require_same(one: Path, two: Path, steps: int, tolerance: float) -> None:
    """Of what was trained, in parts of its largest number."""
    [first], [second] = (list((run / f"checkpoint-{steps}").glob("*.safetensors")) for run in (one, two))
    first, second = load_file(first), load_file(second)
    largest = max(tensor.abs().max() for tensor in first.values())
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max() for name in first) <= tolerance * largest


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_and_the_run_goes_on(tmp_path):
    require_devices(2)
    run(*command(tmp_path / "one", "lora", 12, 1))
    arguments = command(tmp_path / "two", "lora", 12, 2)
    started = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    others = []
    while not others or steps_of(tmp_path / "two") < 2:
        assert started.poll() is None, started.stderr.read()
        others = [one for one in psutil.Process(started.pid).children() if is_rank(one)]
        time.sleep(0.01)
    [other] = others
    other.kill()
    assert started.wait(SECONDS) != 0
    assert b"error: tensor-parallel rank 1 has ended with -9" in started.stderr.read()
    assert 2 <= steps_of(tmp_path / "two") < 12
    run(*arguments, "--resume_from_checkpoint")
    # A default step is divided by the spread of its losses, which magnifies what the order of a sum changes in them.
    require_same(tmp_path / "one", tmp_path / "two", 12, 1e-4)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a child of an import, which has ended meanwhile
        return False


def steps_of(folder: Path) -> int:
    return len(SeedLog.open(folder / "seed_log")) if (folder / "config.json").is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "alora", "full", "prefix"])
def test_two_ranks_make_the_steps_of_one(tmp_path, tuning):
    require_devices(2)
    paper = ("--num_perturbations", "1", "--perturbation", "gaussian", "--lr_scheduler_type", "constant")
    for ranks in (1, 2):
        run(*command(tmp_path / str(ranks), tuning, 200, ranks), *paper)
    require_same(tmp_path / "1", tmp_path / "2", 200, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full", "prefix"])
def test_two_ranks_train_a_masked_language_model_as_one_does(tmp_path, tuning):
    require_devices(2)
    paper = ("--num_perturbations", "1", "--perturbation", "gaussian", "--lr_scheduler_type", "constant")
    for ranks in (1, 2):
        run(*command(tmp_path / str(ranks), tuning, 50, ranks), *MASKED, *paper)
    require_same(tmp_path / "1", tmp_path / "2", 50, 1e-5)


def test_ranks_that_differ_end_the_run_at_the_next_evaluation(tmp_path):
    require_devices(2)
    code = "import sys, test_ranks; test_ranks.train_apart(sys.argv[1])"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "error: theta of tensor-parallel rank 1 is not that of rank 0" in ended.stderr
    assert ended.returncode == 2
    assert steps_of(tmp_path / "run") == 4


def train_apart(folder: str) -> None:
    model = ModelArguments(str(ASSETS / "opt-reviews"), max_total_tokens=8000, tp_size=2)
    data = DataArguments("sst2", str(ASSETS / "reviews"), num_dev=20, num_test=0)
    config = MezoConfig(folder, tuning="lora", max_steps=8, eval_steps=4, disable_tqdm=True)

    def ranks() -> None:
        with other_ranks(2, drift, model, data, config) as rank:
            drift(rank, model, data, config)

    sys.exit(status_of(ranks))


def drift(rank: Rank, model: ModelArguments, data: DataArguments, config: MezoConfig) -> None:
    """Train; one rank has another last bit of a number before the evaluation."""
    trainer, _ = open_trainer(model, data, config, rank)
    step = trainer.optimizer.step

    def step_and_drift(*arguments) -> None:
        step(*arguments)
        if trainer.global_step == 3 and not rank.is_first:
            trainer.trainable.theta[:1].nextafter_(torch.tensor([torch.inf]))

    trainer.optimizer.step = step_and_drift
    trainer.train()


# --- without an engine ------------------------------------------------------------------------------------------------


def ends(rank, code: int) -> None:
    sys.exit(code)


def waits(rank) -> None:
    time.sleep(3600)


def test_what_ends_with_another_rank_says_so():
    with pytest.raises(RankError, match="tensor-parallel rank 1 has ended with 7"), other_ranks(2, ends, 7) as rank:
        assert rank.is_first and rank.nccl_port
        while multiprocessing.active_children():
            time.sleep(0.05)
        raise RuntimeError("the connection was closed")


def fails(rank) -> None:
    raise OSError(28, "No space left on device")


def returns(rank) -> None:
    pass


def test_what_all_ranks_meet_is_told_as_it_is():
    with pytest.raises(OSError, match="No space left"), other_ranks(2, fails) as rank:
        while multiprocessing.active_children():
            time.sleep(0.05)
        fails(rank)


def test_a_rank_that_is_done_first_is_not_dead():
    with other_ranks(2, returns):
        while multiprocessing.active_children():
            time.sleep(0.05)
        time.sleep(SECONDS)  # longer than any grace


def test_the_others_end_with_the_block():
    before = set(psutil.Process().children())
    with pytest.raises(ZeroDivisionError), other_ranks(3, waits):
        started = set(psutil.Process().children()) - before
        raise ZeroDivisionError
    assert len(started) >= 2 and not any(one.is_running() and one.status() != "zombie" for one in started)


def test_one_rank_needs_no_others():
    before = set(psutil.Process().children())
    with other_ranks(1, waits) as rank:
        assert rank == (0, None) and set(psutil.Process().children()) == before
