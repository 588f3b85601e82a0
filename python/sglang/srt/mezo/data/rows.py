"""From files and hub data sets to rows, each with the file and line that it came from."""

import csv
import io
import json
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from sglang.srt.mezo.core.errors import ConfigError, DataError, one_line

_SCRIPT, _CONVERTED = "Dataset scripts are no longer supported", "refs/convert/parquet"
"""What datasets says of a hub data set that only a script of its own reads, and the hub's conversion of such."""
_STORED_DATASET, _STORED_SPLITS = "state.json", "dataset_dict.json"  # in folders that datasets' save_to_disk wrote


@dataclass(frozen=True)
class SourceRow:
    """A raw row and where it came from. Where it could not be read, ``problem`` says why and there are no fields.

    Attributes:
        demonstrations: other rows in words, with their answers, which are shown before it.
    """

    fields: Mapping[str, Any]
    source: str
    line: int
    problem: str | None = None
    demonstrations: Sequence[str] = ()

    def whole_fields(self) -> Mapping[str, Any]:
        """The fields; DataError where the row could not be read."""
        if self.problem is not None:
            raise DataError(self.problem, self.source, self.line)
        return self.fields


def has_splits(path: str) -> bool:
    """Whether a data set may have more splits than the one that is trained on: a file has not, nor a single stored
    ``Dataset``."""
    local = Path(path).expanduser()
    return not local.is_file() and not (local / _STORED_DATASET).is_file()


def read_rows(path: str, split: str, config: str | None = None) -> list[SourceRow]:
    """Read one split of a local file, a local folder or a hub data set.

    Args:
        path: a file of one of the ``FORMATS``, which is then the whole split; a folder with ``<split>.jsonl`` or
            another of them; a folder that ``datasets`` wrote; or anything that ``datasets.load_dataset`` takes.
        split: name of the split.
        config: name of a configuration of a data set that ``datasets.load_dataset`` takes.

    Raises:
        ConfigError: ``config`` is given for what has none.
        DataError: nothing can be read there.
    """
    try:
        file = file_of(path, split, config)
        if file is not None:
            return _read_file(file) or _no_rows(file)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", str(error.filename or path)) from error
    try:
        rows = load_rows(path, split, config)
        return [SourceRow(without_padding(row), f"{path}[{split}]", number) for number, row in enumerate(rows, 1)]
    except Exception as error:  # datasets raises a different type for every way in which a path can be wrong
        raise DataError(f"cannot load split {split!r}: {one_line(error)}", path) from error


def _no_rows(file: Path) -> NoReturn:
    raise DataError("it has no rows", str(file))


def read_jsonl(path: Path, source: str, max_line_bytes: int = sys.maxsize - 1) -> Iterator[SourceRow]:
    """Rows of a file of JSON lines, whatever its name; ``source`` is what messages call it.

    Raises:
        DataError: a line is longer than ``max_line_bytes``.
    """
    with open(path, "rb") as file:
        yield from _json_lines(file, source, max_line_bytes)


# --- formats ----------------------------------------------------------------------------------------------------------


def _json_lines(file: IO[bytes], source: str, max_line_bytes: int = sys.maxsize - 1) -> Iterator[SourceRow]:
    # json decodes each line, so that bytes that are no text are an error of their line.
    for number, line in enumerate(iter(partial(file.readline, max_line_bytes + 1), b""), 1):
        if len(line) > max_line_bytes:
            raise DataError(f"the line is longer than {max_line_bytes} bytes", source, number)
        if line.strip():
            yield _parse_line(line, source, number)


def _parse_line(line: bytes, source: str, number: int) -> SourceRow:
    try:
        return _json_row(json.loads(line), source, number)
    except (ValueError, RecursionError) as error:
        return SourceRow({}, source, number, f"not JSON: {error}")


def _json_row(value: Any, source: str, number: int) -> SourceRow:
    if not isinstance(value, dict):
        return SourceRow({}, source, number, f"a JSON object is needed, not {type(value).__name__}")
    return SourceRow(value, source, number)


def _json(file: IO[bytes], source: str) -> Iterator[SourceRow]:
    """An array of objects, whose places count as lines; else an object a line, or one object alone."""
    content = file.read()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise DataError(f"not JSON: {error}", source) from error
        yield from _json_lines(io.BytesIO(content), source)
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield _json_row(value, source, number)


def _lines(file: IO[bytes], source: str) -> Iterator[SourceRow]:
    """A row for every line that is not blank, as the "text" reader of ``datasets`` does."""
    for number, line in enumerate(io.StringIO(_decoded(file, source), newline=None), 1):
        if line.strip():
            yield SourceRow({"text": line.removesuffix("\n")}, source, number)


_CLASS_COLUMNS = ("label", "coarse_label", "fine_label")
_JSON_COLUMNS = ("options", "messages", "tools", "functions", "entities", "answers", "answers_spans")


def _table(file: IO[bytes], source: str, delimiter: str) -> Iterator[SourceRow]:
    """A row for every line below the header. All columns are text, but for classes, which are numbers, and for
    lists and objects, which are JSON."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_decoded(file, source), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            yield _table_row(fields, source, line + 1)
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"not a table: {error}", source, reader.line_num) from error


def _table_row(fields: dict[Any, Any], source: str, line: int) -> SourceRow:
    if None in fields:
        return SourceRow({}, source, line, f"more values than the header has columns: {fields[None]}")
    for name, value in fields.items():
        try:
            if name in _CLASS_COLUMNS:
                fields[name] = int(value)
            elif name in _JSON_COLUMNS:
                fields[name] = json.loads(value)
        except (TypeError, ValueError, RecursionError):
            pass  # whoever needs the column says what it must be, and what it is
    return SourceRow(fields, source, line)


def _parquet(file: IO[bytes], source: str) -> Iterator[SourceRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"not a Parquet file: {error}", source) from error
    for number, row in enumerate(rows, 1):
        yield SourceRow(without_padding(row), source, number)


def without_padding(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives all objects of a column the same keys, and those that a row lacks the value None."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in row.items()}


def _decoded(file: IO[bytes], source: str) -> str:
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", source) from error


FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[SourceRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _lines,
    ".parquet": _parquet,
}
"""Readers by the end of a file's name, in any case."""
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip"}
"""What may follow it, and what ``fsspec`` calls it."""


def parts(path: Path) -> tuple[str, str, str]:
    """A file's name without its ends; the end that tells the format and the one that tells the compression, in small
    letters."""
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    inner = path.with_suffix("") if compression else path
    return inner.stem, inner.suffix.lower(), compression


def _opened(raw: BinaryIO, compression: str) -> AbstractContextManager[Any]:
    from fsspec.compression import compr

    if not compression:
        return nullcontext(raw)
    openers: dict[Any, Any] = compr
    return openers[_COMPRESSED[compression]](raw, mode="rb")


def _read_file(path: Path) -> list[SourceRow]:
    _, ending, compression = parts(path)
    if ending not in FORMATS:
        raise DataError(
            f"the end of a file's name tells its format: {', '.join(FORMATS)}, and after it {', '.join(_COMPRESSED)}",
            str(path),
        )
    try:
        with open(path, "rb") as raw, _opened(raw, compression) as file:
            return list(FORMATS[ending](file, str(path)))
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot be decompressed: {error}", str(path)) from error


# --- folders and the hub ----------------------------------------------------------------------------------------------


def file_of(path: str, split: str, config: str | None) -> Path | None:
    """The file that is the split, of a file or of a folder with one for each; None where ``datasets`` has to tell.

    Raises:
        ConfigError: there is a file, which has no configuration, and one is named.
        DataError: there is no such file or folder, or more than one for the split.
        OSError: a folder cannot be read.
    """
    if "://" in path:
        raise DataError("nothing is fetched from a URL: download the file and name that", path)
    local = Path(path).expanduser()
    if local.is_dir():
        file = _file_in(local, split, path)
    elif local.exists():
        file = local
    elif parts(local)[1] in FORMATS or local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise DataError("no such file or folder", path)
    else:
        return None
    stored = any((local / name).is_file() for name in (_STORED_DATASET, _STORED_SPLITS))
    if config is not None and (file is not None or stored):
        raise ConfigError("dataset_config", config, f"none for {file or path}, which has no configurations")
    return file


def _file_in(folder: Path, split: str, path: str) -> Path | None:
    files = sorted(
        file for file in folder.iterdir() if parts(file)[0] == split and parts(file)[1] in FORMATS and file.is_file()
    )
    if len(files) > 1:
        raise DataError(f"more than one file for split {split!r}: {', '.join(file.name for file in files)}", path)
    return files[0] if files else None


def load_rows(path: str, split: str, config: str | None, streaming: bool = False) -> Any:
    """What ``datasets`` has of a folder or of a hub data set: an iterable of dictionaries; raises whatever it
    raises."""
    import datasets

    local = Path(path).expanduser()
    if (local / _STORED_DATASET).is_file():
        return datasets.load_from_disk(str(local))
    if (local / _STORED_SPLITS).is_file():
        return datasets.load_from_disk(str(local))[split]
    if local.is_dir():
        return datasets.load_dataset(str(local), config, split=split, streaming=streaming)
    try:
        return datasets.load_dataset(path, config, split=split, streaming=streaming)
    except RuntimeError as error:
        if _SCRIPT not in str(error):
            raise
        return datasets.load_dataset(path, config, split=split, streaming=streaming, revision=_CONVERTED)
