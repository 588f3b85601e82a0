"""What every task says of itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class TextExample:
    """A row in words. ``options`` are scored after ``prompt``; ``label`` is the index of the right one.

    A completion to be learned word for word is a single option.
    """

    prompt: str
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
        """Turn a row into words; raises KeyError where a column is missing."""
