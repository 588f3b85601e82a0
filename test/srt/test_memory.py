"""Peaks of memory by phase, with memory that is really taken."""

import torch

from sglang.srt.mezo.training.memory import MemoryMeter

MIB = 1 << 20


def take(mebibytes: int) -> None:
    """Have so much resident for a moment."""
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


def test_each_phase_has_its_own_peak():
    meter = MemoryMeter()
    with meter.phase("small"):
        take(64)
    with meter.phase("large"):
        take(512)
        with meter.phase("inner"):
            take(256)
    with meter.phase("small"):
        take(128)
    peaks = {name: peak.host // MIB for name, peak in meter.peaks.items()}
    assert list(peaks) == ["small", "large", "inner"]
    assert peaks["large"] - peaks["small"] > 300 and peaks["large"] - peaks["inner"] > 200, peaks
    assert peaks["inner"] - peaks["small"] > 60, peaks
    assert meter.total.host // MIB == peaks["large"]


def test_what_is_reported_is_the_phase_in_progress():
    meter = MemoryMeter()
    with meter.phase("step"):
        before = meter.now()["host_memory_bytes"]
        take(256)
        assert meter.now()["host_memory_bytes"] - before > 200 * MIB
    with meter.phase("step"):
        assert meter.now()["host_memory_bytes"] - before < 100 * MIB
    assert meter.to_dict()["step"]["host"] - before > 200 * MIB


def test_a_phase_that_fails_is_over():
    meter = MemoryMeter()
    try:
        with meter.phase("step"):
            raise ValueError
    except ValueError:
        pass
    with meter.phase("evaluation"):
        take(64)
    assert set(meter.peaks) == {"step", "evaluation"}
