"""The log of a run: (seed, learning rate, projected gradients) a step, enough to rebuild what it trained bit for bit.

A header (one JSON line) names what the log belongs to. Behind it, all little-endian: a checksum of the line (CRC-32, as
all here), the number of records, a checksum of that. Records of fixed size follow: uint64 seed, float64 learning rate,
float32 projected gradient per direction, and a checksum of the line and all records up to here. So no record can
change, go, come twice or change places unseen.

A record that a crash cut short while it was appended is dropped when the log is claimed. Whatever else does not agree
is damage: it is named, the records before it can be read, and only ``recover`` cuts it off.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch

from sglang.srt.mezo.core.errors import LogError
from sglang.srt.mezo.core.noise import Shape, numel_of
from sglang.srt.mezo.core.optimizer import Optimizer, UpdateRule

_MAGIC = "sglang-mezo seed log 3"
_UNCHECKED = "sglang-mezo seed log 2"  # of earlier versions: nothing but records behind the line

_CHECK = struct.Struct("<I")
_COUNT = struct.Struct("<II")
_ALIGNMENT = 16  # of the count in the file: it lies in one page, and no crash leaves half of it


@dataclass(frozen=True)
class LogHeader:
    """What must agree for a log to be replayed on an adapter."""

    shapes: tuple[Shape, ...]
    """Of the matrices and vectors that are trained."""
    num_perturbations: int
    rule: UpdateRule
    initial_adapter: str | None
    """``digest_of`` the adapter that the first record moves; None in logs of earlier versions."""

    @classmethod
    def from_json(
        cls, shapes: list[list[int]], num_perturbations: int, rule: dict[str, Any], initial_adapter: str | None
    ) -> Self:
        return cls(tuple(map(tuple, shapes)), num_perturbations, UpdateRule(**rule), initial_adapter)


@dataclass(frozen=True)
class LogRecord:
    seed: int
    learning_rate: float
    projected_grads: tuple[float, ...]


class _Contents(NamedTuple):
    """What a log holds.

    checks: the checksum before the first record, and after each that is whole. torn: the last append did not come to
    its end.
    """

    records: list[LogRecord]
    checks: list[int]
    torn: bool
    damage: str | None


class SeedLog:
    """An append-only log on disk. Each record reaches the operating system before ``append`` returns.

    ``len`` is the number of records that are whole, from the first one on.
    """

    def __init__(self, path: Path, header: LogHeader, line: bytes, checked: bool = True):
        self.path = path
        self.header = header
        self._checked = checked
        self._line_check = zlib.crc32(line)
        self._count_at = len(line) + _CHECK.size
        self._start = self._count_at + _COUNT.size if checked else len(line)
        self._record = struct.Struct(f"<Qd{header.num_perturbations}f")
        self._size = self._record.size + (_CHECK.size if checked else 0)
        self._file: BinaryIO | None = None
        # Of a log that is claimed, as nobody else changes it then.
        self._checks: list[int] = []
        self._damage: str | None = None

    @classmethod
    def create(cls, path: Path, header: LogHeader) -> Self:
        """Start an empty log; the file must not exist."""
        text = json.dumps({"format": _MAGIC, **asdict(header)}).encode()
        line = text + b" " * (-(len(text) + 1 + _CHECK.size) % _ALIGNMENT) + b"\n"
        log = cls(path, header, line)
        with open(path, "xb") as file:
            file.write(line + _CHECK.pack(log._line_check) + log._packed_count(0))
        return log

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing log; raises LogError where the file is no seed log, or its header is damaged."""
        with open(path, "rb") as file:
            line = file.readline()
            check = file.read(_CHECK.size)
        try:
            fields = json.loads(line)
            found = fields.pop("format")
            if isinstance(found, str) and found not in (_MAGIC, _UNCHECKED):
                raise ValueError(f"its format is {found!r}, which a later version of sglang-mezo may know")
            checked = found != _UNCHECKED
            if checked and check != _CHECK.pack(zlib.crc32(line)):
                raise ValueError("the header does not agree with its checksum")
            if not checked and fields.setdefault("initial_adapter") is not None:
                raise ValueError("the header is of two formats")
            return cls(path, LogHeader.from_json(**fields), line, checked)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise LogError(f"{path} is not a seed log, or its header is damaged: {error}") from error

    @property
    def damage(self) -> str | None:
        """Which record is damaged, and how many before it are whole; None where nothing is."""
        return self._damage if self._file is not None else self._read().damage

    def __len__(self) -> int:
        return len(self._checks if self._file is not None else self._read().checks) - 1

    def records(self, steps: int | None = None) -> list[LogRecord]:
        """The first ``steps`` records, or all; raises LogError where they are not there, or one of them is damaged."""
        contents = self._read()
        if contents.damage is not None and (steps is None or steps > len(contents.records)):
            raise LogError(f"{self.path} is damaged: {contents.damage}")
        if steps is not None and steps > len(contents.records):
            raise LogError(f"{self.path} has {len(contents.records)} records, not {steps}")
        return contents.records[:steps]

    def replay(self, theta: torch.Tensor, steps: int | None = None) -> None:
        """Advance ``theta`` (float32 [numel], the initial adapter) by the first ``steps`` records, or all, in place."""
        numel = numel_of(self.header.shapes)
        if theta.numel() != numel:
            raise LogError(f"{self.path} belongs to an adapter of {numel} parameters, not {theta.numel()}")
        self.require_initial(theta)
        records = self.records(steps)
        optimizer = Optimizer(theta, self.header.shapes, self.header.rule)
        for record in records:
            optimizer.replay(record.seed, record.projected_grads, record.learning_rate)

    def require_initial(self, theta: torch.Tensor) -> None:
        """Raise LogError where ``theta`` is not the adapter that the log starts from."""
        if not self.starts_from(theta):
            raise LogError(f"{self.path} starts from other weights than these")

    def starts_from(self, theta: torch.Tensor) -> bool:
        return self.header.initial_adapter in (None, digest_of(theta))

    # --- writing ------------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the log's only writer until ``close``; raises LogError where another process is."""
        if self._file is not None:
            return
        file = locked_log(self.path)
        _, self._checks, torn, self._damage = self._read()
        self._file = file
        if torn:
            file.truncate(self._end)

    def append(self, record: LogRecord) -> None:
        """Add a record; raises OSError where the disk is full, and the log is then as it was."""
        self._claim_whole()
        data = self._record.pack(record.seed, record.learning_rate, *record.projected_grads)
        check = zlib.crc32(data, self._checks[-1])
        if self._checked:
            data += _CHECK.pack(check)
        try:
            self._write(self._end, data)
            self._write_count(len(self) + 1)
        except OSError:
            self._claimed.truncate(self._end)
            raise
        self._checks.append(check)

    def truncate(self, steps: int) -> None:
        """Keep the first ``steps`` records; a run that resumes from a checkpoint drops what came after it."""
        self._claim_whole()
        self._cut(steps)

    def recover(self) -> str | None:
        """Cut off what is damaged, and keep a copy of the file as it was beside it.

        Returns:
            What was damaged, what is left, and where the copy lies; None where nothing was damaged.
        """
        self.claim()
        if self._damage is None:
            return None
        copy = _free_name(self.path.with_name(f"{self.path.name}.damaged"))
        shutil.copyfile(self.path, copy)
        told = f"{self.path} is damaged: {self._damage}, and the file as it was is kept as {copy.name}"
        self._cut(len(self))
        self._damage = None
        return told

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _claim_whole(self) -> None:
        self.claim()
        if self._damage is not None:
            raise LogError(f"{self.path} is damaged: {self._damage}")

    @property
    def _claimed(self) -> BinaryIO:
        assert self._file is not None, "only who has claimed a log writes to it"
        return self._file

    @property
    def _end(self) -> int:
        return self._start + len(self) * self._size

    def _cut(self, steps: int) -> None:
        """First the count: records beyond it are what an append leaves that a crash has stopped in the middle."""
        del self._checks[steps + 1 :]
        self._write_count(len(self))
        self._claimed.truncate(self._end)

    def _write(self, place: int, data: bytes) -> None:
        self._claimed.seek(place)
        if self._claimed.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _write_count(self, count: int) -> None:
        if self._checked:
            self._write(self._count_at, self._packed_count(count))

    def _packed_count(self, count: int) -> bytes:
        return _COUNT.pack(count, zlib.crc32(_CHECK.pack(count), self._line_check))

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self) -> _Contents:
        with open(self.path, "rb") as file:
            file.seek(self._count_at)
            count = self._count_in(file.read(_COUNT.size)) if self._checked else 0
            file.seek(self._start)
            data = file.read()
        records, checks = [], [self._line_check]
        for start in range(0, len(data) - self._size + 1, self._size):
            seed, learning_rate, *projected_grads = self._record.unpack_from(data, start)
            end = start + self._record.size
            check = zlib.crc32(data[start:end], checks[-1])
            if self._checked and data[end : end + _CHECK.size] != _CHECK.pack(check):
                break
            records.append(LogRecord(seed, learning_rate, tuple(projected_grads)))
            checks.append(check)
        rest = len(data) - len(records) * self._size
        damage = _damage(len(records), count, rest >= self._size)
        return _Contents(records, checks, damage is None and rest > 0, damage)

    def _count_in(self, data: bytes) -> int | None:
        """The number of records; None where it does not agree with its checksum."""
        count = int.from_bytes(data[: _CHECK.size], "little")
        return count if data == self._packed_count(count) else None


def locked_log(path: Path) -> BinaryIO:
    """A log's file, of which this process is the only writer until it is closed, whatever is in it; raises LogError
    where another process is."""
    file = open(path, "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise LogError(f"{path} is being written by another run") from error
    return file


def _damage(whole: int, count: int | None, more: bool) -> str | None:
    """What does not agree in a log whose first ``whole`` records do. more: there is at least one more, which does
    not."""
    if not more and count is not None and whole >= count:
        return None
    where = f"record {whole + 1}" + (f" of {count}" if count is not None and count > whole else "")
    if more:
        return f"{where} does not agree with its checksum; the {whole} before it are whole"
    if count is None:
        return f"the number of its records cannot be read; {whole} are whole"
    return f"it ends before the end of {where}; the {whole} before it are whole"


def digest_of(theta: torch.Tensor) -> str:
    """SHA-256 of what is trained (float32 [numel])."""
    return hashlib.sha256(theta.contiguous().cpu().numpy().data).hexdigest()


def _free_name(path: Path) -> Path:
    """``path`` with the first number behind it that no file has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
