"""The program as a user types it: its commands on files outside of the repository, and mistakes in one line."""

import io
import json
import subprocess
import sys
import tarfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from live_server import MODEL, ROOT, reviews
from sglang.srt.mezo.commands.main import main
from sglang.srt.mezo.core.errors import ConfigError, DamagedError, LogError
from sglang.srt.mezo.training.replay import ReplayArguments, replay
from test_tasks import OWN

PROGRAM = Path(sys.executable).with_name("sglang-mezo")
STORED = Path(__file__).with_name("stored_runs.tar.xz")


def run(folder: Path, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
    command = [str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def done_here(folder: Path, *arguments: object, status: int = 0) -> tuple[str, str]:
    """What a command that needs no engine prints, without the seconds that a process takes to import everything."""
    out, err = io.StringIO(), io.StringIO()
    words = ["sglang-mezo", *map(str, arguments)]
    with chdir(folder), patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            ended: object = 0
        except SystemExit as end:
            ended = end.code
    assert (ended or 0) == status, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews("train", 60)))
    return path


# --- train and evaluate -----------------------------------------------------------------------------------------------


def test_a_file_outside_of_the_repository_is_trained_on_by_a_configuration_file(tmp_path, rows):
    (tmp_path / "run.yaml").write_text(
        f"model: {MODEL}\ndtype: float32\ndataset: rows.jsonl\ninvocation: ' It was'\nlearning_rate: 1e-2\n"
        "num_perturbations: 3\nmax_steps: 4\noutput_dir: mine\ntarget_modules: [q_proj, v_proj]\nrank: 2\n"
    )
    done = run(tmp_path, "train", "--config", "run.yaml", "--max_steps", 2)
    assert "trained accuracy" in done.stdout
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (config["learning_rate"], config["max_steps"], config["r"]) == (0.01, 2, 2), "a flag goes before the file"
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in reviews("test", 20)))
    common = ("evaluate", "--model", MODEL, "--dtype", "float32", "--dataset", test)
    base = json.loads(run(tmp_path, *common).stdout)
    trained = json.loads(run(tmp_path, *common, "--adapter", "mine/adapter", "--rows", 12).stdout)
    alone = (*common, "--adapter", "mine/adapter", "--rows", 12, "--with", "transformers", "--predictions", "rows.json")
    assert json.loads(run(tmp_path, *alone).stdout) == pytest.approx(trained, abs=1e-5)
    assert len((tmp_path / "rows.json").read_text().splitlines()) == 12
    assert base["examples"] == 20 and trained["examples"] == 12
    assert 0 <= base["accuracy"] <= 1 and trained["loss"] != base["loss"]
    assert summary["steps"] == 2


# --- preview ----------------------------------------------------------------------------------------------------------


def shown(folder: Path, *arguments: object) -> list[dict]:
    printed, _ = done_here(folder, "preview", "--model", MODEL, *arguments, "--json")
    return list(map(json.loads, printed.splitlines()))


def test_a_preview_shows_what_is_run_and_read(tmp_path, rows):
    [first, second] = shown(tmp_path, "--dataset", "rows.jsonl", "--invocation", " It was", "--rows", 2)
    row = reviews("train", 1)[0]
    assert first["source"] == "rows.jsonl:1" and second["source"] == "rows.jsonl:2"
    assert (first["prompt"], first["options"], first["gold"]) == (row["prompt"], row["options"], row["label"])
    [sequence] = first["rows"]
    start = first["acts_from"]
    assert 0 < start < len(first["prompt_ids"]) and sequence["prefix_tokens"] == start
    assert sequence["ids"] == first["prompt_ids"][start:]
    last = len(sequence["ids"]) - 1
    assert sequence["reads"] == [[last, option[0]] for option in first["option_ids"]]
    [lora] = shown(tmp_path, "--dataset", "rows.jsonl", "--tuning", "lora", "--rows", 1)
    assert lora["acts_from"] == 0 and lora["rows"][0]["ids"] == first["prompt_ids"]


def test_a_preview_of_a_task_and_of_messages(tmp_path):
    [task] = shown(
        tmp_path, "--task", "sst2", "--dataset", ROOT / "examples/assets/reviews", "--split", "test", "--rows", 1
    )
    assert task["prompt"].endswith(" It was") and task["options"] == [" terrible", " great"]
    messages = [{"role": "user", "content": "good or bad?"}, {"role": "assistant", "content": " great"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    [chat] = shown(tmp_path, "--dataset", "chat.jsonl", "--chat_template", "chatml")
    assert "good or bad?" in chat["prompt"] and "great" in chat["options"][0] and chat["acts_from"] > 0
    page = run(tmp_path, "preview", "--model", MODEL, "--dataset", "chat.jsonl", "--chat_template", "chatml").stdout
    assert "the adapter acts from token" in page and "good or bad?" in page
    (tmp_path / "texts.jsonl").write_text('{"prompt": "left out", "text": "a whole text"}\n')
    [text] = shown(tmp_path, "--dataset", "texts.jsonl", "--tuning", "lora")
    assert "".join([text["prompt"], *text["options"]]).endswith("a whole text")
    _, error = done_here(tmp_path, "preview", "--model", MODEL, "--dataset", "texts.jsonl", "--split", "test", status=2)
    assert "split='test' is not allowed: none for texts.jsonl, which has no splits" in error


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "my_tasks.py").write_text(OWN)
    (tmp_path / "weather.jsonl").write_text('{"report": "Rain.", "wet": 1}\n')
    given = ("--task", "my_tasks:Weather", "--dataset", "weather.jsonl", "--json")
    example = json.loads(run(tmp_path, "preview", "--model", MODEL, *given).stdout)
    assert (example["prompt"], example["options"], example["gold"]) == ("Rain.\nWas it wet?", [" no", " yes"], 1)
    assert example["acts_from"] > 0


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 20])
def test_a_replay_is_the_checkpoint_bit_for_bit(tmp_path, step):
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    done_here(tmp_path, "replay", "run", "--step", step, "--output", "again")
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    saved, again = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        checkpoint / "adapter_config.json"
    ).read_bytes()


def test_a_replay_that_cannot_be_is_refused(tmp_path):
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    held, again = str(tmp_path / "run"), str(tmp_path / "again")
    for given, problem in (
        ((held, 21, again), "step=21 is not allowed: at most 20"),
        ((held, 1, held), "a folder that is not there yet"),
        ((str(tmp_path / "store"), 1, again), "a folder that a run made"),
        ((held, -1, again), "step=-1 is not allowed: zero or more"),
    ):
        with pytest.raises(ConfigError, match=problem):
            replay(ReplayArguments(*given))
    log, settings = tmp_path / "run" / "seed_log", tmp_path / "run" / "config.json"
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(LogError, match="seed_log is damaged"):
        replay(ReplayArguments(held, 20, again))
    log.write_bytes(whole)
    for content in ("{", "[]", '{"tuning": "full"}'):
        settings.write_text(content)
        with pytest.raises(DamagedError, match="config.json is damaged"):
            replay(ReplayArguments(held, 1, again))
    assert not (tmp_path / "again").exists()
    _, problem = done_here(tmp_path, "replay", "run", "--step", 1, status=2)
    assert "output=None is not allowed: --output is needed" in problem and len(problem.splitlines()) == 1


def test_a_replay_of_a_damaged_adapter_says_so(tmp_path):
    """Whether its folder has checksums or, as those of earlier versions, none."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "run" / "initial_adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
        for _ in range(2):
            with pytest.raises(DamagedError, match="initial_adapter"):
                replay(ReplayArguments(str(tmp_path / "run"), 1, str(tmp_path / "again")))
            (folder / "SHA256SUMS").unlink(missing_ok=True)


# --- the door ---------------------------------------------------------------------------------------------------------


def test_the_program_says_what_there_is(tmp_path):
    usage = run(tmp_path, "--help").stdout
    for command in ("train", "evaluate", "preview", "experiment", "replay", "serve", "env"):
        assert f"\n  {command} " in usage
    assert "--learning_rate" in done_here(tmp_path, "train", "--help")[0]
    with (
        pytest.raises(SystemExit, match="'trian' is not a command"),
        patch.object(sys, "argv", ["sglang-mezo", "trian"]),
    ):
        main()
    versions, _ = done_here(tmp_path, "env")
    assert "sglang  " in versions and "torch  " in versions and "python  " in versions


def test_a_mistake_in_a_configuration_file_ends_in_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("lerning_rate: 1")
    done = run(tmp_path, "train", "--model", MODEL, "--config", "run.yaml", status=2)
    problem = "error: --config run.yaml has an unknown field lerning_rate: did you mean learning_rate?"
    assert done.stderr.splitlines() == [problem]


def test_the_front_door_of_the_package():
    code = (
        "import sys, sglang.srt.mezo as mezo\n"
        "assert 'sglang.srt.mezo.training' not in sys.modules, 'nothing is imported before it is asked for'\n"
        "from sglang.srt.mezo import MezoConfig, MezoEngine, MezoTrainer, finetune\n"
        "import inspect\n"
        "for one in (MezoTrainer, MezoEngine, finetune):\n"
        "    print(f'{one.__name__}{inspect.signature(one)}')\n"
        "assert MezoTrainer.train and MezoTrainer.evaluate and set(mezo.__all__) <= set(dir(mezo))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trainer, engine, finetune = done.stdout.splitlines()
    assert trainer.startswith("MezoTrainer(handle: ") and "train_dataset: " in trainer and "eval_dataset: " in trainer
    assert engine.startswith("MezoEngine(model_path: str, *, r: int = 1, target_modules: ")
    assert finetune.startswith("finetune(model: ") and ", data: " in finetune and ", config: " in finetune
