"""The command line of the main job: what users of other programs type works or is told in one line, and nothing has
started then."""

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Optional

import pytest

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.training.arguments import INSTEAD, MEANT, SAME, build, read, status_of
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments

ROOT = Path(__file__).parents[2]
KINDS = (ModelArguments, DataArguments, MezoConfig)


def given(line: str) -> dict:
    return read(line.split(), KINDS)


PRESET = {
    "model": "Qwen/Qwen3-32B",
    "dtype": "bfloat16",
    "task": "text",
    "dataset": "HuggingFaceFW/fineweb",
    "dataset_config": "sample-10BT",
    "streaming": True,
    "max_length": 1024,
    "pack": True,
    "num_dev": 64,
    "num_test": 64,
    "tuning": "full",
    "max_steps": 500,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "zo_eps": 1e-3,
    "num_perturbations": 1,
    "perturbation": "gaussian",
    "eval_steps": 100,
    "load_best_model_at_end": False,
}
"""Qwen3-32B on FineWeb."""


def test_the_preset_is_what_it_says():
    line = f"--config {ROOT}/examples/qwen3_32b_fineweb.yaml"
    assert given(line) == PRESET and given(f"--max_steps 5 {line}") == PRESET | {"max_steps": 5}
    model, data, config = build(KINDS, given(line))
    assert (model.tp_size, data.dev_split, config.parameters) == (1, None, None)
    assert (config.estimator, config.scale_by_loss_std, config.train_batch_size) == ("two_sided", False, 1)


# --- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--learning_rate 1e-3 --max_steps=5", {"learning_rate": 1e-3, "max_steps": 5}),
        ("--learning-rate 1e-3 --max-steps=5", {"learning_rate": 1e-3, "max_steps": 5}),
        ("--max_steps -1 --learning_rate -1e-3", {"max_steps": -1, "learning_rate": -1e-3}),
        ("--invocation ->", {"invocation": "->"}),
        ("--invocation 1,2 --chat_template chatml", {"invocation": "1,2", "chat_template": "chatml"}),
        ("--target_modules q_proj v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target_modules q_proj,v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target_modules q_proj, v_proj --r 4", {"target_modules": ["q_proj", "v_proj"], "r": 4}),
        ("--target_modules=all-linear", {"target_modules": ["all-linear"]}),
        ("--prefix_reuse False --overwrite_output_dir", {"prefix_reuse": False, "overwrite_output_dir": True}),
        ("--no_prefix_reuse --no-load-best-model-at-end", {"prefix_reuse": False, "load_best_model_at_end": False}),
        ("--num_train none --perturbation_rank none", {"num_train": None, "perturbation_rank": None}),
        ("--scale_by_loss_std false --estimator TWO_SIDED", {"scale_by_loss_std": False, "estimator": "two_sided"}),
        (
            "--task_name SST2 --trainer zo --load_float16 --model_name facebook/opt-125m --num_train 1000 --num_dev "
            "500 --num_eval 100",
            {
                "task": "SST2",
                "dtype": "float16",
                "model": "facebook/opt-125m",
                "num_train": 1000,
                "num_dev": 500,
                "num_test": 100,
            },
        ),
        (
            "--load_bfloat16 --load_float16 False --lora --zo_eps 1e-3",
            {"dtype": "bfloat16", "tuning": "lora", "zo_eps": 1e-3},
        ),
        ("--train_as_classification --only_train_option True --non_diff False", {"objective": "classification"}),
        ("--train_as_classification False --task_name SQuAD --non_diff", {"objective": "f1", "task": "SQuAD"}),
        ("--train_as_classification --train_as_classification False", {"objective": "completion"}),
        ("--train_as_classification False --task_name Copa", {"objective": "completion", "task": "Copa"}),
        (
            "--zero_order_optim --efficient_zero_order --zero_order_eps 1e-3 --few_shot_type prompt --num_k 16 "
            "--data_dir d",
            {"zo_eps": 1e-3, "k": 16, "dataset": "d"},
        ),
        ("--save_model --no_eval --no_auto_device --train_set_seed 3", {"num_test": 0, "train_set_seed": 3}),
        (
            "--model_name_or_path gpt --dataset_name rows.csv --use_peft --lora_r 4 --lora_alpha 8 "
            "--lora_target_modules q_proj v_proj --lr 1e-2",
            {
                "model": "gpt",
                "dataset": "rows.csv",
                "r": 4,
                "lora_alpha": 8.0,
                "target_modules": ["q_proj", "v_proj"],
                "learning_rate": 1e-2,
            },
        ),
        (
            "--bf16 --lora_dropout 0 --eval_strategy steps --eval_steps 20 --save_strategy no --save_total_limit 1",
            {"dtype": "bfloat16", "eval_steps": 20, "save_steps": 0},
        ),
    ],
)
def test_what_is_typed_reaches_its_field(line, expected):
    assert given(line) == expected


def test_every_field_is_a_flag_with_underscores_and_with_dashes():
    for kind in KINDS:
        for one in fields(kind):
            for flag in (f"--{one.name}", f"--{one.name.replace('_', '-')}"):
                try:
                    assert one.name in read([flag, "word"], KINDS)
                except ConfigError as error:
                    assert error.field == one.name


def test_other_programs_names_are_for_what_is_there():
    names = {one.name for kind in KINDS for one in fields(kind)}
    assert set(SAME.values()) <= names and not names & {*SAME, *MEANT, *INSTEAD}
    assert {name for meaning in MEANT.values() for ours in meaning.values() for name in ours} <= names


def test_fields_of_other_dataclasses_are_flags_too():
    @dataclass
    class More:
        file: Path = setting(help="A file.")
        seeds: Optional[list[int]] = setting(None, "Several.")

    assert build([More], read(["--file", "a/b"], [More])) == (More(Path("a/b"), None),)
    assert build([More], read(["--file", "a", "--seeds", "3", "4"], [More])) == (More(Path("a"), [3, 4]),)
    with pytest.raises(ConfigError, match="file=None is not allowed: --file is needed. A file."):
        build([More], {})


# --- what does not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lerning_rate 3", "unknown flag --lerning_rate: did you mean --learning_rate?"),
        ("--lerning-rate=3", "unknown flag --lerning-rate: did you mean --learning_rate?"),
        ("--task_nam sst2", "unknown flag --task_nam: did you mean --task?"),
        ("--wandb_project x", "unknown flag --wandb_project; --help lists all"),
        ("-x", "unknown flag -x; --help lists all"),
        ("sst2", "'sst2' is not a flag, and no flag before it takes it as a value"),
        ("--r 4 5", "'5' is not a flag, and no flag before it takes it as a value"),
        ("--learning_rate", "argument --learning_rate/--learning-rate: expected one argument"),
        ("--learning_rate --r 4", "argument --learning_rate/--learning-rate: expected one argument"),
        ("--learning_rate fast", "learning_rate='fast' is not allowed: a number"),
        ("--learning_rate --modle", "learning_rate='--modle' is not allowed: a number"),
        ("--r 8.5", "r='8.5' is not allowed: a whole number"),
        ("--r none", "r='none' is not allowed: a whole number"),
        ("--num_train many", "num_train='many' is not allowed: a whole number"),
        ("--prefix_reuse maybe", "prefix_reuse='maybe' is not allowed: true or false"),
        ("--tuning prompt", "tuning='prompt' is not allowed: one of alora, lora, full, prefix"),
        ("--dtype float8", "dtype='float8' is not allowed: one of auto, half, float16, bfloat16, float, float32"),
        ("--trainer regular", "trainer='regular' is not allowed: zo, as other programs have it"),
        ("--load_float16 maybe", "load_float16='maybe' is not allowed: true or false, as other programs have it"),
        ("--lora --prefix_tuning", "--lora and --prefix_tuning true say different things of tuning"),
        ("--fp16 --bf16", "--fp16 and --bf16 true say different things of dtype"),
        ("--lora False", "lora='False' is not allowed: true, as other programs have it"),
        ("--lora_dropout 0.1", "lora_dropout='0.1' is not allowed: 0 or 0.0, as other programs have it"),
        *((f"--{name} 1", f"--{name} is not a flag here: {instead}") for name, instead in INSTEAD.items()),
    ],
)
def test_what_cannot_be_read_is_named(line, message):
    with pytest.raises((ConfigError, UsageError)) as caught:
        given(line)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model=None is not allowed: --model is needed. Hub name or folder of the base model."),
        ({"model": "a", "max_total_tokens": 0}, "max_total_tokens=0 is not allowed: at least 1"),
        ({"model": "a", "num_train": 0}, "num_train=0 is not allowed: at least 1"),
        ({"model": "a", "num_dev": -1}, "num_dev=-1 is not allowed: zero or more"),
        ({"model": "a", "num_test": -1}, "num_test=-1 is not allowed: zero or more"),
        ({"model": "a", "tp_size": None}, "tp_size=None is not allowed: a whole number"),
        ({"model": "a", "num_train": "5"}, "num_train='5' is not allowed: a whole number, null"),
        ({"model": 5}, "model=5 is not allowed: a string"),
        ({"model": "a", "on_bad_row": "drop"}, "on_bad_row='drop' is not allowed: one of raise, skip"),
        ({"model": "a", "r": 0}, "r=0 is not allowed: at least 1"),
    ],
)
def test_what_is_not_allowed_is_named_with_its_value(values, message):
    with pytest.raises(ConfigError) as caught:
        build(KINDS, values)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["dev_split", "test_split"])
@pytest.mark.parametrize("split", ["train", "train[:80%]", "validation+train[10:20]", "train+test", "all"])
def test_what_is_trained_on_is_not_held_out(name, split):
    with pytest.raises(ConfigError, match="another split than train"):
        DataArguments(**{name: split})
    DataArguments(**{name: "training[:80%]+validation"})


def fails_with(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("r", 0, "at\nleast 1"),
        UsageError("r=0 is not allowed: at least 1"),
        OSError("r=0 is not allowed:\n at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys, error):
    assert status_of(fails_with(error)) == 2
    assert capsys.readouterr() == ("", "error: r=0 is not allowed: at least 1\n")


def test_an_interrupted_program_says_so(capsys):
    assert status_of(fails_with(KeyboardInterrupt())) == 130 and capsys.readouterr().err == "interrupted\n"
    assert status_of(lambda: None) == 0


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        status_of(lambda: 1 / 0)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        read(["--help"], KINDS, "What it does: 100 %.")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "What it does: 100 %." in shown
    assert all(f"--{one.name}" in shown for kind in KINDS for one in fields(kind))
    assert "--task_name" not in shown  # one name a field is enough to read


# --- the programs -----------------------------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("benchmarks/accuracy.py", "--jsn", "x"), "error: unknown flag --jsn: did you mean --json?"),
        (
            ("examples/finetune_in_server.py", "--hyperparameters", "{"),
            "error: argument --hyperparameters: invalid json_object value: '{'",
        ),
        (
            ("examples/finetune_in_server.py", "--train", "nowhere.jsonl"),
            "error: [Errno 2] No such file or directory: 'nowhere.jsonl'",
        ),
    ],
)
def test_a_program_ends_with_one_line(command, message):
    ended = run(*command)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1] == message and "usage" not in ended.stderr and "Traceback" not in ended.stderr


# --- a file of fields -------------------------------------------------------------------------------------------------


def test_flags_go_before_a_file_of_fields(tmp_path):
    (tmp_path / "run.yaml").write_text("model: a\nlr: 1e-2\nrank: 2\ntarget_modules: [q_proj]\nprefix_reuse: false\n")
    given = read(["--config", str(tmp_path / "run.yaml"), "--r", "4"], KINDS)
    assert given == {"model": "a", "learning_rate": 0.01, "r": 4, "target_modules": ["q_proj"], "prefix_reuse": False}


def test_a_flag_of_other_programs_that_sets_nothing_there_is_unknown(tmp_path):
    (tmp_path / "run.yaml").write_text("lora: true\n")
    with pytest.raises(UsageError, match="run.yaml has an unknown field lora"):
        read(["--config", str(tmp_path / "run.yaml")], (DataArguments,))


def test_a_file_may_have_the_flags_of_other_programs(tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: zo\nlora: true\nload_float16: true\ntask_name: SST2\n")
    given = read(["--config", str(tmp_path / "run.yaml")], KINDS)
    assert given == {"tuning": "lora", "dtype": "float16", "task": "SST2"}


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        ("tuning: lora\nprefix_tuning: true", UsageError, "run.yaml has tuning twice, once as prefix_tuning"),
        ("head_tuning: true", UsageError, "--head_tuning is not a flag here: method head-tuning"),
        ("trainer: regular", ConfigError, "trainer='regular' is not allowed: "),
        ("sfc: true", UsageError, "--sfc is not a flag here: sglang-mezo evaluate --calibrated true"),
        ("lerning_rate: 1", UsageError, "run.yaml has an unknown field lerning_rate: did you mean learning_rate?"),
        ("7: 1", UsageError, "run.yaml has an unknown field 7"),
        ("learning_rate: fast", ConfigError, "learning_rate='fast' is not allowed: a number"),
        ("max_steps: [1]", ConfigError, "max_steps=[1] is not allowed: a whole number (in "),
        ("seed: true", ConfigError, "seed=True is not allowed: a whole number (in "),
        ("- a list", UsageError, "run.yaml holds no fields"),
        ("", UsageError, "run.yaml holds no fields"),
        ("a: [", UsageError, "run.yaml cannot be read"),
        (None, UsageError, "run.yaml cannot be read"),
    ],
)
def test_a_file_of_fields_that_is_wrong_is_told_in_one_line(tmp_path, content, error, problem):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        read(["--config", str(path)], KINDS)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
