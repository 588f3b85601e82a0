"""One job in the scheduler: the learner, its run, and the piece of work that comes next."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.peft_adapter import PeftAdapter
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DivergedError
from sglang.srt.mezo.core.optimizer import to_logged_float32
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.peft_layers import layers_for_adapters
from sglang.srt.mezo.service.wire.messages import SPARE_SLOTS, StartJob
from sglang.srt.mezo.training.learner import Learner
from sglang.srt.mezo.training.results import TrainResult
from sglang.srt.mezo.training.run import TrainingRun
from sglang.srt.mezo.training.start import contradiction, of_adapter, read_start
from sglang.srt.mezo.training.tracking import Tracker

Emit = Callable[..., None]
"""emit(kind, step, message="", **data) sends a ``MezoEvent`` of this job."""

_SECONDS_BETWEEN_EVENTS = 0.5


class Job:
    """Advances by one bounded piece at a time; between pieces the engine is free for requests."""

    def __init__(self, command: StartJob, learner: Learner, opening: Passes[TrainingRun], emit: Emit):
        self.job_id = command.job_id
        self.manual = command.manual
        self.learner = learner
        self.emit = emit
        self.run: TrainingRun | None = None  # until ``opening`` is done
        self._operation: str | None = None
        self._work: Passes | None = opening

    @classmethod
    def start(
        cls,
        handle: EngineHandle,
        command: StartJob,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        emit: Emit,
        kept_tokens: int,
    ) -> Self:
        """Build the job; its slots are to be claimed before it advances.

        Raises:
            ConfigError, DataError, CapacityError: it could never run.
        """
        config = MezoConfig(**command.config)
        origin = (
            None
            if config.init_from is None
            else read_start(config, layers_for_adapters(handle.lora_manager), command.start)
        )
        if origin is not None:
            _require_agreement(command, config, origin)
        spec = AdapterSpec(
            command.base_model, config.r, config.lora_alpha, tuple(command.target_modules), tuple(command.invocation)
        )
        learner = Learner(
            handle,
            config,
            spec,
            train,
            evaluation,
            command.objective,
            kept_tokens,
            command.segments,
            claim_slots=False,
            spare_slots=SPARE_SLOTS,
            start=origin,
        )

        def make_tracker(config: MezoConfig, path: Path, first_step: int, max_steps: int) -> Tracker:
            return EventTracker(config, path, first_step, max_steps, emit)

        return cls(command, learner, TrainingRun.open(learner, make_tracker, served_only=command.manual), emit)

    @property
    def has_work(self) -> bool:
        return self._work is not None

    def advance(self, max_tokens: int) -> bool:
        """Do the next piece, a forward pass of at most so many tokens; True once the job has ended by itself.

        Raises whatever the piece raises; the job is then to be stopped.
        """
        self.learner.scorer.max_tokens = min(max_tokens, self.learner.config.max_tokens_per_batch)
        try:
            next(self._work)
        except StopIteration as stop:
            return self._finish_work(stop.value)
        return False

    def restart_work(self) -> None:
        """What the engine held between two pieces is gone or stale: begin the step in progress anew."""
        if self.run is None or self._work is None:
            return
        if self.manual:
            self._fail_operation("the engine's cache was flushed, or requests took its room: ask again")
        else:
            self._work = self.run.passes()

    def stop(self) -> None:
        """Give back the slots and the locks, close the files: each even if another fails."""
        with ExitStack() as stack:
            if self.run is not None:
                stack.callback(self.run.close)
            elif self._work is not None:
                stack.callback(self._work.close)
            stack.callback(self.learner.close)
            if self._operation is not None:
                self._fail_operation("the job was stopped")

    def extend(self, examples: Sequence[Example]) -> int:
        return self.learner.extend(examples, self._require_open().save_segments)

    def save(self, directory: str) -> int:
        self._require_open()
        self.learner.handle.on_leader(self.learner.adapter.save_pretrained, Path(directory))
        return self.learner.global_step

    def evaluate(self, operation: str, examples: Sequence[Example], zo_random_seed: int, zo_eps: float) -> None:
        """Begin to evaluate a perturbation; the result is emitted as "evaluated"."""
        self._require_manual()
        plans = self.learner.plan(examples)
        self._operation = operation
        self._work = self.learner.probe.passes(plans, zo_random_seed, zo_eps)

    def update(self, zo_random_seed: int, projected_grad: Sequence[float], learning_rate: float) -> int:
        """Take one step along the directions of ``zo_random_seed``; it is in the seed log when this returns."""
        run = self._require_manual()
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

    def _finish_work(self, value: Any) -> bool:
        self._work = None
        step = self.learner.global_step
        if self.run is None:
            self.run = value
            self.emit("started", step)
            self._work = None if self.manual else self.run.passes()
            return False
        if self.manual:
            operation, self._operation = self._operation, None
            self.emit("evaluated", step, operation=operation, **value)
            return False
        self._emit_success(value)
        return True

    def _emit_success(self, result: TrainResult) -> None:
        self.emit(
            "succeeded",
            result.global_step,
            best_step=result.best_step,
            metrics=result.metrics,
            train_seconds=result.train_seconds,
            trained_tokens=self.learner.trained_tokens(),
        )

    def _fail_operation(self, reason: str) -> None:
        operation, self._operation, self._work = self._operation, None, None
        self.emit("evaluated", self.learner.global_step, operation=operation, error=reason)

    def _require_open(self) -> TrainingRun:
        if self.run is None:
            raise ConfigError("job", self.job_id, "a job that has started; it is being brought to its last step")
        return self.run

    def _require_manual(self) -> TrainingRun:
        run = self._require_open()
        if not self.manual or self._operation is not None:
            raise ConfigError("job", self.job_id, "a job that is held for single operations, one at a time")
        return run


def _require_agreement(command: StartJob, config: MezoConfig, origin: PeftAdapter) -> None:
    """The adapter is still the one that the job was created for."""
    given = {name: getattr(config, name) for name in of_adapter(origin)} | {"target_modules": command.target_modules}
    if (wrong := contradiction(given, origin, None)) is not None:
        name, value = wrong
        raise ConfigError(name, given[name], f"{value!r}, as the adapter of init_from has it")
    if tuple(command.invocation) != origin.invocation:
        raise ConfigError(
            "invocation", command.invocation, f"{list(origin.invocation)}, as the adapter of init_from has it"
        )


class EventTracker(Tracker):
    """Writes metrics.jsonl, and tells the HTTP process a few times a second."""

    def __init__(self, config: MezoConfig, path: Path, first_step: int, max_steps: int, emit: Emit):
        super().__init__(config, path, first_step, max_steps)
        self._emit = emit
        self._max_steps = max_steps
        self._last_event = 0.0

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        super().record(step, metrics)
        if "eval_loss" in metrics:
            self._emit("evaluated_dev", step, max_steps=self._max_steps, **metrics)
        elif "loss" in metrics and (
            step == self._max_steps or time.monotonic() - self._last_event > _SECONDS_BETWEEN_EVENTS
        ):
            self._last_event = time.monotonic()
            self._emit("step", step, max_steps=self._max_steps, **metrics)

    def say(self, line: str) -> None:
        """Nobody looks at the server's standard output."""

    def warn(self, message: str, step: int) -> None:
        super().warn(message, step)
        self._emit("warning", step, message)

    def checkpoint(self, step: int, directory: Path) -> None:
        self._emit("checkpoint", step, directory=str(directory))
