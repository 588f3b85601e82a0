"""What a run trains on, chooses its adapter on and reports: splits of a data set, or rows held out of one,
tokenised."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from sglang.srt.mezo.core.config import Objective
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.data.chat import Renderer
from sglang.srt.mezo.data.examples import Encoder, Example, OnBadRow, count_shared, default_objective, get_task
from sglang.srt.mezo.data.rows import SourceRow, has_splits, read_rows, sample_rows
from sglang.srt.mezo.data.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TRAIN = "train"
_DATA_SEED = 0  # which rows are drawn is the same in every run, as in the MeZO paper


@dataclass(frozen=True)
class DataArguments:
    """Where examples come from, and how many are used; ConfigError names the field at fault."""

    task: Optional[str] = setting(None, "Task that renders the rows; none for files of prompts.")
    dataset: Optional[str] = setting(None, "Hub name, folder or file; the task's own by default.")
    dev_split: Optional[str] = setting(
        None, "Split to choose the adapter on; held out of train by default, and of a file."
    )
    test_split: Optional[str] = setting(
        None, "Split to report; the task's by default, else held out of train, and of a file."
    )
    num_train: Optional[int] = setting(1000, "Training rows to use, or none for all.", at_least=1)
    num_dev: int = setting(500, "Development rows to use; where held out, of what is left at most a fifth.", at_least=0)
    num_test: Optional[int] = setting(
        1000, "Test rows to use, or none for all; where held out, at most a fifth.", at_least=0
    )
    on_bad_row: OnBadRow = setting("raise", "raise: stop before training; skip: leave the row out.")

    def __post_init__(self):
        require_settings(self)
        for name in ("dev_split", "test_split"):
            split = getattr(self, name)
            if split is not None and {_TRAIN, "all"} & set(re.findall(r"[^\[\]+]+(?=\[|\+|$)", split)):
                raise ConfigError(
                    name,
                    split,
                    f"another split than {_TRAIN}, which is trained on; rows are held out of it where none is named",
                )


@dataclass(frozen=True)
class Splits:
    """Tokenised examples of a run.

    Attributes:
        invocation: tokens from which an activated LoRA adapter acts; none for ordinary LoRA.
        shared: how many examples of a split are in another too, such as {"test in train": 3}; only where there are any.
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    objective: Objective
    invocation: tuple[int, ...]
    shared: dict[str, int]


def load_splits(
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    invocation: Sequence[int] | None,
    data: DataArguments,
    chat: Renderer | None = None,
    kind: type[Encoder] = Encoder,
) -> Splits:
    """Read and tokenise, as ``Encoder`` does. Examples that are in more than one split are counted in a warning.

    Args:
        invocation: None for the chat template's generation prompt.
        kind: of encoder, as the model needs it.

    Raises:
        ConfigError: there is no data set, or it has no splits and one is named; or the prompts end with no common
            generation prompt.
        DataError: names the file and line of the first bad row.
    """
    task, dataset = named_data(data.task, data.dataset)
    rows = _read(dataset, task, data)
    encoder = kind(tokenizer, max_length, task, invocation or (), chat)
    train, dev, test = (encoder.encode_rows(part, data.on_bad_row) if part else [] for part in rows)
    if not train:
        raise DataError("no training row is left", dataset)
    if invocation is None:
        invocation = generation_prompt(encoder, rows[0], [*train, *dev, *test])
    return Splits(train, dev, test, default_objective(train), tuple(invocation), _shared(train, dev, test))


def named_data(task: str | None, dataset: str | None) -> tuple[Task | None, str]:
    """The task of a name, and where its rows are; ConfigError where neither says that."""
    named = get_task(task) if task else None
    if dataset:
        return named, dataset
    if named is None:
        raise ConfigError("dataset", None, "a hub name, folder or file; or name a task")
    return named, named.dataset[0]


def generation_prompt(encoder: Encoder, rows: list[SourceRow], examples: list[Example]) -> tuple[int, ...]:
    """The invocation that a chat template gives; ConfigError where the prompts end with no common one."""
    try:
        return encoder.generation_prompt(rows, (example.prompt for example in examples))
    except DataError as error:
        needed = f"the text from which activated LoRA acts, such as ' It was', or --tuning lora, as {error}"
        raise ConfigError("invocation", None, needed) from error


def _read(
    dataset: str, task: Task | None, data: DataArguments
) -> tuple[list[SourceRow], list[SourceRow], list[SourceRow]]:
    """Rows to train on, to choose on and to report."""
    test_split = data.test_split or (task.eval_split if task and has_splits(dataset) else None)
    if not has_splits(dataset):
        for name, count in (("dev_split", "num_dev"), ("test_split", "num_test")):
            if getattr(data, name) is not None:
                raise ConfigError(
                    name,
                    getattr(data, name),
                    f"none for {dataset}, which has no splits: {count} of its rows are held out. "
                    f"Or put a file for each split into a folder: {_TRAIN}.jsonl, validation.jsonl, test.jsonl",
                )
    train = sample_rows(read_rows(dataset, _TRAIN, task), None, _DATA_SEED)
    if test_split:
        test = sample_rows(read_rows(dataset, test_split, task), data.num_test, _DATA_SEED)
    else:
        train, test = _hold_out(train, data.num_test)
    if data.dev_split:
        dev = sample_rows(read_rows(dataset, data.dev_split, task), data.num_dev, _DATA_SEED)
    else:
        wanted = None if data.num_train is None else data.num_train + data.num_dev
        train, dev = _hold_out(train[:wanted], data.num_dev)
    return train[: data.num_train], dev, test


def _hold_out(rows: list[SourceRow], count: int | None) -> tuple[list[SourceRow], list[SourceRow]]:
    """All but the last ``count`` rows, and those; at most a fifth is held out."""
    most = len(rows) // 5
    kept = len(rows) - (most if count is None else min(count, most))
    return rows[:kept], rows[kept:]


def _shared(train: list[Example], dev: list[Example], test: list[Example]) -> dict[str, int]:
    """Count examples that are in two splits, and warn of them."""
    pairs = {
        "dev in train": (dev, train, "the adapter is chosen on what it has learned"),
        "test in train": (test, train, "the reported figures are in part of what it has learned"),
        "test in dev": (test, dev, "the reported figures are in part of what it was chosen on"),
    }
    shared = {}
    for name, (held_out, others, consequence) in pairs.items():
        if count := count_shared(held_out, others):
            shared[name] = count
            split, _, other = name.split()
            logger.warning(
                "%d of %d %s examples are %s examples too: %s", count, len(held_out), split, other, consequence
            )
    return shared
