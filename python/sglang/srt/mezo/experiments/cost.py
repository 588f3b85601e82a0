"""What an experiment would take, before it is run: commands, forward passes, and hours on an H100 by a model of its
cost.

The model: a pass of ``t`` tokens over ``P`` parameters takes 2 P t operations at half of an H100's dense bfloat16
peak, and no less than the reading of 2 P bytes of weights at four fifths of its bandwidth. A backward pass is two
forward ones. Tokens are the median row's of the task. It is a model, and no measurement.
"""

import shlex
from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.mezo.adapters.architectures import is_masked
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.rows import has_splits
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments
from sglang.srt.mezo.experiments.spec import METHODS, Cell, Experiment, arguments_of, task_name
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.evaluate import EvaluateArguments

H100_OPERATIONS, H100_BYTES = 0.5 * 989e12, 0.8 * 3.35e12  # a second
PROMPT_TOKENS = {
    "sst2": 25,
    "sst5": 25,
    "trec": 20,
    "mnli": 55,
    "snli": 45,
    "rte": 66,
    "mrpc": 60,
    "cb": 80,
    "copa": 8,
    "boolq": 129,
    "wic": 41,
    "wsc": 44,
    "multirc": 247,
    "record": 210,
    "squad": 174,
    "drop": 246,
}
"""Of the median row, in OPT's tokens."""
_PACKED_TOKENS = 2048  # of a block, where the model's longest text decides
OPTION_TOKENS = {"copa": 6, "record": 25, "squad": 4, "drop": 3}
"""Of an option that is learned, where it is more than one."""
_TRAIN_ROWS = {"cb": 150, "copa": 300, "wsc": 54}
"""Of tasks that have fewer than the paper's 1,000, behind its development rows."""
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": 135e6,
    "facebook/opt-125m": 125e6,
    "facebook/opt-1.3b": 1.3e9,
    "facebook/opt-2.7b": 2.7e9,
    "facebook/opt-6.7b": 6.7e9,
    "facebook/opt-13b": 12.9e9,
    "facebook/opt-30b": 30e9,
    "facebook/opt-66b": 66e9,
    "FacebookAI/roberta-large": 355e6,
    "Qwen/Qwen3-32B": 32.8e9,
    "meta-llama/Llama-3.1-8B": 8.0e9,
}
"""Of models on the hub; of others the checkpoint says it."""


@dataclass(frozen=True)
class Cost:
    """Of a cell.

    Attributes:
        forward_passes: of a training batch, over all steps.
        hours: on one H100; None where nobody knows the model's size.
    """

    forward_passes: int
    backward_passes: int
    hours: float | None


def dry_run(experiment: Experiment) -> list[str]:
    """A line for each cell, and the sum."""
    cells = experiment.cells()
    hours = [cost_of(cell).hours for cell in cells]
    known = [one for one in hours if one is not None]
    told = f"{sum(known):.1f} h on one H100 by the cost model" if known else "hours unknown"
    of = "" if len(known) in (0, len(cells)) else f", those of {len(cells) - len(known)} cells unknown"
    return [*(told_of(number, cell) for number, cell in enumerate(cells)), f"{len(cells)} cells, {told}{of}"]


def told_of(number: int, cell: Cell) -> str:
    """What a cell would take, and the command for it."""
    cost = cost_of(cell)
    hours = "hours unknown" if cost.hours is None else f"{cost.hours:.2f} h on an H100 by the cost model"
    passes = f"{cost.forward_passes:,} forward" + (
        f" and {cost.backward_passes:,} backward" if cost.backward_passes else ""
    )
    return f"{number:>4} {cell.id}: {passes} passes, {hours}\n     {command_of(cell)}"


def cost_of(cell: Cell) -> Cost:
    """By the model above, of training and of the test rows."""
    model, data, arguments = arguments_of(cell)
    tokens = _row_tokens(cell)
    tests = (data.num_test or 1000) * tokens
    forward = backward = 0
    batch = 0
    if isinstance(arguments, MezoConfig):
        steps = arguments.max_steps
        if steps < 1:
            rows = _train_rows(data)
            steps = -(-rows // arguments.train_batch_size) * int(arguments.num_train_epochs)
        forward, batch = steps * arguments.forward_passes, arguments.train_batch_size * tokens
    elif isinstance(arguments, FirstOrderArguments):
        batch_size = arguments.per_device_train_batch_size
        steps = arguments.max_steps
        if steps < 1:
            steps = -(-_train_rows(data) // batch_size) * int(arguments.num_train_epochs)
        forward = backward = steps
        batch = batch_size * tokens
    size = parameters_of(model.model)
    if size is None:
        return Cost(forward, backward, None)
    seconds = (forward + 2 * backward) * _pass_seconds(size, batch) + _pass_seconds(size, tests)
    return Cost(forward, backward, seconds / 3600)


def command_of(cell: Cell) -> str:
    """What one would type for it."""
    method = METHODS[cell.method]
    _, data, arguments = arguments_of(cell)
    if isinstance(arguments, MezoConfig):
        verb, given = "train", {**cell.model, **cell.data, **method.settings(cell.settings), "seed": cell.seed}
    elif isinstance(arguments, EvaluateArguments) and _draws_as_an_evaluation(data):
        verb, given = "evaluate", {**cell.model, **_of_tests(cell, data), **method.settings(cell.settings)}
    else:
        return f"sglang-mezo experiment cell FOLDER --cell {cell.id}"
    return " ".join(["sglang-mezo", verb, *(f"--{name} {shlex.quote(_text(value))}" for name, value in given.items())])


def _draws_as_an_evaluation(data: DataArguments) -> bool:
    """Whether ``sglang-mezo evaluate`` has the test rows of such a cell."""
    of_a_split = data.dataset is None or has_splits(data.dataset)
    return of_a_split and data.k is None and data.train_set_seed == 0 and data.dev_split is None and data.num_test != 0


def _of_tests(cell: Cell, data: DataArguments) -> dict[str, Any]:
    """The fields of an evaluation of a cell's test rows."""
    known = {one.name for one in fields(EvaluateArguments)}
    given = {name: value for name, value in cell.data.items() if name in known} | {"rows": data.num_test}
    return given if data.test_split is None else {**given, "split": data.test_split}


def parameters_of(model: str) -> float | None:
    """How many a model has; None where it is neither known nor at hand."""
    if model in PARAMETERS:
        return PARAMETERS[model]
    try:
        config, _ = read_checkpoint(model)
    except (ConfigError, DataError):  # it is not here, and no hub has it
        return None
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    return 12 * layers * width**2 + text.vocab_size * width * (2 if is_masked(config) else 1)


def _row_tokens(cell: Cell) -> int:
    """Tokens that run for a row at a point."""
    task = task_name(cell.task)
    if cell.data.get("pack"):
        return int(cell.data.get("max_length") or _PACKED_TOKENS)
    prompt, option = PROMPT_TOKENS.get(task, 100), OPTION_TOKENS.get(task, 1)
    if cell.method == "mezo-alora":
        return 8 + option  # what follows the invocation
    if cell.method == "icl":
        return (1 + int(cell.settings.get("num_demonstrations", 32))) * (prompt + option)
    return prompt + option


def _train_rows(data: DataArguments) -> int:
    if data.k is not None:
        return data.k * 3
    return min(data.num_train or 1000, _TRAIN_ROWS.get(task_name(data.task or ""), 1000))


def _pass_seconds(parameters: float, tokens: float) -> float:
    return max(2 * parameters * tokens / H100_OPERATIONS, 2 * parameters / H100_BYTES)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
