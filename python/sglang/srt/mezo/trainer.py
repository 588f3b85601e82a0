"""MeZO on an SGLang engine: two forward passes a step, no gradient (arXiv 2305.17333, algorithm 1)."""

import logging
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang.srt.mezo.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.config import MezoConfig, Objective
from sglang.srt.mezo.data import BatchStream, Example
from sglang.srt.mezo.engine import EngineHandle
from sglang.srt.mezo.errors import ConfigError, DataError, DivergedError
from sglang.srt.mezo.evaluate import evaluate
from sglang.srt.mezo.noise import direction, step_seed
from sglang.srt.mezo.optimizer import apply_update, learning_rate_at
from sglang.srt.mezo.plan import ExamplePlan, Planner
from sglang.srt.mezo.readout import batch_loss
from sglang.srt.mezo.run_directory import RunDirectory
from sglang.srt.mezo.scorer import Scorer
from sglang.srt.mezo.seed_log import LogRecord, SeedLog
from sglang.srt.mezo.slots import PerturbedSlots, adapted_sites
from sglang.srt.mezo.tracking import Tracker

logger = logging.getLogger(__name__)

_MAX_LOST_SHARE = 0.1  # of elements whose perturbation vanishes in the slot's dtype, before a warning


@dataclass(frozen=True)
class StepResult:
    """One step. Every tuple has one entry per direction."""

    step: int
    zo_random_seed: int
    learning_rate: float
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    projected_grad: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean of the losses at theta + eps z and theta - eps z over the directions."""
        return sum(self.loss_plus + self.loss_minus) / (2 * len(self.loss_plus))


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with; ``best_step`` is the step whose adapter was kept."""

    global_step: int
    best_step: int
    train_seconds: float
    steps_per_second: float
    metrics: dict[str, float]


class MezoTrainer:
    """Fits a LoRA or aLoRA adapter of the engine's model.

    Args:
        handle: the engine; its LoRA pool needs ``2 num_perturbations + 1`` free slots.
        config: settings of the run; what the adapter is, is read from ``spec``.
        spec: the adapter, as PEFT would describe it. ``spec.invocation`` must be set for aLoRA.
        train_dataset, eval_dataset: tokenised examples. Without ``eval_dataset`` the last adapter is kept.
        objective: what ``config.objective`` leaves open.

    Raises:
        ConfigError, DataError, CapacityError: before anything is written or trained.
    """

    def __init__(
        self,
        handle: EngineHandle,
        config: MezoConfig,
        spec: AdapterSpec,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] = (),
        objective: Objective = "classification",
    ):
        _check_invocation(config, spec)
        self.config = config
        self.objective: Objective = config.objective or objective
        planner = Planner(config.tuning, spec.invocation)
        self.planner = planner
        self.train_plans = [planner.plan(example) for example in train_dataset]
        self.eval_plans = [planner.plan(example) for example in eval_dataset]
        self._require_choices()
        self._require_metric()
        self._require_context(handle.context_length)
        self.max_steps = config.steps_for(len(self.train_plans))
        self.stream = BatchStream(len(self.train_plans), config.train_batch_size, config.seed)
        self.adapter = Adapter.initial(spec, adapted_sites(handle, spec.target_modules), config.seed)
        self.scorer = Scorer(handle, planner.scope, config.max_tokens_per_batch, config.prefix_reuse)
        self.slots = PerturbedSlots(handle, self.adapter, config.num_perturbations)
        self.global_step = 0
        self.slot_dtype = handle.model_runner.dtype

    # --- the algorithm -----------------------------------------------------------------------------------------------

    def train_step(self, batch: Sequence[ExamplePlan]) -> StepResult:
        """One step of algorithm 1 on a batch. Of z only the seed outlives it."""
        config, theta = self.config, self.adapter.theta
        zo_random_seed = step_seed(config.seed, self.global_step)
        z = [direction(zo_random_seed, k, theta.numel(), config.perturbation) for k in range(config.num_perturbations)]
        loss_plus, loss_minus = self.paired_losses(batch, z, config.zo_eps)
        self._require_finite(loss_plus + loss_minus)
        projected_grad = [self._clip((plus - minus) / (2 * config.zo_eps)) for plus, minus in zip(loss_plus, loss_minus)]
        learning_rate = self._learning_rate()
        apply_update(theta, z, projected_grad, learning_rate, config.weight_decay)
        result = StepResult(
            self.global_step, zo_random_seed, learning_rate, tuple(loss_plus), tuple(loss_minus), tuple(projected_grad)
        )
        self.global_step += 1
        return result

    def paired_losses(
        self, batch: Sequence[ExamplePlan], z: Sequence[torch.Tensor], zo_eps: float
    ) -> tuple[list[float], list[float]]:
        """Losses at theta + zo_eps z_k and theta - zo_eps z_k, all in one packed batch.

        Args:
            z: float32 [numel] for each direction.

        Returns:
            loss_plus and loss_minus, one number per direction.
        """
        self.slots.write_perturbed(z, zo_eps)
        pairs = [(plus.lora_id, minus.lora_id) for plus, minus in self.slots.pairs]
        values = self.scorer.score(batch, pairs, self.objective)
        losses = batch_loss(batch, values, self.objective).mean.tolist()
        return losses[0::2], losses[1::2]

    def noise_floor(self, batch: Sequence[ExamplePlan]) -> float:
        """Largest |loss_plus - loss_minus| at z = 0: what the arithmetic alone makes of equal weights."""
        zero = torch.zeros_like(self.adapter.theta)
        loss_plus, loss_minus = self.paired_losses(batch, [zero] * self.config.num_perturbations, 0.0)
        return max(abs(plus - minus) for plus, minus in zip(loss_plus, loss_minus))

    def lost_perturbations(self, z: torch.Tensor) -> float:
        """Share of parameters for which theta + eps z and theta - eps z round to the same number in the slot's dtype."""
        theta, eps = self.adapter.theta, self.config.zo_eps
        plus, minus = (torch.add(theta, z, alpha=sign * eps).to(self.slot_dtype) for sign in (1, -1))
        return (plus == minus).float().mean().item()

    def _require_finite(self, losses: Sequence[float]) -> None:
        if not all(map(math.isfinite, losses)):
            raise DivergedError(f"the losses of step {self.global_step} are {losses}: lower learning_rate or zo_eps")

    def _clip(self, projected_grad: float) -> float:
        """Bound the estimate, and round it to what the seed log keeps, so that a replay takes the same step."""
        bound = self.config.clip_projected_grad
        if bound is not None:
            projected_grad = max(-bound, min(bound, projected_grad))
        return struct.unpack("<f", struct.pack("<f", projected_grad))[0]

    def _learning_rate(self) -> float:
        return learning_rate_at(
            self.global_step,
            learning_rate=self.config.learning_rate,
            lr_scheduler_type=self.config.lr_scheduler_type,
            warmup_steps=self.config.warmup_steps_of(self.max_steps),
            max_steps=self.max_steps,
        )

    # --- the run -----------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> list[ExamplePlan]:
        """The planned examples of ``step``."""
        return [self.train_plans[i] for i in self.stream.batch(step)]

    def evaluate(self, plans: Sequence[ExamplePlan] | None = None) -> dict[str, float]:
        """``eval_loss`` and ``eval_accuracy`` of the adapter as it is, on the development set or on ``plans``."""
        self.slots.write_current()
        plans = self.eval_plans if plans is None else plans
        metrics = evaluate(
            self.scorer, plans, self.slots.current.lora_id, self.objective, self.config.per_device_eval_batch_size
        )
        return {f"eval_{name}": value for name, value in metrics.items()}

    def train(self) -> TrainResult:
        """Run to ``max_steps``, write the run directory, keep the best adapter in ``<output_dir>/adapter``.

        The time of evaluations is not counted as training time.
        """
        directory = RunDirectory(self.config)
        log = directory.start(self.adapter)
        self.global_step = len(log)
        tracker = Tracker(self.config, directory.metrics, self.global_step, self.max_steps)
        try:
            return _Run(self, directory, log, tracker).loop()
        finally:
            tracker.close()
            log.close()

    def _require_choices(self) -> None:
        for plan in (*self.train_plans, *self.eval_plans):
            if self.objective == "classification" and len(plan.option_lengths) < 2:
                raise ConfigError("objective", self.objective, "completion, as an example has one option only: its loss would be 0")

    def _require_metric(self) -> None:
        metrics = ["eval_loss", "eval_accuracy"] if self.objective == "classification" else ["eval_loss"]
        if self.config.metric_for_best_model not in (None, *metrics):
            raise ConfigError("metric_for_best_model", self.config.metric_for_best_model, f"one of {', '.join(metrics)}")

    def _require_context(self, context_length: int) -> None:
        longest = max(len(row.prefix) + len(row.suffix) for plan in (*self.train_plans, *self.eval_plans) for row in plan.rows)
        if longest > context_length:
            raise DataError(f"a sequence of {longest} tokens is longer than the engine's context of {context_length}")

    def close(self) -> None:
        """Give the slots back to the engine."""
        self.slots.release()


def _check_invocation(config: MezoConfig, spec: AdapterSpec) -> None:
    if config.tuning == "alora" and not spec.invocation:
        raise ConfigError("invocation", config.invocation, "activated LoRA needs the text from which it acts, such as ' It was'")
    if config.tuning == "lora" and spec.invocation:
        raise ConfigError("invocation", config.invocation, "ordinary LoRA acts on every token and takes no invocation")


class _Run:
    """The loop around ``train_step``: logging, evaluation, checkpoints."""

    def __init__(self, trainer: MezoTrainer, directory: RunDirectory, log: SeedLog, tracker: Tracker):
        self.trainer = trainer
        self.config = trainer.config
        self.directory = directory
        self.log = log
        self.tracker = tracker
        self.state: dict[str, Any] = directory.load_state() or {
            "global_step": 0, "best_global_step": None, "best_metric": None, "log_history": [],
        }  # fmt: skip
        self.first_step = trainer.global_step
        self.train_seconds = 0.0
        self._recent: list[float] = []  # what is shown as the loss is the mean of these, at most 20, steps

    def loop(self) -> TrainResult:
        trainer, config = self.trainer, self.config
        if trainer.global_step == 0 and trainer.eval_plans:
            self._evaluate()
        while trainer.global_step < trainer.max_steps:
            started = time.perf_counter()
            result = trainer.train_step(trainer.batch(trainer.global_step))
            self.log.append(LogRecord(result.zo_random_seed, result.learning_rate, result.projected_grad))
            self.train_seconds += time.perf_counter() - started
            self._report(result)
            done = trainer.global_step == trainer.max_steps
            if trainer.eval_plans and (trainer.global_step % config.eval_steps == 0 or done):
                self._evaluate()
            if config.save_steps and trainer.global_step % config.save_steps == 0:
                self.directory.save_checkpoint(trainer.adapter, self._state())
        return self._finish()

    def _report(self, result: StepResult) -> None:
        trainer, config = self.trainer, self.config
        step = trainer.global_step
        self._recent = [*self._recent[-19:], result.loss]
        shown = {"loss": f"{sum(self._recent) / len(self._recent):.4f}", "lr": f"{result.learning_rate:.1e}"}
        if trainer.scorer.prefix_stats.total:
            shown["reused"] = f"{trainer.scorer.prefix_stats.reused / trainer.scorer.prefix_stats.total:.1%}"
        self.tracker.advance(**shown)
        if config.noise_floor_steps and step % config.noise_floor_steps == 0:
            self._record({"noise_floor": trainer.noise_floor(trainer.batch(step))})
        if step == 1:
            self._warn_of_lost_perturbations(result)
        if step % config.logging_steps == 0 or step == trainer.max_steps:
            self._record(self._step_metrics(result))

    def _step_metrics(self, result: StepResult) -> dict[str, Any]:
        trainer, stats = self.trainer, self.trainer.scorer.prefix_stats
        return {
            "loss": sum(self._recent) / len(self._recent),
            "loss_plus": result.loss_plus,
            "loss_minus": result.loss_minus,
            "projected_grad": result.projected_grad,
            "learning_rate": result.learning_rate,
            "epoch": trainer.stream.epoch(trainer.global_step),
            "forward_passes": 2 * self.config.num_perturbations * trainer.global_step,
            "prefix_tokens_reused": stats.reused,
            "prefix_tokens_computed": stats.computed,
            "train_seconds": self.train_seconds,
        }

    def _warn_of_lost_perturbations(self, result: StepResult) -> None:
        z = direction(result.zo_random_seed, 0, self.trainer.adapter.numel, self.config.perturbation)
        share = self.trainer.lost_perturbations(z)
        if share > _MAX_LOST_SHARE:
            logger.warning(
                "zo_eps=%g is lost in %s for %.0f %% of the parameters: raise zo_eps or serve the model in float32",
                self.config.zo_eps, self.trainer.slot_dtype, 100 * share,
            )  # fmt: skip

    def _evaluate(self) -> None:
        trainer = self.trainer
        metrics = trainer.evaluate()
        step = trainer.global_step
        self._record({**metrics, "forward_passes": 2 * self.config.num_perturbations * step})
        self.tracker.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if self._is_best(metrics) and self.config.load_best_model_at_end:
            trainer.adapter.save_pretrained(self.directory.best)
        self.directory.save_state(self._state())

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = self.config.metric_for_best_model or "eval_loss"
        best = self.state["best_metric"]
        better = best is None or (metrics[name] < best if name.endswith("loss") else metrics[name] > best)
        if better:
            self.state.update(best_metric=metrics[name], best_global_step=self.trainer.global_step)
        return better

    def _record(self, metrics: dict[str, Any]) -> None:
        step = self.trainer.global_step
        self.tracker.record(step, metrics)
        self.state["log_history"].append({"step": step, **metrics})

    def _state(self) -> dict[str, Any]:
        self.state["global_step"] = self.trainer.global_step
        return self.state

    def _finish(self) -> TrainResult:
        trainer = self.trainer
        best_step = trainer.global_step
        if self.config.load_best_model_at_end and self.state["best_global_step"] is not None:
            best_step = self.state["best_global_step"]
            trainer.adapter.load_weights(self.directory.best)
        trainer.adapter.save_pretrained(self.directory.adapter)
        self.directory.save_state(self._state())
        rate = (trainer.global_step - self.first_step) / self.train_seconds if self.train_seconds else 0.0
        metrics = trainer.evaluate() if trainer.eval_plans else {}
        return TrainResult(trainer.global_step, best_step, self.train_seconds, rate, metrics)
