"""What every task says of itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.data.checks import require_unicode


@dataclass(frozen=True)
class TextExample:
    """A row in words. ``options`` are scored after ``prompt``; ``label`` is the index of the right one.

    A completion to be learned word for word is a single option.

    Attributes:
        right: indices of all right options, where there are more.
        answers: what the model should write after the prompt, each of them right; none where it chooses.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def demonstration(self) -> str:
        """The row with its right option, as it is shown before others."""
        return f"{self.prompt}{self.options[self.label]}".strip()


Piece = str | tuple[str, int]
"""A text, or a text and the most tokens of it, the first of which are kept."""


@dataclass(frozen=True)
class MaskedText:
    """A row in words for a masked language model: one of ``options``, each with its leading space, stands between
    ``before`` and ``after``. The pieces are tokenised one by one, as the paper's code does."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    options: tuple[str, ...]
    label: int


class Task(ABC):
    """A data set with its prompt. Templates are those of the MeZO paper (arXiv 2305.17333, tables 13 and 14), to the
    letter of its code."""

    name: ClassVar[str]
    """Name on the command line, and in tables; the class's by default."""

    dataset: ClassVar[tuple[str, ...]] = ()
    """Arguments of ``datasets.load_dataset``: hub path and configuration; none where ``--dataset`` has to say it."""

    eval_split: ClassVar[str] = "validation"
    """Split that published results are measured on."""

    invocation: ClassVar[str | None] = None
    """Text from which an aLoRA adapter is active: the end of every prompt; None where they end in several ways."""

    objective: ClassVar[Objective] = "classification"
    """Loss that is trained on: over the options, or of the right one alone."""

    max_new_tokens: ClassVar[int | None] = None
    """Tokens of an answer that the model writes itself, up to the end of the line; None where it chooses."""

    num_dev: ClassVar[int] = 500
    """Training rows that the paper's scripts choose by."""

    masked_length: ClassVar[int | None] = None
    """Most tokens of a row of a masked language model; the rest is cut off."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

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

    def is_labelled(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has an answer; one that has none is passed over."""
        return True

    def calibration(self, text: TextExample) -> str:
        """The prompt that says nothing of the row, by which ``--calibrated`` evaluations correct the options."""
        return ""


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column of a row; raises what ``Task.render`` does."""
    return _text(column, row[column])


def part_of(row: Mapping[str, Any], column: str, part: str) -> Any:
    """A part of what a column of a row holds; raises what ``Task.render`` does."""
    value = row[column]
    if not isinstance(value, Mapping) or part not in value:
        raise DataError(f"{column}={shown(value)} must be an object with {part!r}")
    return value[part]


def texts_of(column: str, values: Any) -> list[str]:
    """A list of texts, such as answers, that a column of a row holds; raises what ``Task.render`` does."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise DataError(f"{column}={shown(values)} must be a list of strings, one at least")
    return [_text(column, value) for value in values]


def label_of(row: Mapping[str, Any], names: Sequence[Any], column: str = "label") -> int:
    """The class in a column of a row, an index of ``names``; raises what ``Task.render`` does."""
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(f"{column}={shown(label)} must be a class from 0 to {len(names) - 1}")
    return label


def final(text: TextExample, demonstrations: Sequence[str] = ()) -> TextExample:
    """What the model is given: the prompt behind those that are shown with their answers, an empty line after each; no
    white space at its beginning, as in the paper's code."""
    before = "\n\n".join(demonstrations).strip()
    return replace(text, prompt=(before + "\n\n" + text.prompt).lstrip())


def choice(prompt: str, options: Sequence[str], label: int, right: Sequence[int] = ()) -> TextExample:
    """Without the blanks at either end, which the paper's code strips: of a prompt, and of it and an option."""
    return TextExample(prompt.strip(" "), tuple(option.rstrip(" ") for option in options), label, tuple(right))


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column}={shown(value)} must be a string")
    require_unicode(column, value)
    return value
