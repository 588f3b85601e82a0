"""Rewards: what a function of the user's is given, what is made of what it returns, and a run that learns from one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError, RewardError
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.data.metrics import exact_match, f1
from sglang.srt.mezo.data.tasks import SST2
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner, digest_of_plans
from sglang.srt.mezo.training.rewards import Writer
from test_examples import ROOT, run, summary_of
from tiny import tiny_tokenizer

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "metrics.jsonl"
MODULE = """
import json, math

def by_name(completions, prompts, level):
    return [len(text) + len(prompt) + number for text, prompt, number in zip(completions, prompts, level)]

def all_columns(**columns):
    assert list(columns) == ["level", "answers", "prompts", "completions"], list(columns)
    return [0.0] * len(columns["completions"])

def too_few(completions): return [1.0]
def not_finite(completions): return [math.nan] * len(completions)
def no_numbers(completions): return ["much"] * len(completions)
def nothing(completions): pass
def fails(completions): return [1 / 0 for _ in completions]
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "graders"
    sys.modules.pop("graders", None)


def graded(reward: str):
    grade = Writer.of(MezoConfig(reward=reward).generation, tiny_tokenizer()).grade
    plans = [ExamplePlan((), columns={"prompt": "p" * n, "level": n, "answers": []}) for n in (1, 2)]
    return grade(plans, ["a", "bcd"])


def test_a_function_gets_what_it_names(module):
    assert graded("graders:by_name") == [3.0, 7.0]
    assert graded("graders:all_columns") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "graders:too_few returned 1 rewards for 2 completions"),
        ("not_finite", "graders:not_finite returned nan, which is no finite number"),
        ("no_numbers", r"graders:no_numbers failed in .*: ValueError: could not convert string"),
        ("nothing", r"graders:nothing failed in .*: TypeError: 'NoneType' object is not iterable"),
        ("fails", r"graders:fails failed in .*graders.py:15: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_reward_ends_the_run(module, name, message):
    with pytest.raises(RewardError, match=message):
        graded(f"graders:{name}")


@pytest.mark.parametrize(
    "name", ["graders", "graders:missing", "nowhere:function", "graders:number", "builtins:dict", ":", ""]
)
def test_what_is_no_function_is_refused_at_once(module, name):
    with pytest.raises(ConfigError, match="reward=.* is not allowed: module:function"):
        Writer.of(MezoConfig(reward=name).generation, tiny_tokenizer())


@pytest.mark.parametrize(
    ("text", "answers", "overlap", "match"),
    [
        ("Blue", ["blue"], 1.0, 1.0),
        ("the blue, boat.", ["Blue boat"], 1.0, 1.0),
        ("a blue boat", ["red boat", "boat"], 2 / 3, 0.0),
        ("boat boat", ["boat"], 2 / 3, 0.0),
        ("", ["boat"], 0.0, 0.0),
        ("", [""], 0.0, 1.0),
        ("boat", ["no answer", "boat"], 0.0, 1.0),
        ("No answer.", ["no answer", "boat"], 1.0, 1.0),
    ],
)
def test_metrics_of_answers(text, answers, overlap, match):
    assert (f1(text, answers), exact_match(text, answers)) == (pytest.approx(overlap), match)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"the official numbers are not at {GOLDEN}")
def test_metrics_are_the_official_ones():
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    rows = [row for row in rows if "golds" in row]
    assert len(rows) > 30
    for row in rows:
        assert f1(row["prediction"], row["golds"]) == row["f1"], row
        assert exact_match(row["prediction"], row["golds"]) == row["em"], row


# --- rows -------------------------------------------------------------------------------------------------------------


def encoder(objective: str = "f1", task=None, max_length: int = 40) -> Encoder:
    reward = "m:f" if objective == "reward" else None
    generation = MezoConfig(objective=objective, reward=reward, max_new_tokens=10).generation
    return Encoder(tiny_tokenizer(), max_length, task, generation=generation)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": "good film", "completion": "yes"}, ["yes"]),
        ({"prompt": "good film", "answers": ["yes", "so"], "completion": "no", "level": 2}, ["yes", "so"]),
    ],
)
def test_what_a_row_is_graded_by(row, answers):
    [example] = encoder().encode(row)
    assert example.prompt and example.options == () and example.columns == {**row, "answers": answers}
    [plan] = map(Planner("lora").plan, [example])
    assert plan.rows[0].suffix == example.prompt and plan.rows[0].reads == () and plan.columns == example.columns


def test_a_task_gives_the_right_option_for_an_answer():
    [example] = encoder(task=SST2()).encode({"sentence": "a fine film", "label": 1})
    assert example.columns["answers"] == ["great"] and example.columns["prompt"] == "a fine film It was"


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("f1", {"prompt": "good film"}, "a row needs answers, or a completion, to tell its f1 by"),
        ("exact_match", {"prompt": "good film", "answers": []}, "to tell its exact_match by"),
        ("f1", {"prompt": "good film", "answers": "yes"}, "answers='yes' must be a list of strings"),
        ("f1", {"prompt": "good film", "completion": 3}, "must be a list of strings"),
        ("reward", {"text": "good film"}, "have none of prompt and messages"),
        ("reward", {"prompt": ""}, "prompt='' must be a non-empty string"),
        ("reward", {"prompt": "good film " * 20}, "and max_new_tokens=10 more are more than the context of 40"),
    ],
)
def test_rows_that_cannot_be_graded_are_refused(objective, row, message):
    with pytest.raises(DataError, match=message):
        encoder(objective).encode(row)
    if objective != "reward":
        [example] = encoder("reward").encode({"prompt": "good film"})
        assert example.columns["answers"] == []


def test_a_run_that_goes_on_sees_changed_answers():
    rows = [{"prompt": "good film", "answers": [answer]} for answer in ("yes", "no")]
    one, other = (digest_of_plans(map(Planner("lora").plan, encoder().encode(row))) for row in rows)
    assert one != other


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"objective": "reward"}, "reward"),
        ({"objective": "f1", "reward": "m:f"}, "reward"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"objective": "completion", "temperature": 1.0}, "temperature"),
        ({"objective": "f1", "max_new_tokens": 0}, "max_new_tokens"),
        ({"objective": "f1", "temperature": -1.0}, "temperature"),
        ({"objective": "f1", "stop": ""}, "stop"),
        ({"stop": "."}, "stop"),
    ],
)
def test_settings_that_do_not_go_together(settings, field):
    with pytest.raises(ConfigError) as raised:
        MezoConfig(**settings)
    assert raised.value.field == field


# --- a run ------------------------------------------------------------------------------------------------------------

REWARD = """
def brevity(completions):
    return [-len(text) for text in completions]
"""
STEPS = 6


@pytest.mark.slow
def test_a_killed_run_of_sampled_rewards_goes_on_to_the_same_bits(tmp_path):
    (tmp_path / "brief.py").write_text(REWARD)
    command = [
        *(str(ROOT / "examples" / "mezo_opt_training.py"), "--reward", "brief:brevity", "--temperature", "1.0"),
        *(
            "--max_new_tokens",
            "3",
            "--zo_eps",
            "0.1",
            "--tuning",
            "lora",
            "--max_steps",
            str(STEPS),
            "--eval_steps",
            "3",
        ),
        *("--num_train", "40", "--num_dev", "8", "--num_test", "8", "--disable_tqdm", "true"),
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*command, "--output_dir", str(whole), env=environment)
    started = subprocess.Popen(
        [sys.executable, *command, "--output_dir", str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "seed_log").is_file() or len(SeedLog.open(killed / "seed_log")) < 2:
        assert started.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert len(SeedLog.open(killed / "seed_log")) < STEPS
    run(*command, "--output_dir", str(killed), "--resume_from_checkpoint", env=environment)
    records = SeedLog.open(whole / "seed_log").records()
    assert records == SeedLog.open(killed / "seed_log").records() and any(
        map(any, (r.projected_grads for r in records))
    )
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, killed)]
    assert adapters[0] == adapters[1]
    assert summary_of(whole)["reward"] == summary_of(killed)["reward"] == -summary_of(whole)["loss"]
