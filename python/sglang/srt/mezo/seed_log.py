"""The log of a run: (seed, learning rate, projected gradients) a step, enough to rebuild the adapter bit for bit.

A header (one JSON line) names what the log belongs to. Records of fixed size follow, little-endian: uint64 seed, float64
learning rate, float32 projected gradient per direction. A record that a crash cut short is dropped when the log is opened.
"""

import errno
import fcntl
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from sglang.srt.mezo.errors import LogError
from sglang.srt.mezo.noise import numel_of
from sglang.srt.mezo.optimizer import Optimizer, UpdateRule

_MAGIC = "sglang-mezo seed log 2"


@dataclass(frozen=True)
class LogHeader:
    """What must agree for a log to be replayed on an adapter."""

    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of the adapter's matrices."""
    num_perturbations: int
    rule: UpdateRule

    @classmethod
    def from_json(cls, shapes: list[list[int]], num_perturbations: int, rule: dict[str, Any]) -> Self:
        return cls(tuple((rows, columns) for rows, columns in shapes), num_perturbations, UpdateRule(**rule))


@dataclass(frozen=True)
class LogRecord:
    seed: int
    learning_rate: float
    projected_grads: tuple[float, ...]


class SeedLog:
    """An append-only log on disk. Each record reaches the operating system before ``append`` returns."""

    def __init__(self, path: Path, header: LogHeader):
        self.path = path
        self.header = header
        self._record = struct.Struct(f"<Qd{header.num_perturbations}f")
        self._file = None

    @classmethod
    def create(cls, path: Path, header: LogHeader) -> Self:
        """Start an empty log; the file must not exist."""
        with open(path, "xb") as file:
            file.write(json.dumps({"format": _MAGIC, **asdict(header)}).encode() + b"\n")
        return cls(path, header)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing log; raises LogError where the file is no seed log."""
        with open(path, "rb") as file:
            line = file.readline()
        try:
            fields = json.loads(line)
            if fields.pop("format") != _MAGIC:
                raise ValueError("unknown format")
            return cls(path, LogHeader.from_json(**fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LogError(f"{path} is not a seed log: {error}") from error

    def claim(self) -> None:
        """Become the log's only writer until ``close``; raises LogError where another process is."""
        if self._file is not None:
            return
        file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise LogError(f"{self.path} is being written by another run") from error
        self._file = file
        self.truncate(len(self))

    def append(self, record: LogRecord) -> None:
        """Add a record; raises OSError where the disk is full, and the log is then as it was."""
        self.claim()
        data = self._record.pack(record.seed, record.learning_rate, *record.projected_grads)
        if self._file.write(data) < len(data):
            self.truncate(len(self))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def truncate(self, steps: int) -> None:
        """Keep the first ``steps`` records; a run that resumes from a checkpoint drops what came after it."""
        self.claim()
        with open(self.path, "rb") as file:
            start = len(file.readline())
        self._file.truncate(min(start + steps * self._record.size, os.path.getsize(self.path)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        with open(self.path, "rb") as file:
            start = len(file.readline())
        return (os.path.getsize(self.path) - start) // self._record.size

    def records(self) -> list[LogRecord]:
        with open(self.path, "rb") as file:
            file.readline()
            data = file.read(len(self) * self._record.size)
        return [LogRecord(seed, rate, tuple(grads)) for seed, rate, *grads in self._record.iter_unpack(data)]

    def replay(self, theta: torch.Tensor, steps: int | None = None) -> None:
        """Advance ``theta`` (float32 [numel], the initial adapter) by the first ``steps`` records, or all, in place."""
        numel = numel_of(self.header.shapes)
        if theta.numel() != numel:
            raise LogError(f"{self.path} belongs to an adapter of {numel} parameters, not {theta.numel()}")
        optimizer = Optimizer(theta, self.header.shapes, self.header.rule)
        for record in self.records()[:steps]:
            optimizer.replay(record.seed, record.projected_grads, record.learning_rate)
