"""Whole texts as blocks of tokens, and texts that are read as they are needed."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from sglang.srt.mezo.core.errors import DataError, MezoError, one_line
from sglang.srt.mezo.data.checks import OnBadRow, usable
from sglang.srt.mezo.data.examples import Encoder, Example, example_of
from sglang.srt.mezo.data.rows import SourceRow, file_of, load_rows, parts

_CHARACTERS_TOGETHER, _ROWS_TOGETHER = 1 << 17, 256  # that are in memory at once, but for a text that is longer

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
"""What ``datasets`` calls a format, and what it needs to be told, by the end of a file's name."""


class ExampleStream(Protocol):
    """Examples in a fixed order that nobody holds all of; every iteration begins anew."""

    def __iter__(self) -> Iterator[Example]: ...


class TextStream:
    """The blocks of a data set's texts.

    Args:
        rows: gives the rows from the first on.
        encoder: its ``max_length`` is that of a block.
        pack: as ``blocks_of`` has it.
        first: blocks before this one are left out.
    """

    def __init__(
        self,
        rows: Callable[[], Iterable[SourceRow]],
        encoder: Encoder,
        pack: bool,
        on_bad_row: OnBadRow,
        first: int = 0,
    ):
        self._rows = rows
        self._encoder = encoder
        self._pack = pack
        self._on_bad_row: OnBadRow = on_bad_row
        self._first = first

    def __iter__(self) -> Iterator[Example]:
        return islice(blocks_of(self._rows(), self._encoder, self._pack, self._on_bad_row), self._first, None)

    def after(self, blocks: int) -> "TextStream":
        """The stream without so many blocks."""
        return TextStream(self._rows, self._encoder, self._pack, self._on_bad_row, self._first + blocks)


def blocks_of(rows: Iterable[SourceRow], encoder: Encoder, pack: bool, on_bad_row: OnBadRow) -> Iterator[Example]:
    """Blocks of the rows' texts in their order, made as they are asked for. A blank text is passed over.

    Args:
        pack: texts follow one another with the EOS token between them, and are cut into blocks of ``max_length``
            tokens, the rest at the end left out; otherwise each text is cut for itself.

    Raises:
        DataError: of a bad row, when its turn has come.
    """
    groups = _groups(rows)
    if pack:
        documents = (ids for group in groups for ids in usable(encoder.documents(group), on_bad_row))
        return _packed(documents, encoder.max_length)
    return (
        example for group in groups for of_row in usable(encoder.encode_each(group), on_bad_row) for example in of_row
    )


def _packed(documents: Iterable[list[int]], length: int) -> Iterator[Example]:
    ahead: list[int] = []
    for document in documents:
        ahead += document
        whole = len(ahead) // length * length
        for start in range(0, whole, length):
            yield example_of(ahead[start : start + length])
        del ahead[:whole]


def _groups(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    """Rows to tokenise together, those with a blank text left out."""
    group, characters = [], 0
    for row in rows:
        text = row.fields.get("text")
        if isinstance(text, str) and not text.strip():
            continue
        group.append(row)
        characters += len(text) if isinstance(text, str) else 0
        if characters >= _CHARACTERS_TOGETHER or len(group) >= _ROWS_TOGETHER:
            yield group
            group, characters = [], 0
    if group:
        yield group


def stream_rows(path: str, split: str, config: str | None = None) -> Iterator[SourceRow]:
    """The rows of one split, read as they are needed; otherwise as ``rows.read_rows``."""
    source, number = f"{path}[{split}]", 0
    try:
        for number, row in enumerate(_open(path, split, config), 1):
            yield SourceRow(row, source, number)
    except MezoError:
        raise
    except Exception as error:  # datasets raises a different type for every way in which a path can be wrong
        raise DataError(f"cannot be read behind row {number}: {one_line(error)}", source) from error


def _open(path: str, split: str, config: str | None) -> Iterable[dict[str, Any]]:
    import datasets

    file = file_of(path, split, config)
    if file is None:
        return load_rows(path, split, config, streaming=True)
    ending = parts(file)[1]
    if ending not in _BUILDERS:
        raise DataError(f"the end of a file's name tells its format: {', '.join(_BUILDERS)}", str(file))
    kind, settings = _BUILDERS[ending]
    return datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True, **settings)
