"""From files and hub data sets to rows, each with the file and line that it came from."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang.srt.mezo.errors import DataError
from sglang.srt.mezo.tasks import Task


@dataclass(frozen=True)
class SourceRow:
    """A raw row and where it came from. Where it could not be read, ``problem`` says why and there are no fields."""

    fields: Mapping[str, Any]
    source: str
    line: int
    problem: str | None = None

    def whole_fields(self) -> Mapping[str, Any]:
        """The fields; DataError where the row could not be read."""
        if self.problem is not None:
            raise DataError(self.problem, self.source, self.line)
        return self.fields


def read_rows(path: str, split: str, task: Task | None = None) -> list[SourceRow]:
    """Read one split of a local file, a local folder or a hub data set.

    Args:
        path: a ``.jsonl`` or ``.txt`` file (the split is then the whole file), a folder with ``<split>.jsonl``, or
            anything that ``datasets.load_dataset`` takes.
        split: name of the split.
        task: supplies the configuration of a hub data set.

    Raises:
        DataError: nothing can be read there, or a line is not JSON.
    """
    local = Path(path)
    if local.is_dir() and (local / f"{split}.jsonl").is_file():
        local = local / f"{split}.jsonl"
    if local.suffix == ".txt" and local.is_file():
        return list(_read_lines(local))
    if local.suffix == ".jsonl" and local.is_file():
        return list(read_jsonl(local, str(local)))
    if local.suffix in (".jsonl", ".txt"):
        raise DataError("no such file", str(local))
    return _read_with_datasets(path, split, task)


def _read_lines(path: Path) -> Iterator[SourceRow]:
    """A row for every line that is not blank, as the "text" reader of ``datasets`` does."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", str(path)) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield SourceRow({"text": line}, str(path), number)


def read_jsonl(path: Path, source: str, max_line_bytes: int = sys.maxsize - 1) -> Iterator[SourceRow]:
    """Rows of a file of JSON lines, whatever its name; ``source`` is what messages call it.

    Raises:
        DataError: a line is longer than ``max_line_bytes``.
    """
    with open(path, "rb") as file:  # json decodes each line, so that bytes that are no text are an error of their line
        for number, line in enumerate(iter(partial(file.readline, max_line_bytes + 1), b""), 1):
            if len(line) > max_line_bytes:
                raise DataError(f"the line is longer than {max_line_bytes} bytes", source, number)
            if line.strip():
                yield _parse_line(line, source, number)


def _parse_line(line: bytes, source: str, number: int) -> SourceRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SourceRow({}, source, number, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return SourceRow({}, source, number, f"a JSON object is needed, not {type(fields).__name__}")
    return SourceRow(fields, source, number)


def _read_with_datasets(path: str, split: str, task: Task | None) -> list[SourceRow]:
    import datasets

    arguments = (path, *task.dataset[1:]) if task is not None and path == task.dataset[0] else (path,)
    try:
        rows = datasets.load_dataset(*arguments, split=split)
    except Exception as error:  # datasets raises a different type for every way in which a path can be wrong
        raise DataError(f"cannot load split {split!r}: {error}", path) from error
    return [SourceRow(row, f"{path}[{split}]", number) for number, row in enumerate(rows, 1)]


def sample_rows(rows: Sequence[SourceRow], count: int | None, seed: int) -> list[SourceRow]:
    """``count`` rows in a seeded random order, or all of them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]
