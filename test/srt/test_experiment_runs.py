"""Experiments as they run: a process for each cell, on one machine or more, and what becomes of one that is killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang.srt.mezo.commands.experiment import ExperimentArguments, do, main, opened
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.selection import drawn_rows
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.experiments.reference import measure_by_transformers
from sglang.srt.mezo.experiments.runner import BUSY, DONE, Files, Folder, run_process
from sglang.srt.mezo.experiments.spec import Cell
from sglang.srt.mezo.experiments.tables import write_tables
from sglang.srt.mezo.training.evaluate import EvaluateArguments, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments
from test_experiments import ROOT, changed

PROGRAM = [sys.executable, "-m", "sglang.srt.mezo.commands.main", "experiment"]


# --- one process a cell -----------------------------------------------------------------------------------------------

SLOW = [
    sys.executable,
    "-c",
    "import pathlib, sys, time; print('once', flush=True); time.sleep(3); pathlib.Path(sys.argv[1]).touch()",
]


def slow_cell(path: Path) -> tuple[Folder, Cell, Files, list[str]]:
    folder = Folder(path, changed())
    cell, *_ = folder.experiment.cells()
    files = folder.files(cell)
    files.result.parent.mkdir()
    return folder, cell, files, [*SLOW, str(files.result)]


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path):
    folder, cell, files, command = slow_cell(tmp_path)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(run_process, command, files)
        wait_until(lambda: files.log.is_file() and files.log.read_text())
        assert folder.state(cell) == "running" and run_process(command, files) == BUSY
        assert one.result() == DONE
    assert folder.state(cell) == "done" and run_process(["false"], files) == DONE, "what is done is not done again"


def test_a_cell_whose_runner_is_killed_is_not_run_beside_itself(tmp_path):
    folder, cell, files, command = slow_cell(tmp_path)
    runner = multiprocessing.get_context("spawn").Process(target=run_process, args=(command, files))
    runner.start()
    wait_until(lambda: files.log.is_file() and files.log.read_text())
    runner.kill()
    runner.join()
    assert folder.state(cell) == "running" and run_process(command, files) == BUSY
    wait_until(lambda: folder.state(cell) == "done")
    assert files.log.read_text() == "once\n"


def wait_until(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- as a program -----------------------------------------------------------------------------------------------------

SMALL = """
model: {{model: {root}/examples/assets/opt-reviews, dtype: float32, max_total_tokens: 8000}}
tasks:
  sst2: {{dataset: {root}/examples/assets/reviews, dev_split: validation, test_split: test, num_test: 20, num_dev: 20}}
methods:
  zero-shot: {{}}
  mezo-alora: {{max_steps: {steps}, eval_steps: 5, seeds: {seeds}}}
"""


def test_an_array_of_slurm_finds_where_to_write(tmp_path, capsys):
    script = tmp_path / "mine.sbatch"
    folder = small(tmp_path / "mine", 4, [0])
    do("run", [str(folder), "--slurm", str(script)])
    [output] = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    assert "2 cells" in capsys.readouterr().out
    assert Path(output.removeprefix("#SBATCH --output=")).parent.is_dir()
    (folder / "results").mkdir()
    for cell in Folder.read(folder).experiment.cells():
        (folder / "results" / f"{cell.id}.json").write_text("{}")
    with pytest.raises(UsageError, match="no cell of mine is open"):
        do("run", [str(folder), "--slurm", str(script)])


def test_what_has_not_been_run_is_not_made_by_a_question(tmp_path, capsys):
    where = tmp_path / "quick"
    do("status", ["quick", "--output_dir", str(where)])
    assert "0 of 6 cells done" in capsys.readouterr().out
    with pytest.raises(UsageError, match="nothing of quick has been run"):
        do("tables", ["quick", "--output_dir", str(where)])
    with pytest.raises(ConfigError, match="output_dir=.* is not allowed: nothing beside .*, which is a folder already"):
        do("run", [str(small(tmp_path / "mine", 4, [0])), "--output_dir", str(where)])
    assert not where.exists()
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--output_dir" in capsys.readouterr().out


def experiment(verb: str, *words: object, status: int = 0, seconds: float = 900) -> str:
    command = [*PROGRAM, verb, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def small(folder: Path, steps: int, seeds: list[int]) -> Path:
    folder.mkdir()
    (folder / "experiment.yaml").write_text(SMALL.format(root=ROOT, steps=steps, seeds=seeds))
    return folder


def results(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def test_an_experiment_runs_and_what_fails_is_told(tmp_path):
    folder = small(tmp_path / "mine", 4, [0])
    file = folder / "experiment.yaml"
    text = file.read_text().replace("zero-shot: {}", "broken: {method: mezo-lora, init_from: /nowhere}")
    file.write_text(text)
    told = experiment("run", folder, status=1)
    assert "mine: 1 of 2 cells done, 1 failed" in told
    assert "failed sst2-broken-seed0" in told and ": error: init_from='/nowhere' is not allowed" in told
    for found in results(folder).values():
        assert found["test"]["accuracy"] == pytest.approx(0.5, abs=0.3) and found["meta_info"]["package_info"]["sglang"]
        assert found["train_info"]["tokens_computed"] > 0
    [trained] = [found for name, found in results(folder).items() if "mezo" in name]
    assert trained["run_info"]["settings"]["method"] == {"max_steps": 4, "eval_steps": 5}
    assert (folder / trained["train_info"]["adapter_dir"] / "adapter_config.json").is_file()
    assert not Path(trained["train_info"]["adapter_dir"]).is_absolute()
    assert [one["step"] for one in trained["evaluations"]] == [0, 4] and trained["train_info"]["forward_passes"] == 32
    again = opened(str(folder), ExperimentArguments(), make=False)
    assert [cell.label for cell in again.open_cells()] == ["broken"], "what is done is not done again"
    assert "| mezo-alora |" in write_tables(again) and "| broken | failed |" in write_tables(again)


@pytest.mark.slow
def test_a_model_on_two_ranks_is_evaluated(tmp_path):
    folder = small(tmp_path / "mine", 4, [0])
    file = folder / "experiment.yaml"
    text = file.read_text().replace("dtype: float32", "dtype: float32, tp_size: 2")
    file.write_text(text[: text.index("  mezo-alora")])
    assert "mine: 1 of 1 cells done" in experiment("run", folder, seconds=240)
    [found] = results(folder).values()
    data = EvaluateArguments(task="sst2", dataset=str(ROOT / "examples/assets/reviews"), split="test")
    named = named_data("sst2", data.dataset)
    rows = drawn_rows(
        named, DataArguments("sst2", data.dataset, dev_split="validation", test_split="test", num_test=20)
    )
    model = ModelArguments(str(ROOT / "examples/assets/opt-reviews"), dtype="float32")
    metrics, _ = measure_by_transformers(model, read_evaluation(model, data, rows[2]), data)
    assert found["test"] == {name: pytest.approx(metrics[name], abs=1e-5) for name in ("loss", "accuracy")}


@pytest.mark.slow
def test_a_grid_that_is_killed_repeats_no_finished_cell_and_ends_with_the_same_numbers(tmp_path):
    whole, killed = small(tmp_path / "whole", 150, [0, 1]), small(tmp_path / "killed", 150, [0, 1])
    experiment("run", whole)
    finished: dict[Path, int] = {}
    random.seed(5)
    for _ in range(3):
        process = subprocess.Popen([*PROGRAM, "run", str(killed)], cwd=ROOT, start_new_session=True)
        time.sleep(random.uniform(20, 60))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finished |= {path: path.stat().st_mtime_ns for path in (killed / "results").glob("*.json")}
    experiment("resume", killed)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    one, two = ({name: found["test"] for name, found in results(folder).items()} for folder in (whole, killed))
    assert one == two and len(one) == 3


@pytest.mark.slow
def test_the_quick_experiment_ends_within_five_minutes(tmp_path):
    folder = tmp_path / "quick"
    told = experiment("run", "quick", "--output_dir", folder, seconds=300)
    assert "quick: 6 of 6 cells done, 0 failed" in told
    assert "sst2.png" in experiment("plots", folder)
    assert "| icl |" in experiment("tables", folder)
