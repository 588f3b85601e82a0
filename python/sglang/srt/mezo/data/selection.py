"""Which rows of a data set are trained on, chosen on and reported."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.data.checks import OnBadRow, problem, usable
from sglang.srt.mezo.data.named import Named, is_text
from sglang.srt.mezo.data.rows import SourceRow, has_splits
from sglang.srt.mezo.data.sampling import few_of_each, permuted, sets_of_demonstrations, shuffled
from sglang.srt.mezo.data.tasks import Task, TextExample, final
from sglang.srt.mezo.data.texts import BAD_ROW

TRAIN = "train"
NUM_TRAIN, _NUM_DEV, _NUM_TEST = 1000, 500, 1000
_FEW_TEST_SEED = 42  # of which the paper's test rows beside few training rows are, whatever these are


@dataclass(frozen=True)
class RowArguments:
    """Which rows, and how many; ConfigError names the field at fault."""

    task: Optional[str] = setting(
        None, "Task that renders the rows; text: they are whole texts, in a column text; none for files of prompts."
    )
    dataset: Optional[str] = setting(None, "Hub name, folder or file; the task's own by default.")
    dataset_config: Optional[str] = setting(None, "Configuration of a hub data set; the task's own by default.")
    max_length: Optional[int] = setting(
        None,
        "Most tokens of an example; the model's context by default. A whole text is cut into blocks of so many, the "
        "prompt of a task loses its first; any other row that is longer is a bad row, as nothing is cut off.",
        at_least=2,
    )
    dev_split: Optional[str] = setting(
        None, "Split to choose the adapter on; held out of train by default, and of a file."
    )
    test_split: Optional[str] = setting(
        None, "Split to report; the task's by default, else held out of train, and of a file."
    )
    num_train: Optional[int] = setting(
        NUM_TRAIN, "Training rows to use, or none for all, as always of a stream.", at_least=1
    )
    num_dev: Optional[int] = setting(
        None,
        "Development rows to use; the task's by default, else 500. Held out of a file, at most a fifth of it. Of a "
        "stream, blocks.",
        at_least=0,
    )
    num_test: Optional[int] = setting(
        _NUM_TEST,
        "Test rows to use, or none for all; where held out, at most a fifth. Of a stream, blocks.",
        at_least=0,
    )
    k: Optional[int] = setting(
        None,
        "Of a task with classes: so many training rows of each, and as many more to choose on, in the place of "
        "num_train and num_dev.",
        at_least=1,
    )
    train_set_seed: int = setting(
        0, "Which rows are drawn.", at_least=0, below=2**32, words="an unsigned 32-bit number"
    )
    on_bad_row: OnBadRow = setting("raise", "raise: stop before training; skip: leave the row out.")

    def __post_init__(self):
        require_settings(self)
        for name in ("dev_split", "test_split"):
            split = getattr(self, name)
            if split is not None and {TRAIN, "all"} & set(re.findall(r"[^\[\]+]+(?=\[|\+|$)", split)):
                raise ConfigError(
                    name,
                    split,
                    f"another split than {TRAIN}, which is trained on; rows are held out of it where none is named",
                )
        if self.k is not None:
            self._require_classes()

    def dev_rows(self, task: Task | None) -> int:
        """Development rows to use."""
        if self.num_dev is not None:
            return self.num_dev
        return _NUM_DEV if task is None else task.num_dev

    def _require_classes(self) -> None:
        if not self.task or is_text(self.task):
            raise ConfigError("k", self.k, "none without a task, which says what the classes are")
        for name, value, default in (("num_train", self.num_train, NUM_TRAIN), ("num_dev", self.num_dev, None)):
            if value != default:
                raise ConfigError(name, value, "nothing beside k, which says how many rows are drawn")
        if self.dev_split is not None:
            raise ConfigError("dev_split", self.dev_split, "nothing beside k, which draws them from the training rows")


def require_splits(named: Named, data: RowArguments) -> None:
    if has_splits(named.path):
        return
    for name, count in (("dev_split", "num_dev"), ("test_split", "num_test")):
        if getattr(data, name) is not None:
            raise ConfigError(
                name,
                getattr(data, name),
                f"none for {named.path}, which has no splits: {count} of its rows are held out. "
                f"Or put a file for each split into a folder: {TRAIN}.jsonl, validation.jsonl, test.jsonl",
            )


Rows = list[SourceRow]


def drawn_rows(named: Named, data: RowArguments) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, to choose on and to report.

    Of a task they are those that the paper's code draws, where there are splits and development rows come from train;
    of a file they are held out.
    """
    require_splits(named, data)
    has_tests = named.task is not None and has_splits(named.path)
    official = has_tests and data.dev_split is None
    drawn, seed = permuted if official else shuffled, data.train_set_seed
    test_split = data.test_split or (named.task.eval_split if named.task and has_tests else None)
    rows = named.rows(TRAIN)
    train = drawn(rows, seed)
    if test_split is None:
        train, test = _hold_out(train, data.num_test)
    else:
        test = _tests(named.rows(test_split), data, drawn)
    if data.k is not None:
        if named.task is None or named.task.objective != "classification":
            raise ConfigError("k", data.k, "none for a task without classes")
        pool, texts = _rendered(named.task, train if test_split is None else rows, data.on_bad_row)
        return *few_of_each(pool, [text.label for text in texts], data.k, seed), test
    if data.dev_split:
        return train[: data.num_train], drawn(named.rows(data.dev_split), seed)[: data.dev_rows(named.task)], test
    count = data.dev_rows(named.task)
    known = train[: None if data.num_train is None else data.num_train + count]
    if official:
        kept = max(0, len(known) - count)
        return known[:kept], known[kept:], test
    train, dev = _hold_out(known, count)
    return train[: data.num_train], dev, test


def _tests(rows: Rows, data: RowArguments, drawn: Callable[[Rows, int], Rows]) -> Rows:
    """Of a test split; beside few training rows they are the same whatever these are."""
    if data.k is None:
        return drawn(rows, data.train_set_seed)[: data.num_test]
    if data.num_test is None or len(rows) <= data.num_test:
        return rows
    return permuted(rows, _FEW_TEST_SEED)[: data.num_test]


def with_demonstrations(named: Named, rows: Rows, count: int, on_bad_row: OnBadRow) -> Rows:
    """Each row with ``count`` training rows to be shown before it, none of which is asked itself.

    Raises:
        ConfigError: no row is left to be shown.
        DataError: names one that is to be shown and cannot be used; ``on_bad_row="skip"`` shows others.
    """
    if named.task is None or not count:
        return rows
    asked = {(row.source, row.line) for row in rows}
    pool = [row for row in named.rows(TRAIN) if (row.source, row.line) not in asked]
    if on_bad_row == "skip":
        pool, _ = _rendered(named.task, pool, on_bad_row)
    if not pool:
        allowed = (
            f"0 where all rows of {named.path} are asked themselves: ask fewer, or have a folder with a train split"
        )
        raise ConfigError("num_demonstrations", count, allowed)
    drawn = sets_of_demonstrations(pool, count, len(rows))
    return [replace(row, demonstrations=_words(named.task, others)) for row, others in zip(rows, drawn)]


def _words(task: Task, rows: Rows) -> list[str]:
    """Rows as they are shown; DataError names one that cannot be used."""
    return [final(text).demonstration for text in _rendered(task, rows, "raise")[1]]


def _rendered(task: Task, rows: Rows, on_bad_row: OnBadRow) -> tuple[Rows, list[TextExample]]:
    """The usable rows, and their words. A bad one raises DataError, or is logged and left out."""

    def outcome(row: SourceRow) -> tuple[SourceRow, TextExample] | DataError:
        try:
            return row, task.render(row.whole_fields())
        except BAD_ROW as error:
            return problem(error, row)

    found = list(usable(map(outcome, rows), on_bad_row))
    return [row for row, _ in found], [text for _, text in found]


def _hold_out(rows: list[SourceRow], count: int | None) -> tuple[list[SourceRow], list[SourceRow]]:
    """All but the last ``count`` rows, and those; at most a fifth is held out."""
    most = len(rows) // 5
    kept = len(rows) - (most if count is None else min(count, most))
    return rows[:kept], rows[kept:]
