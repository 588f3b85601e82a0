"""How much memory a run takes, on the host and on the device: the peak of each phase."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what proc(5) has for it


class Memory(NamedTuple):
    """Bytes: resident on the host, allocated on the device; no device, no number."""

    host: int
    device: int | None

    def larger(self, other: "Memory") -> "Memory":
        device = None if self.device is None or other.device is None else max(self.device, other.device)
        return Memory(max(self.host, other.host), device)


class MemoryMeter:
    """Peaks by phase. Of phases in one another each has what was taken while it was the innermost.

    The host's are the kernel's high-water marks, which are set back where a phase begins; where the system does not
    allow that, they are the largest so far.
    """

    def __init__(self):
        self.peaks: dict[str, Memory] = {}
        self._phases: list[str] = []
        self._reset()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        self._phases.append(name)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()

    @property
    def total(self) -> Memory:
        """The largest of all phases, and of now."""
        largest = _peak()
        for peak in self.peaks.values():
            largest = largest.larger(peak)
        return largest

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Peaks by phase, in bytes."""
        return {name: _named(peak) for name, peak in self.peaks.items()}

    def now(self) -> dict[str, int]:
        """The peak of the phase in progress, under the names of metrics."""
        return _metrics(_peak())

    def of(self, phase: str) -> dict[str, int]:
        """The peak of a phase that has been, under the names of metrics."""
        return _metrics(self.peaks[phase])

    def _settle(self) -> None:
        """Count what has been taken up to here for the innermost phase."""
        if self._phases:
            name, peak = self._phases[-1], _peak()
            self.peaks[name] = peak.larger(self.peaks.get(name, peak))
        self._reset()

    def _reset(self) -> None:
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            pass
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def _peak() -> Memory:
    """Since the last reset."""
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Memory(int(status["VmHWM"].split()[0]) * 1024, device)


def _named(memory: Memory) -> dict[str, int]:
    return {name: value for name, value in memory._asdict().items() if value is not None}


def _metrics(memory: Memory) -> dict[str, int]:
    return {f"{where}_memory_bytes": value for where, value in _named(memory).items()}
