"""A job on the engine: one that trains, or one that only holds its adapter. Each does one bounded piece at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.foreign import ForeignAdapter
from sglang.srt.mezo.adapters.prefix_adapter import PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DivergedError
from sglang.srt.mezo.core.optimizer import to_logged_float32
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine.handle import EngineHandle, checkpoint_config, config_source
from sglang.srt.mezo.engine.peft_layers import model_for_adapters
from sglang.srt.mezo.service.wire import events
from sglang.srt.mezo.service.wire.events import JobEvent
from sglang.srt.mezo.service.wire.messages import SPARE_SLOTS, HoldJob, StartJob
from sglang.srt.mezo.training.learner import Learner
from sglang.srt.mezo.training.rewards import Writer
from sglang.srt.mezo.training.run import TrainingRun
from sglang.srt.mezo.training.start import contradiction, of_adapter, read_start
from sglang.srt.mezo.training.tracking import Tracker
from sglang.srt.mezo.training.trained import Spec

Emit = Callable[[JobEvent], None]
"""Sends an event to the HTTP process."""

_SECONDS_BETWEEN_EVENTS = 0.5


class Job:
    """What both kinds do: take the adapter up, advance, save, stop.

    Attributes:
        done: it has come to its end by itself.
    """

    def __init__(self, job_id: str, learner: Learner, opening: Passes[TrainingRun], emit: Emit):
        self.job_id = job_id
        self.learner = learner
        self.run: TrainingRun | None = None  # until ``opening`` is done
        self.done = False
        self._emit = emit
        self._work: Passes[None] | None = self._take_up(opening)

    @property
    def has_work(self) -> bool:
        return self._work is not None

    def advance(self, max_tokens: int) -> None:
        """Do the next piece, a forward pass of at most so many tokens.

        Raises whatever the piece raises; the job is then to be stopped.
        """
        work = self._work
        if work is None:
            return
        self.learner.scorer.max_tokens = min(max_tokens, self.learner.config.max_tokens_per_batch)
        try:
            next(work)
        except StopIteration:
            if self._work is work:  # else it has seen to what comes next
                self._work = None

    def restart_work(self) -> None:
        """What the engine held between two pieces is gone or stale: begin the step in progress anew."""
        if self.run is not None and self._work is not None:
            self._restart(self.run)

    def stop(self) -> None:
        """Give back the slots and the locks, close the files: each even if another fails."""
        with ExitStack() as stack:
            stack.callback(self.learner.close)
            if self.run is not None:
                stack.callback(self.run.close)
            if self._work is not None:
                stack.callback(self._work.close)

    def save(self, directory: str) -> int:
        self._opened()
        self.learner.handle.on_leader(self.learner.trainable.save_pretrained, Path(directory))
        return self.learner.global_step

    def tell(self, kind: Callable[..., JobEvent], **fields: Any) -> None:
        """Send an event of the step that the adapter is at."""
        self._emit(kind(job_id=self.job_id, step=self.learner.global_step, **fields))

    def _take_up(self, opening: Passes[TrainingRun]) -> Passes[None]:
        self.run = yield from opening
        self.tell(events.Started)
        self._work = self._go_on(self.run)

    def _go_on(self, run: TrainingRun) -> Passes[None] | None:
        """What it does once its adapter is there, None for nothing."""
        raise NotImplementedError

    def _restart(self, run: TrainingRun) -> None:
        raise NotImplementedError

    def _opened(self) -> TrainingRun:
        if self.run is None:
            raise ConfigError("job", self.job_id, "a job that has started; it is being brought to its last step")
        return self.run


class TrainingJob(Job):
    """Trains to its last step."""

    def extend(self, examples: Sequence[Example]) -> int:
        """More examples; returns the first step that draws from them."""
        return self.learner.extend(examples, self._opened().save_portions)

    def _go_on(self, run: TrainingRun) -> Passes[None]:
        result = yield from run.passes()
        self.tell(
            events.Succeeded,
            best_step=result.best_step,
            metrics=result.metrics,
            train_seconds=result.train_seconds,
            trained_tokens=self.learner.trained_tokens(),
        )
        self.done = True

    def _restart(self, run: TrainingRun) -> None:
        self._work = self._go_on(run)


class HeldJob(Job):
    """Holds its adapter for single evaluations and updates."""

    _operation: str | None = None

    def evaluate(self, operation: str, examples: Sequence[Example], zo_random_seed: int, zo_eps: float) -> None:
        """Begin to evaluate a perturbation; the result is an event."""
        self._free()
        plans = self.learner.plan(examples)
        self._operation = operation
        self._work = self._evaluation(operation, self.learner.probe.passes(plans, zo_random_seed, zo_eps))

    def update(self, zo_random_seed: int, projected_grad: Sequence[float], learning_rate: float) -> int:
        """Take one step along the directions of ``zo_random_seed``; it is in the seed log when this returns."""
        run = self._free()
        directions = self.learner.config.num_perturbations
        if len(projected_grad) != directions:
            raise ConfigError(
                "projected_grad", list(projected_grad), f"{directions} numbers, as many as num_perturbations"
            )
        try:
            run.apply(LogRecord(zo_random_seed, learning_rate, tuple(map(to_logged_float32, projected_grad))))
        except DivergedError as error:
            finite = "the adapter's weights, and their products, stay finite"
            allowed = f"numbers so small that with learning_rate={learning_rate:g} {finite}"
            raise ConfigError("projected_grad", list(projected_grad), allowed) from error
        return self.learner.global_step

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._drop("the job was stopped")

    def _go_on(self, run: TrainingRun) -> None:
        return None

    def _evaluation(self, operation: str, passes: Passes[dict[str, list[float]]]) -> Passes[None]:
        losses = yield from passes
        self._operation = None
        self.tell(events.PerturbationEvaluated, operation=operation, losses=losses)

    def _restart(self, run: TrainingRun) -> None:
        self._drop("the engine's cache was flushed, or requests took its room: ask again")

    def _drop(self, reason: str) -> None:
        """Give up the evaluation that is under way, if there is one."""
        operation, self._operation = self._operation, None
        if operation is not None:
            self._work = None
            self.tell(events.PerturbationDropped, operation=operation, message=reason)

    def _free(self) -> TrainingRun:
        run = self._opened()
        if self._operation is not None:
            raise ConfigError("job", self.job_id, "a job that is held for single operations, one at a time")
        return run


def make_job(
    handle: EngineHandle,
    command: StartJob | HoldJob,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    emit: Emit,
    kept_tokens: int,
    writer: Writer | None,
) -> TrainingJob | HeldJob:
    """Its slots are to be claimed before it advances.

    Raises:
        ConfigError, DataError, CapacityError: it could never run.
    """
    learner = _learner(handle, command, train, evaluation, kept_tokens, writer)

    def make_tracker(config: MezoConfig, path: Path, first_step: int, max_steps: int) -> Tracker:
        return EventTracker(config, path, first_step, max_steps, command.job_id, emit)

    if isinstance(command, HoldJob):
        return HeldJob(command.job_id, learner, TrainingRun.open(learner, make_tracker, kept_adapter_only=True), emit)
    return TrainingJob(command.job_id, learner, TrainingRun.open(learner, make_tracker), emit)


def _learner(
    handle: EngineHandle,
    command: StartJob | HoldJob,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    kept_tokens: int,
    writer: Writer | None,
) -> Learner:
    config, origin = command.config, None
    if config.init_from is not None:
        origin = read_start(config, model_for_adapters(handle.lora_manager), command.start)
    if origin is not None:
        _require_agreement(command, origin)
    return Learner(
        handle,
        config,
        _spec(handle, command),
        train,
        evaluation,
        kept_tokens=kept_tokens,
        portions=command.portions if isinstance(command, StartJob) else (),
        claim_slots=False,
        spare_slots=SPARE_SLOTS,
        start=origin,
        writer=writer,
    )


def _spec(handle: EngineHandle, command: StartJob | HoldJob) -> Spec:
    """What the job trains."""
    config = command.config
    if config.tuning == "prefix":
        model_config = checkpoint_config(*config_source(handle.model_runner.server_args))
        return PrefixSpec.of(config, command.base_model, model_config)
    return AdapterSpec.of(config, command.base_model, command.invocation)


def _require_agreement(command: StartJob | HoldJob, origin: ForeignAdapter) -> None:
    """The adapter is still the one that the job was created for."""
    given = {name: getattr(command.config, name) for name in of_adapter(origin)}
    if (wrong := contradiction(given, origin, None)) is not None:
        name, value = wrong
        raise ConfigError(name, given[name], f"{value!r}, as the adapter of init_from has it")
    if tuple(command.invocation) != origin.invocation:
        raise ConfigError(
            "invocation", command.invocation, f"{list(origin.invocation)}, as the adapter of init_from has it"
        )


class EventTracker(Tracker):
    """Writes metrics.jsonl, and tells the HTTP process a few times a second."""

    def __init__(self, config: MezoConfig, path: Path, first_step: int, max_steps: int, job_id: str, emit: Emit):
        super().__init__(config, path, first_step, max_steps)
        self._job_id = job_id
        self._emit = emit
        self._max_steps = max_steps
        self._last_event = 0.0

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        super().record(step, metrics)
        if "eval_loss" in metrics:
            self._tell(events.Evaluated, step, max_steps=self._max_steps, metrics=metrics)
        elif "loss" in metrics and (
            step == self._max_steps or time.monotonic() - self._last_event > _SECONDS_BETWEEN_EVENTS
        ):
            self._last_event = time.monotonic()
            self._tell(events.StepTaken, step, max_steps=self._max_steps, metrics=metrics)

    def say(self, line: str) -> None:
        """Nobody looks at the server's standard output."""

    def warn(self, message: str, step: int) -> None:
        super().warn(message, step)
        self._tell(events.Warned, step, message=message)

    def checkpoint(self, step: int, directory: Path) -> None:
        self._tell(events.CheckpointSaved, step, directory=str(directory))

    def _tell(self, kind: Callable[..., JobEvent], step: int, **fields: Any) -> None:
        self._emit(kind(job_id=self._job_id, step=step, **fields))
