"""A training run around the steps: evaluations, checkpoints, the record of it all, and the adapter that is kept.

Every tensor-parallel rank goes through the same passes; files and what depends on them are the leader's (``record``).
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Self, TypeVar

from sglang.srt.mezo.core.errors import DivergedError
from sglang.srt.mezo.core.optimizer import Optimizer
from sglang.srt.mezo.core.passes import Passes, drain
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.training.learner import Learner
from sglang.srt.mezo.training.record import MakeTracker, RunRecord
from sglang.srt.mezo.training.results import StepResult, TrainResult
from sglang.srt.mezo.training.tracking import Tracker

T = TypeVar("T")


def train(learner: Learner) -> TrainResult:
    """A whole run: to ``max_steps``, with the best adapter in ``<output_dir>/adapter`` at its end."""
    with closing(drain(TrainingRun.open(learner, Tracker))) as run:
        return drain(run.passes())


class TrainingRun:
    """``open`` makes one; then ``passes`` to the end, then ``close``.

    ``passes`` may be dropped between two pieces and called again: the step in progress starts anew.
    """

    def __init__(self, learner: Learner, record: RunRecord | None, evaluated_at: int | None):
        self.learner = learner
        self._record = record
        self._first_step = learner.global_step
        self._evaluated_at = evaluated_at
        self._saved_at: int | None = None
        self._prefixes_restored = learner.global_step == 0
        self.train_seconds = 0.0
        self.last_step: StepResult | None = None

    @classmethod
    def open(cls, learner: Learner, make_tracker: MakeTracker, kept_adapter_only: bool = False) -> Passes[Self]:
        """Start the run directory, or bring the adapter to where the earlier run in it stopped.

        Whatever is open is closed where this is given up halfway.

        Args:
            kept_adapter_only: of a run that ended with an earlier step's adapter, only to that step.

        Raises:
            ConfigError, LogError, DamagedError: what ``RunDirectory.open`` and ``load_state`` raise; with
                ``kept_adapter_only`` also where a record of the log is damaged. Otherwise the run goes on from the
                records before it, with a warning.
        """
        record: RunRecord | None = None

        def open_record():
            nonlocal record
            record, records = RunRecord.open(learner, make_tracker, kept_adapter_only)
            return learner.trainable.theta, records, record.window, record.evaluated_at

        try:
            theta, records, learner.source.window, evaluated_at = learner.handle.on_leader(open_record)
            learner.trainable.theta.copy_(theta)
            for step in records:
                learner.apply(step)
                yield
            run = cls(learner, record, evaluated_at)
            run._on_leader(RunRecord.greet)
            return run
        except BaseException:
            if record is not None:
                record.close()
            raise

    def passes(self) -> Passes[TrainResult]:
        """Train to ``max_steps``."""
        learner, config = self.learner, self.learner.config
        if not self._prefixes_restored:
            self._prefixes_restored = True  # tried once: requests may need the room
            with learner.phase("prefixes"):
                yield from learner.prefix_passes()
        while True:
            step = learner.global_step
            done = step >= learner.max_steps
            if config.save_steps and step and step % config.save_steps == 0 and self._saved_at != step:
                self._on_leader(RunRecord.save_checkpoint)
                self._saved_at = step
            if learner.eval_plans and (step % config.eval_steps == 0 or done) and self._evaluated_at != step:
                learner.require_same_on_ranks()
                with learner.phase("evaluation"):
                    self._on_leader(RunRecord.report_evaluation, (yield from learner.evaluation_passes()))
                self._evaluated_at = step
            if done:
                return (yield from self._finish())
            yield from self._step()

    def close(self) -> None:
        if self._record is not None:
            self._record.close()

    def apply(self, record: LogRecord) -> None:
        """Take a step that somebody else has worked out; DivergedError where it does not end in finite numbers, and
        nothing has changed."""
        self.learner.prepare(record)
        self._on_leader(RunRecord.append_update, record)
        self.learner.commit()

    def save_portions(self) -> None:
        """From which step on which training examples count, for a run that resumes."""
        self._on_leader(RunRecord.save_portions)

    def _on_leader(self, method: Callable[..., T], *arguments: object) -> T:
        """What a method of the record returns, on every rank."""
        return self.learner.handle.on_leader(method, self._record, *arguments)

    def _step(self) -> Passes[None]:
        passes = self.learner.step_passes(self.learner.batch(self.learner.global_step))
        pieces: list[int] = []
        with self.learner.phase("step"):
            result = yield from self._timed(passes, pieces)
            self._on_leader(RunRecord.report_step, result, pieces, self.train_seconds)
        self.last_step = result

    def _timed(self, passes: Passes[StepResult], pieces: list[int]) -> Passes[StepResult]:
        """Pass on a step and count the time of its pieces, not the time between them; ``pieces`` gets what each may
        run through the model."""
        while True:
            pieces.append(self.learner.scorer.max_tokens)
            started = time.perf_counter()
            try:
                next(passes)
            except StopIteration as stop:
                return stop.value
            finally:
                self.train_seconds += time.perf_counter() - started
            yield

    def _finish(self) -> Passes[TrainResult]:
        learner = self.learner
        best_step, theta, records = self._on_leader(RunRecord.best)
        learner.trainable.theta.copy_(theta)
        optimizer = Optimizer(learner.trainable.theta, learner.trainable.shapes, learner.config.update_rule)
        for record in records:
            optimizer.replay(record.seed, record.projected_grads, record.learning_rate)
            yield
        self._on_leader(RunRecord.keep_trained)
        rate = (learner.global_step - self._first_step) / self.train_seconds if self.train_seconds else 0.0
        # Without development examples the last batch shows whether the last step went too far.
        last_batch = learner.batch(max(0, learner.global_step - 1))
        metrics = yield from learner.evaluation_passes(learner.eval_plans or last_batch)
        if not math.isfinite(metrics["eval_loss"]):
            raise DivergedError(
                f"the loss after step {learner.global_step} is {metrics['eval_loss']}: lower learning_rate or zo_eps"
            )
        return TrainResult(
            learner.global_step, best_step, self.train_seconds, rate, metrics if learner.eval_plans else {}
        )
