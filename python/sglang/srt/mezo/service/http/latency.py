"""Latency of served requests, beside training and without it: time to first token, and time per output token after it.

The numbers are SGLang's own, taken from a request's state as it finishes, and are those of its Prometheus metrics.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.service.wire.upstream import BatchEmbeddingOutput, BatchStrOutput, BatchTokenIDOutput

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import ReqState, TokenizerManager

logger = logging.getLogger(__name__)

_BUCKET_SECONDS = 10
_BUCKETS = 180  # half an hour
_MAX_REQUESTS = 2048  # the newest of a population, or of a bucket, that its percentiles are over


class _Requests:
    """Latencies of the newest requests. A request of one token has no time per output token."""

    def __init__(self):
        self._ttft: deque[float] = deque(maxlen=_MAX_REQUESTS)
        self._tpot: deque[float] = deque(maxlen=_MAX_REQUESTS)

    def add(self, ttft: float, tpot: float | None) -> None:
        self._ttft.append(ttft)
        if tpot is not None:
            self._tpot.append(tpot)

    def summary(self) -> dict[str, Any]:
        return {
            "count": len(self._ttft),
            "ttft_seconds": _percentiles(self._ttft),
            "tpot_seconds": _percentiles(self._tpot),
        }


class LatencyRecorder:
    """Keeps the newest requests of two populations, and percentiles over the last half hour. Memory is bounded.

    Args:
        clock: seconds of the Unix epoch, which never go back; by default those of the machine's clock at this moment,
            and all that have passed since.
    """

    def __init__(self, clock: Callable[[], float] | None = None):
        self._clock = clock or _steady_clock()
        self._populations = {True: _Requests(), False: _Requests()}
        self._training = False
        self._bucket = _Requests()
        self._bucket_start = self._start(self._clock())
        self._closed: deque[dict[str, Any]] = deque(maxlen=_BUCKETS - 1)
        self._spans: deque[list[float]] = deque(maxlen=_BUCKETS)
        """[from, to] of training; the end of the last one is infinity while it goes on."""

    def set_training(self, active: bool) -> None:
        """A job has begun to train, or none does any more."""
        if active == self._training:
            return
        self._training = active
        if active:
            self._spans.append([self._clock(), float("inf")])
        else:
            self._spans[-1][1] = self._clock()

    def record(self, ttft: float, tpot: float | None) -> None:
        """A request has finished. Times in seconds; tpot None where it had one token."""
        self._roll()
        self._populations[self._training].add(ttft, tpot)
        self._bucket.add(ttft, tpot)

    def summary(self) -> dict[str, Any]:
        """Percentiles of each population, and ``series``: one entry for ten seconds that had requests or training."""
        self._roll()
        return {
            "training": self._populations[True].summary(),
            "idle": self._populations[False].summary(),
            "bucket_seconds": _BUCKET_SECONDS,
            "series": self._series(),
        }

    def _series(self) -> list[dict[str, Any]]:
        first = self._bucket_start - (_BUCKETS - 1) * _BUCKET_SECONDS
        buckets = {bucket["start"]: bucket for bucket in self._closed}
        buckets[self._bucket_start] = self._current()
        series = []
        for start in range(first, self._bucket_start + 1, _BUCKET_SECONDS):
            training = any(begin < start + _BUCKET_SECONDS and end > start for begin, end in self._spans)
            bucket = buckets.get(start, {"start": start, **_NOTHING})
            if training or bucket["count"]:
                series.append({**bucket, "training": training})
        return series

    def _roll(self) -> None:
        """Begin a new bucket where it is time to, and keep of the old one its percentiles only."""
        start = self._start(self._clock())
        if start > self._bucket_start:
            self._closed.append(self._current())
            self._bucket, self._bucket_start = _Requests(), start

    def _current(self) -> dict[str, Any]:
        return {"start": self._bucket_start, **self._bucket.summary()}

    @staticmethod
    def _start(seconds: float) -> int:
        return int(seconds // _BUCKET_SECONDS) * _BUCKET_SECONDS


def _steady_clock() -> Callable[[], float]:
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The smallest value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return {f"p{percent}": ordered[ceil(percent / 100 * len(ordered)) - 1] if ordered else None for percent in (50, 99)}


_NOTHING = _Requests().summary()


# --- where SGLang knows -----------------------------------------------------------------------------------------------


Output = BatchStrOutput | BatchTokenIDOutput | BatchEmbeddingOutput


async def around_batch_output(original: Callable, manager: Any, output: Output) -> None:
    """Around ``TokenizerManager._handle_batch_output``: note the requests that finish with it."""
    service = manager.mezo_service
    finished: list[tuple[ReqState, int]] = []
    if service is not None:
        with _harmless():
            finished = _finished(manager, output)
    await original(manager, output)
    if service is None:
        return
    with _harmless():
        for state, tokens in finished:
            times = state.time_stats
            service.latency.record(times.get_first_token_latency(), times.get_time_per_output_token(tokens))


@contextmanager
def _harmless() -> Iterator[None]:
    """SGLang's loop, and the server with it, would end with an exception of ours."""
    try:
        yield
    except Exception:
        logger.exception("the latency of a request was not recorded")


def _finished(manager: "TokenizerManager", output: Output) -> list[tuple["ReqState", int]]:
    """States, which SGLang is about to drop, and numbers of tokens. Health checks, aborts and what has no token are
    left out."""
    if isinstance(output, BatchEmbeddingOutput):
        return []
    assert output.rids is not None, "every output is of a request"
    finished = []
    for rid, reason, tokens in zip(output.rids, output.finished_reasons, output.completion_tokens):
        if reason is None or reason["type"] not in ("stop", "length") or not tokens:
            continue
        state = manager.rid_to_state.get(rid)
        if state is not None and state.obj.log_metrics:
            finished.append((state, tokens))
    return finished
