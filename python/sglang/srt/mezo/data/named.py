"""What settings call a data set, and how its rows are read."""

from collections.abc import Iterator
from typing import NamedTuple

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.rows import SourceRow, read_rows
from sglang.srt.mezo.data.streams import stream_rows
from sglang.srt.mezo.data.tasks import Task, get_task

TEXT = "text"
"""In the place of a task: rows are whole texts, in a column of this name."""


class Named(NamedTuple):
    """A data set, and how its rows are read.

    Attributes:
        task: renders the rows; none of prompts, and of whole texts.
        config: of a hub data set.
        text: whether the rows are whole texts.
    """

    task: Task | None
    path: str
    config: str | None
    text: bool

    def rows(self, split: str) -> list[SourceRow]:
        """Those of a split."""
        rows = read_rows(self.path, split, self.config)
        if self.task is not None:
            return [row for row in rows if row.problem is not None or self.task.is_labelled(row.fields)]
        return list(map(_only_text, rows)) if self.text else rows

    def texts(self, split: str) -> Iterator[SourceRow]:
        """Those of a split, one after the other."""
        return map(_only_text, stream_rows(self.path, split, self.config))


def named_data(task: str | None, dataset: str | None, config: str | None = None) -> Named:
    """The data set that is meant by settings; ConfigError where they name none."""
    named = get_task(task) if task and not is_text(task) else None
    if named is None:
        if not dataset:
            raise ConfigError("dataset", None, "a hub name, folder or file; or name a task")
        return Named(None, dataset, config, is_text(task))
    path = dataset or next(iter(named.dataset), None)
    if config is None and path in named.dataset[:1]:
        config = next(iter(named.dataset[1:]), None)
    if not path:
        raise ConfigError("dataset", None, f"a hub name, folder or file, as task {named.name} names none")
    return Named(named, path, config, False)


def is_text(task: str | None) -> bool:
    return task is not None and task.lower() == TEXT


def _only_text(row: SourceRow) -> SourceRow:
    """Without its other columns, which might be taken for another form."""
    if row.problem is not None or TEXT not in row.fields:
        return SourceRow({}, row.source, row.line, row.problem or f"column {TEXT!r} is missing")
    return SourceRow({TEXT: row.fields[TEXT]}, row.source, row.line)
