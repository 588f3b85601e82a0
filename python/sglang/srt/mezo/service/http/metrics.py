"""Prometheus metrics of jobs, beside those of training (``scheduler.metrics``) and SGLang's own on /metrics."""

from typing import get_args

from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.records import JobStatus


class JobMetrics:
    """What the HTTP process knows: how many jobs are in each state."""

    def __init__(self, store: Store):
        from prometheus_client import (
            Gauge,  # once the directory that SGLang shares between processes is in the environment
        )

        self._store = store
        self._jobs = Gauge(
            "sglang:mezo_jobs", "Fine-tuning jobs in each state.", ["status"], multiprocess_mode="mostrecent"
        )

    def update(self) -> None:
        """To be called whenever a job has changed its state."""
        counts = self._store.job_counts()
        for status in get_args(JobStatus):
            self._jobs.labels(status).set(counts.get(status, 0))
