"""What changes an engine's state beside requests queues behind the batch in flight, on the stream that runs it."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


@contextmanager
def forward_stream(scheduler: "Scheduler"):
    """The stream of a scheduler's batches, whose buffers they share; without overlap, and on the CPU, there is none."""
    streams: Any = scheduler
    if not streams.enable_overlap or streams.device == "cpu":
        yield
        return
    with streams.forward_stream_ctx:
        streams.forward_stream.wait_stream(streams.schedule_stream)
        yield
    streams.schedule_stream.wait_stream(streams.forward_stream)
