"""A training run around the steps: seed log, metrics, evaluation, checkpoints.

Every tensor-parallel rank goes through the same passes; files, metrics and what depends on them are the leader's.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.errors import DamagedError, DataError, DivergedError
from sglang.srt.mezo.optimizer import Optimizer
from sglang.srt.mezo.pass_sizes import PassSizes
from sglang.srt.mezo.passes import Passes
from sglang.srt.mezo.plan import digest_of_plans
from sglang.srt.mezo.run_directory import RunDirectory
from sglang.srt.mezo.seed_log import LogRecord, SeedLog
from sglang.srt.mezo.tracking import Tracker

if TYPE_CHECKING:
    from sglang.srt.mezo.trainer import MezoTrainer

_MAX_LOST_SHARE = 0.1  # of elements whose perturbation vanishes in the slot's dtype, before a warning
_SMOOTHED_STEPS = 20  # what is shown as the loss is the mean of so many steps


@dataclass(frozen=True)
class StepResult:
    """One step. Every tuple has one entry per direction; loss_minus is what the estimator compares loss_plus with."""

    step: int
    zo_random_seed: int
    learning_rate: float
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    projected_grad: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over the directions of the losses and of what they are compared with."""
        return sum(self.loss_plus + self.loss_minus) / (2 * len(self.loss_plus))


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with; ``best_step`` is the step whose adapter was kept."""

    global_step: int
    best_step: int
    train_seconds: float
    steps_per_second: float
    metrics: dict[str, float]


MakeTracker = Callable[[MezoConfig, Path, int, int], Tracker]
"""Called as ``Tracker`` is: configuration, metrics.jsonl, first step, last step."""


class TrainingRun:
    """``open``, then ``passes`` to the end, then ``close``.

    ``passes`` may be dropped between two pieces and called again: the step in progress starts anew.
    """

    def __init__(self, trainer: "MezoTrainer", make_tracker: MakeTracker):
        self.trainer = trainer
        self.config = trainer.config
        self.directory = RunDirectory(trainer.config, trainer.handle.base_model)
        self.train_seconds = 0.0
        self._saved_at: int | None = None
        self._prefixes_restored = False
        self.last_step: StepResult | None = None
        self._make_tracker = make_tracker
        self._on_leader = trainer.handle.on_leader
        self._recent: list[float] = []
        self._warnings: list[str] = []  # for the tracker, once there is one

    def open(self, served_only: bool = False) -> Passes[None]:
        """Start the run directory, or bring the adapter to where the earlier run in it stopped.

        served_only: of a run that ended with an earlier step's adapter, only to that step.

        Raises:
            ConfigError, LogError, DamagedError: what ``RunDirectory.open`` and ``load_state`` raise; with ``served_only`` also
                where a record of the log is damaged. Otherwise the run goes on from the records before it, with a warning.
        """
        trainer = self.trainer
        theta, records, self.state = self._on_leader(self._open_directory, served_only)
        trainer.adapter.theta.copy_(theta)
        trainer.stream.window = self.state["window"]
        for record in records:
            trainer.apply(record)
            yield
        self.first_step = trainer.global_step
        self._prefixes_restored = trainer.global_step == 0
        self.evaluated_at = self.state["evaluated_at"]
        self._on_leader(self._open_tracker)

    def passes(self) -> Passes[TrainResult]:
        """Train to ``max_steps``."""
        trainer, config = self.trainer, self.config
        if not self._prefixes_restored:
            self._prefixes_restored = True  # tried once: requests may need the room
            yield from trainer.prefix_passes()
        while True:
            step = trainer.global_step
            done = step >= trainer.max_steps
            if config.save_steps and step and step % config.save_steps == 0 and self._saved_at != step:
                self._on_leader(self._save_checkpoint)
                self._saved_at = step
            if trainer.eval_plans and (step % config.eval_steps == 0 or done) and self.evaluated_at != step:
                self._on_leader(self._report_evaluation, (yield from trainer.evaluation_passes()))
                self.evaluated_at = step
            if done:
                return (yield from self._finish())
            yield from self._step()

    def close(self) -> None:
        if self.trainer.handle.is_leader:
            self._close_files()

    def apply(self, record: LogRecord) -> None:
        """Take a step that somebody else has worked out; DivergedError where it does not end in finite numbers, and nothing has changed."""
        self.trainer.prepare(record)
        self._on_leader(self._append_update, record)
        self.trainer.commit()

    def save_segments(self) -> None:
        """From which step on which training examples count, for a run that resumes."""
        self._on_leader(self._save_segments)

    def _step(self) -> Passes[None]:
        passes = self.trainer.step_passes(self.trainer.batch(self.trainer.global_step))
        pieces: list[int] = []
        result = yield from self._timed(passes, pieces)
        self._on_leader(self._report_step, result, pieces)
        self.last_step = result

    def _timed(self, passes: Passes[StepResult], pieces: list[int]) -> Passes[StepResult]:
        """Pass on a step and count the time of its pieces, not the time between them; ``pieces`` gets what each may run through the model."""
        while True:
            pieces.append(self.trainer.scorer.max_tokens)
            started = time.perf_counter()
            try:
                next(passes)
            except StopIteration as stop:
                return stop.value
            finally:
                self.train_seconds += time.perf_counter() - started
            yield

    def _finish(self) -> Passes[TrainResult]:
        trainer = self.trainer
        best_step, theta, records = self._on_leader(self._best)
        trainer.adapter.theta.copy_(theta)
        optimizer = Optimizer(trainer.adapter.theta, trainer.adapter.shapes, self.config.update_rule)
        for record in records:
            optimizer.replay(record.seed, record.projected_grads, record.learning_rate)
            yield
        self._on_leader(self._keep_adapter)
        rate = (trainer.global_step - self.first_step) / self.train_seconds if self.train_seconds else 0.0
        # Without development examples the last batch shows whether the last step went too far.
        last_batch = trainer.batch(max(0, trainer.global_step - 1))
        metrics = yield from trainer.evaluation_passes(trainer.eval_plans or last_batch)
        if not math.isfinite(metrics["eval_loss"]):
            raise DivergedError(f"the loss after step {trainer.global_step} is {metrics['eval_loss']}: lower learning_rate or zo_eps")
        return TrainResult(trainer.global_step, best_step, self.train_seconds, rate, metrics if trainer.eval_plans else {})

    # --- on the leader ---------------------------------------------------------------------------------------------------

    def _open_directory(self, served_only: bool) -> tuple[torch.Tensor, list[LogRecord], dict[str, Any]]:
        self.log: SeedLog = self.directory.open(self.trainer.adapter)
        state = {"global_step": 0, "evaluated_at": None, "best_global_step": None, "best_metric": None, "log_history": []}
        stored = self.directory.load_state()
        state |= stored or {}
        if stored is None and len(self.log):
            self._warnings.append(f"{self.directory.path} has no trainer_state.json: what was evaluated before step {len(self.log)} does not count")
        if not served_only:
            self._require_same_examples(state)
            self._recover(state)
        records = self.log.records()
        if "window" not in state:
            state["window"] = self.trainer.stream.window
            self.directory.save_state(state)
        if served_only and len(records) >= self.trainer.max_steps and self.config.load_best_model_at_end:
            records = records[: state["best_global_step"]]
        return self.trainer.adapter.theta, records, state

    def _require_same_examples(self, state: dict[str, Any]) -> None:
        """Those that the run has drawn from, part by part; what has been added since is new. Of earlier versions there is no record."""
        plans, first = self.trainer.train_plans, 0
        for count, digest in state.setdefault("examples", []):
            if digest_of_plans(plans[first : first + count]) != digest:
                raise DataError(
                    f"the training examples are not those that the run in {self.directory.path} has been trained on: "
                    "its rows, or how they are rendered or tokenised, have changed"
                )
            first += count
        self._note_examples(state)

    def _note_examples(self, state: dict[str, Any]) -> None:
        """Record those that there is no record of yet."""
        new = self.trainer.train_plans[sum(count for count, _ in state["examples"]) :]
        if new:
            state["examples"] = [*state["examples"], [len(new), digest_of_plans(new)]]

    def _recover(self, state: dict[str, Any]) -> None:
        """Go on from the records that are whole, with what the run knew at that step."""
        damage, step, known = self.log.recover(), len(self.log), state["global_step"]
        if damage is None and step < known:
            damage = f"{self.log.path} ends at step {step}, and the run had come to step {known}"
        if damage is not None:
            self._warnings.append(f"{damage}; the run goes on from step {step}")
        if step >= known:
            return
        state["global_step"] = step
        state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= step]
        state["evaluated_at"] = state["log_history"][-1]["step"] if state["log_history"] else None
        if (state["best_global_step"] or 0) > step:
            state.update(best_global_step=None, best_metric=None)

    def _save_segments(self) -> None:
        self.directory.save_segments(self.trainer.stream.parts)
        self._note_examples(self.state)

    def _append_update(self, record: LogRecord) -> None:
        """What the run did after the adapter that was taken up is dropped: the log is the way to this adapter."""
        self.log.truncate(self.trainer.global_step)
        self.log.append(record)
        try:
            self.directory.save_state(self._current_state() | {"best_metric": None, "best_global_step": None})
        except OSError:  # a step is in the log or it has not been taken
            self.log.truncate(self.trainer.global_step)
            raise
        self.state.update(best_metric=None, best_global_step=None)

    def _open_tracker(self) -> None:
        trainer = self.trainer
        self.tracker = self._make_tracker(self.config, self.directory.metrics, trainer.global_step, trainer.max_steps)
        self.pass_sizes = PassSizes(self.directory.pass_sizes, self.config.max_tokens_per_batch, resumes=trainer.global_step > 0)
        if (window := trainer.stream.window) is not None:
            self.tracker.say(f"the KV pool has room for the prefixes of {window} examples at a time: each part is gone over {self.config.echoes} times")
        for warning in self._warnings:
            self.tracker.warn(warning, trainer.global_step)

    def _close_files(self) -> None:
        with ExitStack() as stack:  # the log even if the metrics cannot be closed, as their last line finds a full disk
            if hasattr(self, "log"):
                stack.callback(self.log.close)
            if hasattr(self, "tracker"):
                self.tracker.close()

    def _report_step(self, result: StepResult, pieces: Sequence[int]) -> None:
        """First the log: a step that anybody hears of is on disk."""
        self.pass_sizes.record(result.step, pieces)
        self.log.append(LogRecord(result.zo_random_seed, result.learning_rate, result.projected_grad))
        trainer, stats = self.trainer, self.trainer.scorer.prefix_stats
        step = trainer.global_step
        self._recent = [*self._recent[1 - _SMOOTHED_STEPS :], result.loss]
        shown = {"loss": f"{self._loss:.4f}", "lr": f"{result.learning_rate:.1e}"}
        if stats.total:
            shown["reused"] = f"{stats.reused / stats.total:.1%}"
        self.tracker.advance(**shown)
        if step == 1:
            self._warn_of_lost_perturbations(result)
        if step % self.config.logging_steps == 0 or step == trainer.max_steps:
            self.tracker.record(step, self._step_metrics(result))

    @property
    def _loss(self) -> float:
        return sum(self._recent) / len(self._recent)

    def _step_metrics(self, result: StepResult) -> dict[str, Any]:
        trainer, stats = self.trainer, self.trainer.scorer.prefix_stats
        return {
            "loss": self._loss,
            "loss_plus": result.loss_plus,
            "loss_minus": result.loss_minus,
            "projected_grad": result.projected_grad,
            "learning_rate": result.learning_rate,
            "epoch": trainer.stream.epoch(trainer.global_step),
            "forward_passes": self.config.forward_passes * trainer.global_step,
            "prefix_tokens_reused": stats.reused,
            "prefix_tokens_computed": stats.computed,
            "train_seconds": self.train_seconds,
        }

    def _warn_of_lost_perturbations(self, result: StepResult) -> None:
        share = self.trainer.lost_perturbations(self.trainer.optimizer.direction(result.zo_random_seed, 0))
        if share > _MAX_LOST_SHARE:
            self.tracker.warn(
                f"zo_eps={self.config.zo_eps:g} is lost in {self.trainer.slot_dtype} for {share:.0%} of the parameters: "
                "raise zo_eps or serve the model in float32",
                self.trainer.global_step,
            )

    def _report_evaluation(self, metrics: dict[str, float]) -> None:
        step = self.trainer.global_step
        metrics_with_cost = {**metrics, "forward_passes": self.config.forward_passes * step}
        self.tracker.record(step, metrics_with_cost)
        self.state["log_history"].append({"step": step, **metrics_with_cost})
        self.tracker.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        earlier = self.state["best_global_step"]
        keeps = self._is_best(metrics) and self.config.load_best_model_at_end
        if keeps:
            self.trainer.adapter.save_pretrained(self.directory.best(step))
        self.state["evaluated_at"] = step
        self.directory.save_state(self._current_state())
        if keeps and earlier not in (None, step):
            self.directory.drop_best(earlier)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = self.config.metric_for_best_model or "eval_loss"
        best = self.state["best_metric"]
        better = best is None or (metrics[name] < best if name.endswith("loss") else metrics[name] > best)
        if better:
            self.state.update(best_metric=metrics[name], best_global_step=self.trainer.global_step)
        return better

    def _save_checkpoint(self) -> None:
        """Unless the process ended between this and the next step the last time."""
        if self.directory.checkpoint(self.trainer.global_step).exists():
            return
        folder = self.directory.save_checkpoint(self.trainer.adapter, self._current_state())
        self.tracker.checkpoint(self.trainer.global_step, folder)

    def _best(self) -> tuple[int, torch.Tensor, list[LogRecord]]:
        """The step whose adapter is kept, an adapter, and the records that lead from there to it: none, unless its files are damaged."""
        adapter, step = self.trainer.adapter, self.state["best_global_step"]
        if not self.config.load_best_model_at_end or step is None:
            return self.trainer.global_step, adapter.theta, []
        try:
            adapter.load_weights(self.directory.best(step))
            return step, adapter.theta, []
        except DamagedError as error:
            self.tracker.warn(f"{error}; the adapter of step {step} is made anew from the seed log", self.trainer.global_step)
        adapter.load_weights(self.directory.initial_adapter)
        return step, adapter.theta, self.log.records(step)

    def _keep_adapter(self) -> None:
        self.trainer.adapter.save_pretrained(self.directory.adapter)
        self.directory.save_state(self._current_state())

    def _current_state(self) -> dict[str, Any]:
        self.state["global_step"] = self.trainer.global_step
        return self.state
