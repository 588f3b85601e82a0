"""The command line of a run: one flag for every field of some dataclasses, and what other programs call the same
things.

Whatever is typed wrong ends in an error of one line, before anything starts.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Optional, Union, get_args, get_origin, get_type_hints

from sglang.srt.mezo.core.errors import ConfigError, MezoError, UsageError
from sglang.srt.mezo.core.kinds import described, fits, from_text
from sglang.srt.mezo.core.settings import setting_of
from sglang.srt.mezo.training.yaml_file import read_yaml

SAME = {
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "torch_dtype": "dtype",
    "task_name": "task",
    "dataset_name": "dataset",
    "train_file": "dataset",
    "dataset_config_name": "dataset_config",
    "dataset_streaming": "streaming",
    "max_seq_length": "max_length",
    "block_size": "max_length",
    "packing": "pack",
    "dataset_test_split": "test_split",
    "max_train_samples": "num_train",
    "num_eval": "num_test",
    "max_eval_samples": "num_dev",
    "max_predict_samples": "num_test",
    "adapter_name_or_path": "init_from",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "eps": "zo_eps",
    "zero_order_eps": "zo_eps",
    "num_k": "k",
    "data_dir": "dataset",
    "optimizer": "optim",
    "num_prefix": "num_virtual_tokens",
    "max_completion_length": "max_new_tokens",
    "reward_funcs": "reward",
    "eos_token": "stop",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
}
"""Names of MeZO's, Transformers', PEFT's and TRL's programs for fields of ours that mean the same."""

MEANT: dict[str, dict[str, dict[str, str]]] = {
    "trainer": {"zo": {}},
    "load_float16": {"true": {"dtype": "float16"}, "false": {}},
    "load_bfloat16": {"true": {"dtype": "bfloat16"}, "false": {}},
    "fp16": {"true": {"dtype": "float16"}, "false": {}},
    "bf16": {"true": {"dtype": "bfloat16"}, "false": {}},
    "lora": {"true": {"tuning": "lora"}},
    "apply_lora": {"true": {"tuning": "lora"}},
    "zero_order_optim": {"true": {}},
    "efficient_zero_order": {"true": {}},
    "few_shot_type": {"prompt": {}},
    "optimize_acc": {"true": {"objective": "accuracy"}, "false": {}},
    "no_auto_device": {"true": {}, "false": {}},
    "no_eval": {"true": {"num_test": "0"}, "false": {}},
    "save_model": {"true": {}},
    "save_on_interrupt": {"true": {}},
    "verbose": {"true": {}, "false": {}},
    "use_peft": {"true": {}},
    "prefix_tuning": {"true": {"tuning": "prefix"}, "false": {}},
    "no_reparam": {"true": {}},
    "prefix_init_by_real_act": {"true": {}},
    "peft_type": {"lora": {}, "prefix_tuning": {"tuning": "prefix"}},
    "lora_task_type": {"causal_lm": {}},
    "task_type": {"causal_lm": {}},
    "lora_dropout": {"0": {}, "0.0": {}},
    "lora_bias": {"none": {}, "false": {}},
    "bias": {"none": {}},
    "use_rslora": {"false": {}},
    "train_as_classification": {"true": {"objective": "classification"}, "false": {"objective": "completion"}},
    "only_train_option": {"true": {}},
    "non_diff": {"true": {"objective": "f1"}, "false": {}},
    "sampling": {"false": {}},
    "num_beams": {"1": {}},
    "eval_strategy": {"steps": {}},
    "evaluation_strategy": {"steps": {}},
    "logging_strategy": {"steps": {}},
    "save_strategy": {"steps": {}, "no": {"save_steps": "0"}},
    "save_total_limit": {"1": {}},
    "dataset_text_field": {"text": {"task": "text"}},
    "do_train": {"true": {}},
    "do_eval": {"true": {}},
}
"""Flags of theirs whose meaning here depends on the value: what it sets of ours; any other value is refused."""

_FILE = "config"

INSTEAD = {
    "validation_file": "put the files into one folder as train.jsonl and validation.jsonl: --dataset FOLDER "
    "--dev_split validation",
    "test_file": "put the files into one folder as train.jsonl and test.jsonl: --dataset FOLDER --test_split test",
    "train_split": "a run trains on the split named train of --dataset, or on a file",
    "dataset_train_split": "a run trains on the split named train of --dataset, or on a file",
    "num_train_sets": "a run has one set of training rows, --train_set_seed says which",
    "sfc": "sglang-mezo evaluate --calibrated true",
    "icl_sfc": "sglang-mezo evaluate --calibrated true",
    "linear_probing": "method linear-probing of sglang-mezo experiment",
    "lp_early_stopping": "method linear-probing of sglang-mezo experiment",
    "head_tuning": "method head-tuning of sglang-mezo experiment",
    "untie_emb": "method head-tuning of sglang-mezo experiment, which unties them",
    "result_file": "summary.json in --output_dir has the results",
    "tag": "--output_dir names a run",
    "template": "a task has its prompts: --task, or module:Class of your own",
    "mapping": "a task has its label words: --task, or module:Class of your own",
    "top_k": "completions are drawn by --temperature alone",
    "top_p": "completions are drawn by --temperature alone",
    "load_in_8bit": "--dtype is the type of the weights",
    "load_in_4bit": "--dtype is the type of the weights",
    "load_int8": "--dtype is the type of the weights",
}
"""Flags of theirs that have no meaning here, and what there is instead."""


def read(arguments: Sequence[str], kinds: Sequence[type], description: str | None = None) -> dict[str, Any]:
    """The fields of the dataclasses ``kinds`` that a command line gives, each with its type. ``--help`` prints and
    exits. What ``--config`` names is a YAML file of fields; the flags go before it.

    Raises:
        UsageError: an unknown flag or field, a flag without its value, or a file that cannot be read.
        ConfigError: a value is not of its field's type.
    """
    types = {name: kind for one in kinds for name, kind in get_type_hints(one).items()}
    given, rest = _parser(kinds, types, description).parse_known_args(_joined(arguments, types))
    if rest:
        raise UsageError(_unknown(rest[0].partition("=")[0], types))
    flags = vars(given)
    file = flags.pop(_FILE, None)
    fields = {} if file is None else _read_file(file, types)
    texts: dict[str, str] = {}
    said: dict[str, str] = {}
    for name, value in flags.items():
        for field, text in _meant(name, _text(value)).items():
            # Those that give the objective stand together in the official scripts, and the last is meant.
            if texts.get(field, text) != text and field != "objective":
                raise UsageError(f"--{said[field]} and --{name} {_text(value)} say different things of {field}")
            texts[field], said[field] = text, name
    return fields | {name: from_text(name, text, types[name]) for name, text in texts.items()}


def _read_file(path: str, types: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a YAML file. A text stands for what it does on a command line, as YAML has 1e-4 for one."""
    content = read_yaml(Path(path), f"--config {path}")
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no fields, one a line as `learning_rate: 0.01`")
    fields = {}
    for given, value in content.items():
        for name, read in _fields_of(given, value, types, f"--config {path}").items():
            if name in fields:
                raise UsageError(f"--config {path} has {name} twice, once as {given}")
            fields[name] = read
    return fields


def _fields_of(given: Any, value: Any, types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that a name in a file stands for: one, or what a flag of theirs sets."""
    if (given in MEANT or given in INSTEAD) and given not in types:
        meant = _meant(given, str(value))
        if meant.keys() <= types.keys():
            return {name: from_text(name, text, types[name]) for name, text in meant.items()}
    return dict([field_of(given, value, types, where)])


def field_of(given: Any, value: Any, types: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """The field that a name in a file stands for, and its value.

    Args:
        types: of all fields, by name.
        where: the file, in words.

    Raises:
        UsageError: there is no such field.
        ConfigError: the value is not of the field's type.
    """
    name = SAME[given] if given in SAME else given
    if name not in types:
        close = _close(str(given), types)
        raise UsageError(f"{where} has an unknown field {given}" + (f": did you mean {close}?" if close else ""))
    if isinstance(value, str):
        value = from_text(name, value, types[name])
    if not fits(value, types[name]):
        raise ConfigError(name, value, f"{described(types[name])} (in {where.removeprefix('--config ')})")
    return name, value


def build(kinds: Sequence[type], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """The dataclasses, from their fields' values; ConfigError where a value is missing or not allowed."""
    built = []
    for kind in kinds:
        own = {field.name: given[field.name] for field in fields(kind) if field.name in given}
        for field in fields(kind):
            if field.name not in own and field.default is MISSING:
                raise ConfigError(field.name, None, f"--{field.name} is needed. {setting_of(field).help}")
        built.append(kind(**own))
    return tuple(built)


def status_of(work: Callable[[], None]) -> int:
    """Exit status of a program that does ``work``: 2 where a user's mistake ends it, which is told in one line."""
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MezoError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _joined(arguments: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """With ``--flag=value`` for a flag that takes one value: argparse has no value that begins with a dash, such as
    -1e-3."""
    named = {
        **types,
        _FILE: str,
        **{name: types.get(ours) for name, ours in SAME.items()},
        **dict.fromkeys([*MEANT, *INSTEAD]),
    }
    flags = {spelling for name in named for spelling in _spellings(name)}
    single = {
        spelling
        for name, kind in named.items()
        for spelling in _spellings(name)
        if kind not in (None, bool) and not _is_list(kind)
    }
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in single and argument.startswith("-") and argument not in flags:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of a screenful of usage."""
        raise UsageError(message)


def _parser(kinds: Sequence[type], types: Mapping[str, Any], description: str | None) -> _Parser:
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for kind in kinds:
        group = parser.add_argument_group(kind.__name__)
        for field in fields(kind):
            _add(group, field.name, types[field.name], _help(field))
            if field.default is True:
                group.add_argument(
                    *_spellings(f"no_{field.name}"),
                    dest=field.name,
                    action="store_const",
                    const="false",
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
    _add(parser, _FILE, str, "YAML file of the fields below; flags go before it.")
    for name, ours in SAME.items():
        if ours in types and name not in types:
            _add(parser, name, types[ours], argparse.SUPPRESS, dest=ours)
    for name in {**MEANT, **INSTEAD}:
        if name not in types:
            _add(parser, name, bool, argparse.SUPPRESS)
    return parser


def _add(parser: Any, name: str, kind: Any, help: str, dest: str | None = None) -> None:
    """A flag that keeps its value as text; that of a boolean may be left out, a list may have several."""
    several = {"nargs": "*"} if _is_list(kind) else {"nargs": "?", "const": "true"} if kind is bool else {}
    parser.add_argument(
        *_spellings(name),
        dest=dest or name,
        default=argparse.SUPPRESS,
        help=help,
        metavar=_METAVARS.get(kind),
        **several,
    )


_METAVARS = {
    int: "N",
    Optional[int]: "N",
    float: "X",
    Optional[float]: "X",
    bool: "true|false",
    str: "TEXT",
    Optional[str]: "TEXT",
    Optional[Union[str, list[int]]]: "TEXT",
}


def _is_list(kind: Any) -> bool:
    """Whether a text stands for a list, as ``from_text`` has it."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return get_origin(next(choice for choice in choices if choice is not NoneType)) is list


def _spellings(name: str) -> list[str]:
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)


def _help(field: Any) -> str:
    own = setting_of(field)
    default = [] if field.default in (None, MISSING) else [str(field.default)]
    notes = "; ".join([*default, *filter(None, [str(own.bounds)])])
    return (f"{own.help} [{notes}]" if notes else own.help).replace("%", "%%")


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ",".join(value)


def _meant(name: str, text: str) -> dict[str, str]:
    """Fields of ours, as text, that a flag stands for."""
    if name in INSTEAD:
        raise UsageError(f"--{name} is not a flag here: {INSTEAD[name]}")
    if name not in MEANT:
        return {name: text}
    meaning = MEANT[name]
    if text.lower() not in meaning:
        raise ConfigError(name, text, f"{' or '.join(meaning)}, as other programs have it")
    return meaning[text.lower()]


def _unknown(flag: str, types: Mapping[str, Any]) -> str:
    if not flag.startswith("-"):
        return f"{flag!r} is not a flag, and no flag before it takes it as a value"
    close = _close(flag.lstrip("-").replace("-", "_"), types)
    return f"unknown flag {flag}" + (f": did you mean --{close}?" if close else "; --help lists all")


def _close(name: str, types: Mapping[str, Any]) -> str | None:
    """The field that was meant by a name, as far as one can tell."""
    known = {**{known: known for known in types}, **SAME}
    matches = difflib.get_close_matches(name, known, n=1)
    return known[matches[0]] if matches else None
