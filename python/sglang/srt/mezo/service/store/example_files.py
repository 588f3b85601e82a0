"""A job's files as examples, tokenised once: what validation has made of them is what the engine is sent when the job
begins.

They lie in a folder of the job, which can be made anew at any time and goes when the job ends.
"""

import logging
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.errors import DamagedError
from sglang.srt.mezo.core.integrity import read_checked_json, require_sums, write_checked_json, write_sums
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.service.wire.packed import pack, parts, unpack

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]

_FORMAT = 2
_SPLITS: tuple[Split, ...] = ("train", "eval")
_DESCRIPTION = "examples.json"
_LENGTH = struct.Struct("<q")  # in bytes, of the part that follows


@dataclass(frozen=True)
class ExampleFiles:
    """Examples on disk.

    Attributes:
        counts: how many there are of each split.
        found: what reading the rows has told beside them, as JSON.
    """

    directory: Path
    counts: dict[Split, int]
    found: dict[str, Any]

    def parts(self, split: Split) -> Iterator[bytes]:
        """As many examples at a time as go into one command."""
        with open(self.directory / split, "rb") as file:
            while length := file.read(_LENGTH.size):
                yield file.read(*_LENGTH.unpack(length))

    def examples(self, split: Split) -> Iterator[Example]:
        for part in self.parts(split):
            yield from unpack(part)


def write_examples(
    directory: Path, made_from: Mapping[str, Any], splits: Mapping[Split, Iterable[Example]], found: Mapping[str, Any]
) -> None:
    """Write a folder that appears whole or not at all.

    Args:
        made_from: who asks for the examples of something else does not get these.
    """
    with atomic_directory(directory) as partial:
        counts = {split: _write(partial / split, splits[split]) for split in _SPLITS}
        write_checked_json(
            partial / _DESCRIPTION, {"format": _FORMAT, "made_from": made_from, "counts": counts, "found": found}
        )
        write_sums(partial, _SPLITS)


def _write(path: Path, examples: Iterable[Example]) -> int:
    count = 0
    with open(path, "wb") as file:
        for part in parts(examples):
            packed = pack(part)
            file.write(_LENGTH.pack(len(packed)) + packed)
            count += len(part)
    return count


def read_examples(directory: Path, made_from: Mapping[str, Any]) -> ExampleFiles | None:
    """None where there are none, or none that are whole and made from that."""
    try:
        description = read_checked_json(directory / _DESCRIPTION)
        require_sums(directory, _SPLITS)
    except FileNotFoundError:
        return None
    except (DamagedError, OSError) as error:
        logger.warning("the rows of %s are tokenised anew: %s", directory.parent.name, error)
        return None
    if (description["format"], description["made_from"]) != (_FORMAT, made_from):
        return None
    return ExampleFiles(directory, description["counts"], description["found"])


def remove_examples(directory: Path) -> None:
    """And what a process has left that was ended while it wrote them."""
    remove_partial(directory)
    shutil.rmtree(directory, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """What a process has left that was ended while it wrote such a folder; nobody may be writing it."""
    for partial in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(partial, ignore_errors=True)
