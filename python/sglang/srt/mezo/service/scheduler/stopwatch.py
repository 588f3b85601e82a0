"""How long the engine was busy with a piece of training."""

import time
from typing import Self

import torch


class Stopwatch:
    """Measures its block: on an accelerator from when the current stream has come to it, so that what was queued
    before is not counted."""

    seconds: float

    def __init__(self, device: torch.device):
        self._events = (
            None
            if device.type == "cpu"
            else [torch.get_device_module(device).Event(enable_timing=True) for _ in range(2)]
        )

    def __enter__(self) -> Self:
        if self._events:
            self._events[0].record()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        if self._events:
            begun, ended = self._events
            ended.record()
            ended.synchronize()
            self.seconds = begun.elapsed_time(ended) / 1000
