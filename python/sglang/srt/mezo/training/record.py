"""What a run keeps on disk and shows while it goes: seed log, metrics, evaluations, checkpoints, the best adapter.

Of several tensor-parallel ranks the leader alone has a record.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import DamagedError, DataError
from sglang.srt.mezo.core.objective import is_better, metric_name
from sglang.srt.mezo.core.seed_log import LogRecord, SeedLog
from sglang.srt.mezo.scoring.plan import digest_of_plans
from sglang.srt.mezo.training.learner import Learner
from sglang.srt.mezo.training.pass_sizes import PassSizes
from sglang.srt.mezo.training.results import StepResult
from sglang.srt.mezo.training.run_directory import RunDirectory
from sglang.srt.mezo.training.tracking import Tracker

_MAX_LOST_SHARE = 0.1  # of elements whose perturbation vanishes in the slot's dtype, before a warning
_SMOOTHED_STEPS = 20  # what is shown as the loss is the mean of so many steps

MakeTracker = Callable[[MezoConfig, Path, int, int], Tracker]
"""Called as ``Tracker`` is: configuration, metrics.jsonl, first step, last step."""


class RunRecord:
    """``open`` makes one; its methods are called in the order in which the run does what they record."""

    def __init__(
        self,
        learner: Learner,
        directory: RunDirectory,
        log: SeedLog,
        state: dict[str, Any],
        warnings: Sequence[str],
        make_tracker: MakeTracker,
        first_step: int,
    ):
        self._learner = learner
        self._config = learner.config
        self._directory = directory
        self._log = log
        self._state = state
        self._warnings = warnings
        self._recent: list[float] = []
        self._pass_sizes = PassSizes(directory.pass_sizes, learner.config.max_tokens_per_batch, resumes=first_step > 0)
        self._tracker = make_tracker(learner.config, directory.metrics, first_step, learner.max_steps)

    @classmethod
    def open(cls, learner: Learner, make_tracker: MakeTracker, kept_adapter_only: bool) -> tuple[Self, list[LogRecord]]:
        """Start the run directory, or take up the earlier run in it.

        Returns:
            The record, and what leads from ``learner.trainable``, now as it was at first, to where the run goes on.

        Raises:
            As ``TrainingRun.open``.
        """
        directory = RunDirectory(learner.config, learner.handle.base_model)
        log = directory.open(learner.trainable)
        try:
            state, warnings = _take_up(learner, directory, log, kept_adapter_only)
            records = log.records()
            if kept_adapter_only and len(records) >= learner.max_steps and learner.config.load_best_model_at_end:
                records = records[: state["best_global_step"]]
            return cls(learner, directory, log, state, warnings, make_tracker, len(records)), records
        except BaseException:
            log.close()
            raise

    @property
    def window(self) -> int | None:
        """That of the run's first start, by which its batches are drawn."""
        return self._state["window"]

    @property
    def evaluated_at(self) -> int | None:
        """The step of the last evaluation."""
        return self._state["evaluated_at"]

    def greet(self) -> None:
        """Say what there is to know before the first step."""
        if self.window is not None:
            self._tracker.say(
                f"the KV pool has room for the prefixes of {self.window} examples at a time: each part is gone over "
                f"{self._config.echoes} times"
            )
        for warning in self._warnings:
            self._tracker.warn(warning, self._learner.global_step)

    def close(self) -> None:
        with ExitStack() as stack:  # the log even if the metrics cannot be closed, as their last line finds a full disk
            stack.callback(self._log.close)
            self._tracker.close()

    def report_step(self, result: StepResult, pieces: Sequence[int], train_seconds: float) -> None:
        """First the log: a step that anybody hears of is on disk.

        Args:
            pieces: what each piece of the step's work may have run through the model, in tokens.
            train_seconds: of the run since this process began or resumed it.
        """
        self._pass_sizes.record(result.step, pieces)
        self._log.append(LogRecord(result.zo_random_seed, result.learning_rate, result.projected_grad))
        learner, stats = self._learner, self._learner.scorer.prefix_stats
        step = learner.global_step
        self._recent = [*self._recent[1 - _SMOOTHED_STEPS :], result.loss]
        shown = {"loss": f"{self._loss:.4f}", "lr": f"{result.learning_rate:.1e}"}
        if stats.total:
            shown["reused"] = f"{stats.reused / stats.total:.1%}"
        self._tracker.advance(**shown)
        if step == 1:
            self._warn_of_lost_perturbations(result)
        if step % self._config.logging_steps == 0 or step == learner.max_steps:
            self._tracker.record(step, self._step_metrics(result) | {"train_seconds": train_seconds})

    @property
    def _loss(self) -> float:
        return sum(self._recent) / len(self._recent)

    def _step_metrics(self, result: StepResult) -> dict[str, Any]:
        learner, stats = self._learner, self._learner.scorer.prefix_stats
        return {
            "loss": self._loss,
            "loss_plus": result.loss_plus,
            "loss_minus": result.loss_minus,
            "projected_grad": result.projected_grad,
            "learning_rate": result.learning_rate,
            "epoch": learner.source.epoch(learner.global_step),
            "forward_passes": self._config.forward_passes * learner.global_step,
            "prefix_tokens_reused": stats.reused,
            "prefix_tokens_computed": stats.computed,
            **self._memory(),
        }

    def _memory(self) -> dict[str, int]:
        """The peak of the phase in progress, where there is a meter."""
        return {} if self._learner.memory is None else self._learner.memory.now()

    def _warn_of_lost_perturbations(self, result: StepResult) -> None:
        share = self._learner.lost_perturbations(result.zo_random_seed)
        if share > _MAX_LOST_SHARE:
            self._tracker.warn(
                f"zo_eps={self._config.zo_eps:g} is lost in {self._learner.slot_dtype} for {share:.0%} of the "
                "parameters: raise zo_eps or serve the model in float32",
                self._learner.global_step,
            )

    def save_portions(self) -> None:
        """From which step on which training examples count, for a run that resumes."""
        self._directory.save_portions(self._learner.drawn.stream.portions)
        self._note_examples()

    def _note_examples(self) -> None:
        """Record those that there is no record of yet."""
        self._state["examples"] = self._learner.source.seen()

    def append_update(self, record: LogRecord) -> None:
        """What the run did after the adapter that was taken up is dropped: the log is the way to this adapter."""
        self._log.truncate(self._learner.global_step)
        self._log.append(record)
        try:
            self._directory.save_state(self._current_state() | {"best_metric": None, "best_global_step": None})
        except OSError:  # a step is in the log or it has not been taken
            self._log.truncate(self._learner.global_step)
            raise
        self._state.update(best_metric=None, best_global_step=None)

    def report_evaluation(self, metrics: dict[str, float]) -> None:
        step = self._learner.global_step
        metrics_with_cost = {**metrics, "forward_passes": self._config.forward_passes * step, **self._memory()}
        self._tracker.record(step, metrics_with_cost)
        self._state["log_history"].append({"step": step, **metrics_with_cost})
        self._tracker.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        earlier = self._state["best_global_step"]
        keeps = self._is_best(metrics) and self._config.load_best_model_at_end
        if keeps:
            self._learner.trainable.save_pretrained(self._directory.best(step))
        self._state["evaluated_at"] = step
        self._note_examples()
        self._directory.save_state(self._current_state())
        if keeps and earlier not in (None, step):
            self._directory.drop_best(earlier)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = metric_name(self._config.metric_for_best_model)
        better = is_better(name, metrics[name], self._state["best_metric"])
        if better:
            self._state.update(best_metric=metrics[name], best_global_step=self._learner.global_step)
        return better

    def save_checkpoint(self) -> None:
        """Unless the process ended between this and the next step the last time."""
        if self._directory.checkpoint(self._learner.global_step).exists():
            return
        self._note_examples()
        folder = self._directory.save_checkpoint(self._learner.trainable, self._current_state())
        self._tracker.checkpoint(self._learner.global_step, folder)

    def best(self) -> tuple[int, torch.Tensor, list[LogRecord]]:
        """The step whose theta is kept, a theta, and the records that lead from there to it: none, unless its files are
        damaged."""
        trainable, step = self._learner.trainable, self._state["best_global_step"]
        if not self._config.load_best_model_at_end or step is None:
            return self._learner.global_step, trainable.theta, []
        try:
            trainable.load_weights(self._directory.best(step))
            return step, trainable.theta, []
        except DamagedError as error:
            self._tracker.warn(
                f"{error}; what step {step} had come to is made anew from the seed log", self._learner.global_step
            )
        trainable.load_initial(self._directory.path)
        return step, trainable.theta, self._log.records(step)

    def keep_trained(self) -> None:
        self._learner.trainable.save_pretrained(self._directory.trained)
        self._directory.save_state(self._current_state())

    def _current_state(self) -> dict[str, Any]:
        self._state["global_step"] = self._learner.global_step
        return self._state


def _take_up(
    learner: Learner, directory: RunDirectory, log: SeedLog, kept_adapter_only: bool
) -> tuple[dict[str, Any], list[str]]:
    """The state of the run so far, in agreement with its log, and what the user should be told of it."""
    state = {"global_step": 0, "evaluated_at": None, "best_global_step": None, "best_metric": None, "log_history": []}
    stored, warnings = directory.load_state(), []
    state |= stored or {}
    if stored is None and len(log):
        warnings.append(
            f"{directory.path} has no trainer_state.json: what was evaluated before step {len(log)} does not count"
        )
    if not kept_adapter_only:
        _require_same_examples(learner, directory, state)
        warnings += _recover(log, state, metric_name(learner.config.metric_for_best_model))
    if "window" not in state:
        state["window"] = learner.source.window
        directory.save_state(state)
    return state, warnings


def _require_same_examples(learner: Learner, directory: RunDirectory, state: dict[str, Any]) -> None:
    """Those that the run has drawn from. Of earlier versions there is no record."""
    if "examples" in state and not learner.source.is_same(state["examples"]):
        raise DataError(
            f"the training examples are not those that the run in {directory.path} has been trained on: "
            "its rows, or how they are rendered or tokenised, have changed"
        )
    state["examples"] = learner.source.seen()
    held_out = digest_of_plans(learner.eval_plans)
    if state.setdefault("development_examples", held_out) != held_out:
        raise DataError(
            f"the development examples are not those that the run in {directory.path} has been judged by: its best "
            "adapter could not be compared with others"
        )


def _recover(log: SeedLog, state: dict[str, Any], metric: str) -> list[str]:
    """Go on from the records that are whole, with what the run knew at that step; what the user should be told."""
    damage, step, known = log.recover(), len(log), state["global_step"]
    if damage is None and step < known:
        damage = f"{log.path} ends at step {step}, and the run had come to step {known}"
    if step < known:
        state["global_step"] = step
        state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= step]
        state["evaluated_at"] = state["log_history"][-1]["step"] if state["log_history"] else None
        if (state["best_global_step"] or 0) > step:
            state |= _best_of(state["log_history"], metric)
    return [] if damage is None else [f"{damage}; the run goes on from step {step}"]


def _best_of(evaluations: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Which of them was the best."""
    best: dict[str, Any] = {"best_global_step": None, "best_metric": None}
    for entry in evaluations:
        if metric in entry and is_better(metric, entry[metric], best["best_metric"]):
            best = {"best_global_step": entry["step"], "best_metric": entry[metric]}
    return best
