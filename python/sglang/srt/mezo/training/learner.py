"""MeZO on an SGLang engine: two forward passes a step, no gradient (arXiv 2305.17333, algorithm 1).

What takes long comes as ``Passes``, one forward pass at a time; ``drain`` does all of them at once.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from sglang.srt.mezo.adapters.families import require_tuning
from sglang.srt.mezo.adapters.peft_adapter import PeftAdapter
from sglang.srt.mezo.core.config import MezoConfig, Objective
from sglang.srt.mezo.core.errors import ConfigError, DataError, DivergedError, RankError
from sglang.srt.mezo.core.noise import step_seed
from sglang.srt.mezo.core.optimizer import Optimizer, learning_rate_at, to_logged_float32
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.data.batches import BatchStream, Portion
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.probe import Probe
from sglang.srt.mezo.training.results import StepResult
from sglang.srt.mezo.training.trained import Spec, trained
from sglang.srt.mezo.training.usable import require_usable
from sglang.srt.mezo.training.window import PrefixWindow, window_of

_LOOKED_AT = 1 << 24  # parameters, to tell whether perturbations are lost


class Learner:
    """What is trained, its examples, and the steps that fit it to them.

    Args:
        handle: the engine. With ``config.num_slots`` free slots in its LoRA pool all directions of a step are scored at
            once.
        config: settings of the run.
        spec: what ``config`` describes: an adapter (``AdapterSpec.of``), a prefix (``PrefixSpec.of``), or the model's
            own parameters (``WeightsSpec``).
        train_dataset, eval_dataset: tokenised examples. Without ``eval_dataset`` the last adapter is kept.
        objective: what ``config.objective`` leaves open.
        kept_tokens: most KV tokens of base-model prefixes that stay locked between steps; by default half of the pool.
        portions: of the training examples in their order, where a run that
            resumes was given some later; by default all count from step 0.
        claim_slots: take the slots now; or later by ``points.claim()``, where requests may need them now.
        spare_slots: adapters that the pool is to have room for besides.
        start: the adapter of ``spec`` to go on from; a new one if absent.

    Raises:
        ConfigError, DataError, CapacityError: before anything is written or trained.
    """

    def __init__(
        self,
        handle: EngineHandle,
        config: MezoConfig,
        spec: Spec,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] = (),
        objective: Objective = "classification",
        kept_tokens: int | None = None,
        portions: Sequence[Portion] = (),
        claim_slots: bool = True,
        spare_slots: int = 0,
        start: PeftAdapter | None = None,
    ):
        spec.require_agreement(config)
        require_tuning(handle.model_config, config.tuning)
        self.handle = handle
        self.config = config
        self._virtual_tokens = spec.virtual_tokens
        self.objective: Objective = config.objective or objective
        self.planner = Planner(config.tuning, spec.invocation)
        self.train_plans = self.plan(train_dataset)
        self.eval_plans = self.plan(eval_dataset)
        (_, initial), *later = portions or [Portion(0, len(self.train_plans))]
        if initial + sum(added for _, added in later) != len(self.train_plans):
            raise ConfigError(
                "portions",
                list(map(tuple, portions)),
                f"{len(self.train_plans)} examples, as many as there are, in all",
            )
        self.max_steps = config.steps_for(initial)
        kept_tokens = handle.kv_capacity // 2 if kept_tokens is None else kept_tokens
        window = window_of(handle, config, self.train_plans, kept_tokens)
        self.stream = BatchStream(initial, config.train_batch_size, config.seed, window, config.echoes)
        for first_step, added in later:
            self.stream.extend(first_step, added)
        self.trainable, self.points, largest = trained(handle, config, spec, start, spare_slots)
        self.scorer = Scorer(handle, self.planner.scope, config.max_tokens_per_batch, config.prefix_reuse, kept_tokens)
        self.window = PrefixWindow(handle, config, self.scorer, self.stream)
        self.optimizer = Optimizer(self.trainable.theta, self.trainable.shapes, config.update_rule, largest)
        self.probe = Probe(handle, config, self.objective, self.optimizer, self.points, self.scorer)
        if claim_slots:
            self.points.claim()
        self.slot_dtype = handle.model_runner.dtype
        self.memory: MemoryMeter | None = None
        self.global_step = 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """In which the memory that is taken counts for a phase, where there is a meter."""
        return nullcontext() if self.memory is None else self.memory.phase(name)

    # --- steps --------------------------------------------------------------------------------------------------------

    def step_passes(self, batch: Sequence[ExamplePlan]) -> Passes[StepResult]:
        """One step of algorithm 1 on a batch. Of z only the seed outlives it; theta moves in the last piece."""
        self.window.enter(self.global_step)
        zo_random_seed = step_seed(self.config.seed, self.global_step, self.config.perturbation_interval)
        directions = self.probe.directions(zo_random_seed)
        losses, baselines = yield from self.probe.loss_passes(batch, directions, self.config.zo_eps)
        self._require_finite(losses + baselines)
        projected_grad = list(map(self._clip, self.probe.estimate(losses, baselines, self.config.zo_eps)))
        learning_rate = self._learning_rate()
        self.optimizer.step(directions, projected_grad, learning_rate)
        result = StepResult(
            self.global_step, zo_random_seed, learning_rate, tuple(losses), tuple(baselines), tuple(projected_grad)
        )
        self.global_step += 1
        return result

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

    def lost_perturbations(self, zo_random_seed: int) -> float:
        """Share of parameters, as far as the first of them tell, for which theta + eps z and theta - eps z round to the
        same number in the engine's dtype."""
        directions, theta = self.probe.directions(zo_random_seed), self.trainable.theta[:_LOOKED_AT]
        plus, minus = (
            directions.add(0, sign * self.config.zo_eps, theta, torch.empty_like(theta)).to(self.slot_dtype)
            for sign in (1, -1)
        )
        return (plus == minus).float().mean().item()

    def require_same_on_ranks(self) -> None:
        """Raise RankError, on every rank, where theta is not the same on all of them."""
        if self.handle.num_ranks == 1:
            return
        sums = self.handle.gather(zlib.crc32(self.trainable.theta.cpu().numpy().data))
        for rank, own in enumerate(sums):
            if own != sums[0]:
                raise RankError(rank, None)

    def _require_finite(self, losses: Sequence[float]) -> None:
        if not all(map(math.isfinite, losses)):
            raise DivergedError(f"the losses of step {self.global_step} are {losses}: lower learning_rate or zo_eps")

    def _clip(self, projected_grad: float) -> float:
        """Bound the estimate, and round it to what the seed log keeps, so that a replay takes the same step."""
        bound = self.config.clip_projected_grad
        if bound is not None:
            projected_grad = max(-bound, min(bound, projected_grad))
        try:
            return to_logged_float32(projected_grad)
        except OverflowError:
            raise DivergedError(
                f"the projected gradient of step {self.global_step} is {projected_grad}: lower learning_rate or zo_eps"
            ) from None

    def _learning_rate(self) -> float:
        return learning_rate_at(
            self.global_step,
            learning_rate=self.config.learning_rate,
            lr_scheduler_type=self.config.lr_scheduler_type,
            warmup_steps=self.config.warmup_steps_of(self.max_steps),
            max_steps=self.max_steps,
        )

    # --- examples -----------------------------------------------------------------------------------------------------

    def plan(self, examples: Sequence[Example]) -> list[ExamplePlan]:
        """How the examples are scored; raises ConfigError or DataError for one that this run cannot score."""
        if any((example.mask is None) != self.handle.is_causal for example in examples):
            raise DataError("an example names its mask where the model is a masked language model, and only there")
        plans = [self.planner.plan(example) for example in examples]
        require_usable(plans, self.config, self.objective, self.handle.context_length - self._virtual_tokens)
        return plans

    def batch(self, step: int) -> list[ExamplePlan]:
        """The planned examples of ``step``."""
        return [self.train_plans[i] for i in self.stream.batch(step)]

    def extend(self, examples: Sequence[Example], record: Callable[[], None] = lambda: None) -> int:
        """Add training examples; returns the first step that draws from them, the one after the step in progress.

        It is later where examples that were added before count from later on. ``max_steps`` stays as it is. Where
        ``record``, which is called once they are added, raises, they are not.
        """
        plans = self.plan(examples)
        totals, before = list(self.stream.totals), len(self.train_plans)
        first_step = max(self.global_step + 1, totals[-1][0])
        self.stream.extend(first_step, len(plans))
        self.train_plans += plans
        try:
            record()
        except Exception:
            self.stream.totals = totals
            del self.train_plans[before:]
            raise
        return first_step

    def evaluation_passes(self, plans: Sequence[ExamplePlan] | None = None) -> Passes[dict[str, float]]:
        """``eval_loss`` and ``eval_accuracy`` of what is trained as it is, on the development set or on ``plans``."""
        self.points.write_current()
        plans = self.eval_plans if plans is None else plans
        metrics = yield from evaluation_passes(
            self.scorer, plans, self.points.current, self.objective, self.config.per_device_eval_batch_size
        )
        return {f"eval_{name}": value for name, value in self.handle.broadcast(metrics).items()}

    def prefix_passes(self) -> Passes[None]:
        """Have the prefixes in the tree that a run has there that has come to this step by itself."""
        return self.window.restore(self.global_step, self.train_plans, self.eval_plans, self.points)

    def trained_tokens(self) -> int:
        """Tokens of the examples drawn so far; a prompt counts once for each of its options that has a row of its
        own."""
        lengths = (sum(len(row.prefix) + len(row.suffix) for row in plan.rows) for plan in self.train_plans)
        return sum(length * draws for length, draws in zip(lengths, self.stream.draws(self.global_step)))

    def close(self) -> None:
        """Give slots and locks back to the engine, the ones even if the others fail."""
        with ExitStack() as stack:
            stack.callback(self.points.release)
            stack.callback(self.scorer.base_prefixes.release)
