"""MeZO on an SGLang engine: two forward passes a step, no gradient (arXiv 2305.17333, algorithm 1).

What takes long comes as ``Passes``, one forward pass at a time; each has a twin that does all of them at once.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

import torch

from sglang.srt.mezo.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.config import MezoConfig, Objective
from sglang.srt.mezo.batches import BatchStream
from sglang.srt.mezo.data import Example
from sglang.srt.mezo.engine import EngineHandle
from sglang.srt.mezo.errors import ConfigError, DataError, DivergedError
from sglang.srt.mezo.estimator import paired, projected_grads
from sglang.srt.mezo.evaluate import evaluation_passes
from sglang.srt.mezo.layers import adapted_sites
from sglang.srt.mezo.noise import step_seed
from sglang.srt.mezo.optimizer import Optimizer, learning_rate_at, round_to_log
from sglang.srt.mezo.passes import Passes, drain
from sglang.srt.mezo.peft_adapter import PeftAdapter
from sglang.srt.mezo.plan import ExamplePlan, Planner, PrefixScope
from sglang.srt.mezo.readout import batch_loss
from sglang.srt.mezo.run import StepResult, TrainingRun, TrainResult
from sglang.srt.mezo.scorer import Scorer
from sglang.srt.mezo.seed_log import LogRecord
from sglang.srt.mezo.sharing import distinct_tokens
from sglang.srt.mezo.slots import PerturbedSlots
from sglang.srt.mezo.tracking import Tracker


_POOL_SHARE = 0.75  # of the KV pool that prefixes of all examples may fill; a batch and other prefixes need the rest


class MezoTrainer:
    """Fits a LoRA or aLoRA adapter of the engine's model.

    Args:
        handle: the engine. With ``config.num_slots`` free slots in its LoRA pool all directions of a step are scored at once.
        config: settings of the run; what the adapter is, is read from ``spec``.
        spec: the adapter, as PEFT would describe it. ``spec.invocation`` must be set for aLoRA.
        train_dataset, eval_dataset: tokenised examples. Without ``eval_dataset`` the last adapter is kept.
        objective: what ``config.objective`` leaves open.
        kept_tokens: most KV tokens of base-model prefixes that stay locked between steps; by default half of the pool.
        segments: (step from which they count, number) of the training examples in their order, where a run that
            resumes was given some later; by default all count from step 0.
        claim_slots: take the slots now; or later by ``slots.claim()``, where requests may need them now.
        spare_slots: adapters that the pool is to have room for besides.
        start: the adapter of ``spec`` to go on from; a new one if absent.

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
        kept_tokens: int | None = None,
        segments: Sequence[tuple[int, int]] = (),
        claim_slots: bool = True,
        spare_slots: int = 0,
        start: PeftAdapter | None = None,
    ):
        _check_invocation(config, spec)
        self.config = config
        self.objective: Objective = config.objective or objective
        planner = Planner(config.tuning, spec.invocation)
        self.planner = planner
        self.handle = handle
        self.train_plans = [planner.plan(example) for example in train_dataset]
        self.eval_plans = [planner.plan(example) for example in eval_dataset]
        self.require_usable(self.train_plans + self.eval_plans)
        (_, initial), *later = segments or [(0, len(self.train_plans))]
        if initial + sum(added for _, added in later) != len(self.train_plans):
            raise ConfigError("segments", list(segments), f"{len(self.train_plans)} examples, as many as there are, in all")
        self.max_steps = config.steps_for(initial)
        kept_tokens = handle.kv_capacity // 2 if kept_tokens is None else kept_tokens
        window = self._window(kept_tokens)
        self.stream = BatchStream(initial, config.train_batch_size, config.seed, window, config.echoes)
        self._window_in_pool: tuple[int, int, int] | None = None
        for first_step, added in later:
            self.stream.extend(first_step, added)
        sites = adapted_sites(handle, spec.target_modules)
        self.adapter = Adapter.initial(spec, sites, config.seed) if start is None else Adapter.holding(spec, sites, start.matrices)
        self.scorer = Scorer(handle, planner.scope, config.max_tokens_per_batch, config.prefix_reuse, kept_tokens)
        self.optimizer = Optimizer(self.adapter.theta, self.adapter.shapes, config.update_rule, _largest_weight(spec, handle.model_runner.dtype))
        self.slots = PerturbedSlots(handle, self.adapter, config.num_perturbations, config.estimator, spare_slots)
        if claim_slots:
            self.slots.claim()
        self.global_step = 0
        self.slot_dtype = handle.model_runner.dtype

    # --- the algorithm -----------------------------------------------------------------------------------------------

    def train_step(self, batch: Sequence[ExamplePlan]) -> StepResult:
        """All of ``step_passes`` at once."""
        return drain(self.step_passes(batch))

    def step_passes(self, batch: Sequence[ExamplePlan]) -> Passes[StepResult]:
        """One step of algorithm 1 on a batch. Of z only the seed outlives it; theta moves in the last piece."""
        self._enter_window()
        zo_random_seed = step_seed(self.config.seed, self.global_step, self.config.perturbation_interval)
        z = yield from self.directions(zo_random_seed)
        loss_plus, loss_minus = yield from self.paired_passes(batch, z, self.config.zo_eps)
        self._require_finite(loss_plus + loss_minus)
        projected_grad = list(map(self._clip, self._estimate(loss_plus, loss_minus, self.config.zo_eps)))
        learning_rate = self._learning_rate()
        self.optimizer.step(z, projected_grad, learning_rate)
        result = StepResult(
            self.global_step, zo_random_seed, learning_rate, tuple(loss_plus), tuple(loss_minus), tuple(projected_grad)
        )
        self.global_step += 1
        return result

    def directions(self, zo_random_seed: int) -> Passes[list[torch.Tensor]]:
        """z_k, float32 [numel], for each direction of a step's seed."""
        z = []
        for k in range(self.config.num_perturbations):
            z.append(self.optimizer.direction(zo_random_seed, k))
            yield
        return z

    def paired_losses(
        self, batch: Sequence[ExamplePlan], z: Sequence[torch.Tensor], zo_eps: float
    ) -> tuple[list[float], list[float]]:
        """All of ``paired_passes`` at once."""
        return drain(self.paired_passes(batch, z, zo_eps))

    def paired_passes(
        self, batch: Sequence[ExamplePlan], z: Sequence[torch.Tensor], zo_eps: float
    ) -> Passes[tuple[list[float], list[float]]]:
        """Losses at theta + zo_eps z_k and what they are compared with, of as many directions in the same packed passes as there are slots for.

        Args:
            z: float32 [numel] for each direction.

        Returns:
            loss_plus and loss_minus, one number per direction, as ``paired`` gives them.
        """
        if self.config.estimator == "one_sided":
            self.slots.write_current()
        losses = []
        for first in range(0, len(z), self.slots.width):
            end = min(first + self.slots.width, len(z))
            for place in range(end - first):
                self.slots.write_direction(place, z[first + place], zo_eps)
                yield
            values = yield from self.scorer.passes(batch, self.slots.groups(first, end), self.objective)
            losses += batch_loss(batch, values, self.objective).mean.tolist()
        return paired(self.handle.share(losses), self.config.estimator)

    def perturbed_passes(self, batch: Sequence[ExamplePlan], zo_random_seed: int, zo_eps: float) -> Passes[dict[str, list[float]]]:
        """``loss_plus``, ``loss_minus`` and ``projected_grad`` along the directions of a seed; theta stays as it is."""
        z = yield from self.directions(zo_random_seed)
        loss_plus, loss_minus = yield from self.paired_passes(batch, z, zo_eps)
        projected_grad = self._estimate(loss_plus, loss_minus, zo_eps)
        return {"loss_plus": loss_plus, "loss_minus": loss_minus, "projected_grad": projected_grad}

    def apply(self, record: LogRecord) -> None:
        """Take the step that a record of the seed log describes."""
        self.prepare(record)
        self.commit()

    def prepare(self, record: LogRecord) -> None:
        """Work out the step that a record describes; DivergedError where it does not end in finite numbers."""
        self.optimizer.prepare_replay(record.seed, record.projected_grads, record.learning_rate)

    def commit(self) -> None:
        """Take the step that was prepared."""
        self.optimizer.commit()
        self.global_step += 1

    def lost_perturbations(self, z: torch.Tensor) -> float:
        """Share of parameters for which theta + eps z and theta - eps z round to the same number in the slot's dtype."""
        theta, eps = self.adapter.theta, self.config.zo_eps
        plus, minus = (torch.add(theta, z, alpha=sign * eps).to(self.slot_dtype) for sign in (1, -1))
        return (plus == minus).float().mean().item()

    def _estimate(self, loss_plus: Sequence[float], loss_minus: Sequence[float], zo_eps: float) -> list[float]:
        return projected_grads(loss_plus, loss_minus, zo_eps, self.config.estimator, self.config.scale_by_loss_std)

    def _require_finite(self, losses: Sequence[float]) -> None:
        if not all(map(math.isfinite, losses)):
            raise DivergedError(f"the losses of step {self.global_step} are {losses}: lower learning_rate or zo_eps")

    def _clip(self, projected_grad: float) -> float:
        """Bound the estimate, and round it to what the seed log keeps, so that a replay takes the same step."""
        bound = self.config.clip_projected_grad
        if bound is not None:
            projected_grad = max(-bound, min(bound, projected_grad))
        try:
            return round_to_log(projected_grad)
        except OverflowError:
            raise DivergedError(f"the projected gradient of step {self.global_step} is {projected_grad}: lower learning_rate or zo_eps") from None

    def _learning_rate(self) -> float:
        return learning_rate_at(
            self.global_step,
            learning_rate=self.config.learning_rate,
            lr_scheduler_type=self.config.lr_scheduler_type,
            warmup_steps=self.config.warmup_steps_of(self.max_steps),
            max_steps=self.max_steps,
        )

    def prefix_passes(self) -> Passes[None]:
        """Compute base-model prefixes in the batches in which the steps so far first met them.

        KV differs in its last bits between batches, and a long run magnifies that: with this a run that goes on in a new
        engine ends as the whole run would have. Nothing to do where the pool cannot hold them all.
        """
        if not self.config.prefix_reuse or self.planner.scope is not PrefixScope.BASE:
            return
        tokens = sum(map(len, {row.prefix for plan in self.eval_plans + self.train_plans for row in plan.rows}))
        if not self.handle.share(tokens <= self.handle.free_kv_tokens):
            return
        size = self.config.per_device_eval_batch_size
        for start in range(0, len(self.eval_plans), size):
            yield from self.scorer.prefix_passes(self.eval_plans[start : start + size], [(self.slots.current.lora_id,)])
        for step in self.stream.first_epochs(self.global_step):
            yield from self.scorer.prefix_passes(self.batch(step), self.slots.groups(0, self.slots.width))

    def _window(self, kept_tokens: int) -> int | None:
        """Examples whose prefixes are kept at a time; None where the pool has room for all."""
        prefixes = {row.prefix for plan in self.train_plans for row in plan.rows}
        room = _POOL_SHARE * self.handle.kv_capacity
        if not self.config.prefix_reuse or sum(map(len, prefixes)) <= room or (tokens := distinct_tokens(prefixes)) <= room:
            return None
        return max(1, int(kept_tokens / tokens * len(self.train_plans)))

    def _enter_window(self) -> None:
        """Give up the prefixes of the window before."""
        window = self.stream.window_of(self.global_step)
        if window != self._window_in_pool:
            self._window_in_pool = window
            self.scorer.base_prefixes.release()

    # --- the run -----------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> list[ExamplePlan]:
        """The planned examples of ``step``."""
        return [self.train_plans[i] for i in self.stream.batch(step)]

    def extend(self, examples: Sequence[Example], record: Callable[[], None] = lambda: None) -> int:
        """Add training examples; returns the first step that draws from them, the one after the step in progress.

        It is later where examples that were added before count from later on. ``max_steps`` stays as it is. Where ``record``,
        which is called once they are added, raises, they are not.
        """
        plans = [self.planner.plan(example) for example in examples]
        self.require_usable(plans)
        segments, before = list(self.stream.segments), len(self.train_plans)
        first_step = max(self.global_step + 1, segments[-1][0])
        self.stream.extend(first_step, len(plans))
        self.train_plans += plans
        try:
            record()
        except Exception:
            self.stream.segments = segments
            del self.train_plans[before:]
            raise
        return first_step

    def evaluate(self, plans: Sequence[ExamplePlan] | None = None) -> dict[str, float]:
        """All of ``evaluation_passes`` at once."""
        return drain(self.evaluation_passes(plans))

    def evaluation_passes(self, plans: Sequence[ExamplePlan] | None = None) -> Passes[dict[str, float]]:
        """``eval_loss`` and ``eval_accuracy`` of the adapter as it is, on the development set or on ``plans``."""
        self.slots.write_current()
        plans = self.eval_plans if plans is None else plans
        metrics = yield from evaluation_passes(
            self.scorer, plans, self.slots.current.lora_id, self.objective, self.config.per_device_eval_batch_size
        )
        return {f"eval_{name}": value for name, value in self.handle.share(metrics).items()}

    def trained_tokens(self) -> int:
        """Tokens of the examples drawn so far; a prompt counts once for each of its options that has a row of its own."""
        lengths = (sum(len(row.prefix) + len(row.suffix) for row in plan.rows) for plan in self.train_plans)
        return sum(length * draws for length, draws in zip(lengths, self.stream.draws(self.global_step)))

    def train(self) -> TrainResult:
        """Run to ``max_steps``, write the run directory, keep the best adapter in ``<output_dir>/adapter``.

        The time of evaluations is not counted as training time.
        """
        with closing(TrainingRun(self, Tracker)) as run:
            drain(run.open())
            return drain(run.passes())

    def require_usable(self, plans: Sequence[ExamplePlan]) -> None:
        """Raise ConfigError or DataError for an example that this run cannot score."""
        require_objective(self.config, self.objective, (len(plan.option_lengths) for plan in plans))
        for plan in plans:
            longest = max(len(row.prefix) + len(row.suffix) for row in plan.rows)
            if longest > self.handle.context_length:
                raise DataError(f"a sequence of {longest} tokens is longer than the engine's context of {self.handle.context_length}")

    def close(self) -> None:
        """Give slots and locks back to the engine, the ones even if the others fail."""
        with ExitStack() as stack:
            stack.callback(self.slots.release)
            stack.callback(self.scorer.base_prefixes.release)


def require_objective(config: MezoConfig, objective: Objective, option_counts: Iterable[int]) -> None:
    """Raise ConfigError where ``objective`` is not one for examples of so many options, or has no such metric."""
    if objective == "classification" and any(count < 2 for count in option_counts):
        raise ConfigError("objective", objective, "completion, as an example has one option only: its loss would be 0")
    metrics = ["eval_loss", "eval_accuracy"] if objective == "classification" else ["eval_loss"]
    if config.metric_for_best_model not in (None, *metrics):
        raise ConfigError("metric_for_best_model", config.metric_for_best_model, f"one of {', '.join(metrics)} for {objective}")


def _largest_weight(spec: AdapterSpec, dtype: torch.dtype) -> float:
    """Of an adapter whose layers can still give finite numbers: products of two weights, scaled, are finite in float32."""
    return min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float32).max / spec.lora_alpha))


def _check_invocation(config: MezoConfig, spec: AdapterSpec) -> None:
    if config.tuning is None:
        raise ConfigError("tuning", None, "what the adapter of init_from is: sglang.srt.mezo.start.settled says it")
    if config.tuning == "alora" and not spec.invocation:
        raise ConfigError("invocation", config.invocation, "activated LoRA needs the text from which it acts, such as ' It was'")
    if config.tuning == "lora" and spec.invocation:
        raise ConfigError("invocation", config.invocation, "ordinary LoRA acts on every token and takes no invocation")
