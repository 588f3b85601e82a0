"""What every task says of itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.srt.mezo.core.errors import DataError, shown


@dataclass(frozen=True)
class TextExample:
    """A row in words. ``options`` are scored after ``prompt``; ``label`` is the index of the right one.

    A completion to be learned word for word is a single option.
    """

    prompt: str
    options: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class MaskedText:
    """A row in words for a masked language model: one of ``options``, each with its leading space, stands between
    ``before`` and ``after``. The pieces are tokenised one by one, as the paper's code does."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    options: tuple[str, ...]
    label: int


class Task(ABC):
    """A data set with its prompt. Templates are those of the MeZO paper (arXiv 2305.17333, tables 13 and 14)."""

    name: ClassVar[str]
    """Name on the command line."""

    dataset: ClassVar[tuple[str, ...]]
    """Arguments of ``datasets.load_dataset``: hub path and configuration."""

    eval_split: ClassVar[str] = "validation"
    """Split that published results are measured on."""

    invocation: ClassVar[str]
    """Text from which an aLoRA adapter is active: the end of every prompt."""

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> TextExample:
        """Turn a row into words.

        Raises:
            KeyError: a column is missing.
            DataError: a column has a value that it cannot have.
        """

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        """Turn a row into words for a masked language model; raises what ``render`` does."""
        raise DataError(f"task {self.name} has no form for masked language models")


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column of a row; raises what ``Task.render`` does."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column}={shown(value)} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{column} is no Unicode text: {error}") from error
    return value
