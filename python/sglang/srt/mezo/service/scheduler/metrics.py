"""Prometheus metrics of training, beside SGLang's own on /metrics."""

from typing import TYPE_CHECKING

from sglang.srt.mezo.service.scheduler.pacing import Pacer

if TYPE_CHECKING:
    from sglang.srt.mezo.service.scheduler.job import Job

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class TrainingMetrics:
    """What the scheduler knows: steps, losses, tokens, pieces, back-off."""

    def __init__(self):
        # Imported here: the directory that SGLang shares between processes must be in the environment first.
        from prometheus_client import Counter, Gauge, Histogram

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"sglang:mezo_{name}", help, multiprocess_mode="mostrecent")

        self._loss = gauge("train_loss", "Mean of loss_plus and loss_minus of the last step.")
        self._projected_grad = gauge("projected_grad", "Projected gradient of the last step, first direction.")
        self._learning_rate = gauge("learning_rate", "Learning rate of the last step.")
        self._share = gauge("share", "Share of the time that training may take beside requests now.")
        self._kept_tokens = gauge("kept_prefix_tokens", "Tokens of prefixes that training keeps locked in the KV pool.")
        self._steps = Counter("sglang:mezo_steps_total", "Training steps.")
        self._computed = Counter(
            "sglang:mezo_prefix_tokens_computed_total", "Prefix tokens that training ran through the model."
        )
        self._reused = Counter(
            "sglang:mezo_prefix_tokens_reused_total", "Prefix tokens that training read from the cache."
        )
        self._backoffs = Counter(
            "sglang:mezo_backoffs_total", "Times that training halved its share because requests waited."
        )
        self._piece_seconds = Histogram(
            "sglang:mezo_piece_seconds", "Time of one uninterrupted piece of training.", buckets=_BUCKETS
        )
        self._step_seconds = Histogram(
            "sglang:mezo_step_seconds", "Time that the pieces of one step took.", buckets=_BUCKETS
        )
        self._seen: dict[str, float] = {}
        self._job: Job | None = None

    def piece(self, seconds: float, pacer: Pacer) -> None:
        self._piece_seconds.observe(seconds)
        self._share.set(pacer.current_share)
        self._add(self._backoffs, "backoffs", pacer.backoffs)

    def progress(self, job: "Job") -> None:
        """Take note of what the job did since the last call."""
        if job is not self._job:
            self._job = job
            self._seen = {name: value for name, value in self._seen.items() if name == "backoffs"}
        stats = job.learner.scorer.prefix_stats
        self._add(self._computed, "computed", stats.computed)
        self._add(self._reused, "reused", stats.reused)
        self._kept_tokens.set(job.learner.scorer.base_prefixes.kept_tokens)
        if job.run is None or (last := job.run.last_step) is None or last.step == self._seen.get("step"):
            return
        self._seen["step"] = last.step
        self._steps.inc()
        self._loss.set(last.loss)
        self._projected_grad.set(last.projected_grad[0])
        self._learning_rate.set(last.learning_rate)
        self._step_seconds.observe(job.run.train_seconds - self._seen.get("train_seconds", 0.0))
        self._seen["train_seconds"] = job.run.train_seconds

    def ended(self) -> None:
        """No job has the engine."""
        self._kept_tokens.set(0)

    def _add(self, counter, name: str, total: float) -> None:
        """Bring a counter up to ``total``, which may fall for a moment: a token is computed before it is read."""
        if total > (seen := self._seen.get(name, 0)):
            counter.inc(total - seen)
            self._seen[name] = total
