"""MeZO on an SGLang engine: two forward passes a step, no gradient (arXiv 2305.17333, algorithm 1).

What takes long comes as ``Passes``, one forward pass at a time; ``drain`` does all of them at once.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from sglang.srt.mezo.adapters.families import require_tuning
from sglang.srt.mezo.adapters.foreign import ForeignAdapter
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError, DivergedError, RankError
from sglang.srt.mezo.core.noise import step_seed
from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.core.optimizer import Optimizer, learning_rate_at, to_logged_float32
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.data.batches import Portion
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.streams import ExampleStream
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.probe import Probe
from sglang.srt.mezo.training.results import StepResult
from sglang.srt.mezo.training.rewards import Writer, measure_of
from sglang.srt.mezo.training.source import DrawnSource, Source, StreamedSource
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
        train_dataset: tokenised examples, or a stream of them, which is read as they are needed.
        eval_dataset: tokenised examples. Without any the last adapter is kept.
        objective: what ``config.objective`` leaves open.
        kept_tokens: most KV tokens of base-model prefixes, or of points, that stay locked between steps; by default
            half of the pool.
        portions: of the training examples in their order, where a run that
            resumes was given some later; by default all count from step 0.
        claim_slots: take the slots now; or later by ``points.claim()``, where requests may need them now.
        spare_slots: adapters that the pool is to have room for besides.
        start: the adapter of ``spec`` to go on from; a new one if absent.
        writer: what it takes for an objective of completions that the model writes.

    Raises:
        ConfigError, DataError, CapacityError: before anything is written or trained.
    """

    def __init__(
        self,
        handle: EngineHandle,
        config: MezoConfig,
        spec: Spec,
        train_dataset: Sequence[Example] | ExampleStream,
        eval_dataset: Sequence[Example] = (),
        objective: Objective = "classification",
        kept_tokens: int | None = None,
        portions: Sequence[Portion] = (),
        claim_slots: bool = True,
        spare_slots: int = 0,
        start: ForeignAdapter | None = None,
        writer: Writer | None = None,
    ):
        spec.require_agreement(config)
        require_tuning(handle.model_config, config.tuning)
        self.handle = handle
        self.config = config
        self._virtual_tokens = spec.virtual_tokens
        self.objective: Objective = config.objective or objective
        self.planner = Planner(config.tuning, spec.invocation)
        self._new_tokens = config.max_new_tokens or 0
        kept_tokens = handle.kv_capacity // 2 if kept_tokens is None else kept_tokens
        self.scorer = Scorer(handle, self.planner.scope, config.max_tokens_per_batch, config.prefix_reuse, kept_tokens)
        self.eval_plans = self.plan(eval_dataset)
        if isinstance(train_dataset, Sequence):
            plans = self.plan(train_dataset)
            self.source: Source = DrawnSource(
                plans, config, portions, window_of(handle, self.scorer, plans, kept_tokens)
            )
        else:
            self.source = StreamedSource(handle, config, train_dataset, self.eval_plans, self.plan)
        self.max_steps = self.source.max_steps
        self.trainable, self.points, largest = trained(handle, config, spec, start, spare_slots, kept_tokens)
        self.window = PrefixWindow(handle, config, self.scorer, self.source)
        self.optimizer = Optimizer(self.trainable.theta, self.trainable.shapes, config.update_rule, largest)
        self.measure = measure_of(handle, self.scorer, self.objective, writer)
        self.probe = Probe(handle, config, self.measure, self.optimizer, self.points)
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
        losses, baselines = yield from self.probe.loss_passes(batch, directions, self.config.zo_eps, zo_random_seed)
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
        context = self.handle.context_length - self._virtual_tokens - self._new_tokens
        require_usable(plans, self.config, self.objective, context)
        return plans

    def batch(self, step: int) -> list[ExamplePlan]:
        """The planned examples of ``step``."""
        return self.source.batch(step)

    @property
    def drawn(self) -> DrawnSource:
        """The training examples, where all of them are at hand."""
        assert isinstance(self.source, DrawnSource)
        return self.source

    def extend(self, examples: Sequence[Example], record: Callable[[], None] = lambda: None) -> int:
        """Add training examples; returns the first step that draws from them, the one after the step in progress.

        It is later where examples that were added before count from later on. ``max_steps`` stays as it is, and
        ConfigError is raised where no step draws any more. Where ``record``, which is called once they are added,
        raises, they are not.
        """
        if self.global_step + 1 >= self.max_steps:
            raise ConfigError("rows", len(examples), f"none any more: the last of {self.max_steps} steps is under way")
        return self.drawn.extend(self.plan(examples), self.global_step + 1, record)

    def evaluation_passes(
        self, plans: Sequence[ExamplePlan] | None = None, measure: Measure | None = None
    ) -> Passes[dict[str, float]]:
        """``eval_loss``, and the scores of the objective such as ``eval_accuracy``, of what is trained as it is, on the
        development set or on ``plans``, by ``measure`` or what is trained on."""
        self.points.write_current()
        plans = self.eval_plans if plans is None else plans
        metrics = yield from evaluation_passes(
            measure or self.measure,
            plans,
            self.points.current,
            self.config.per_device_eval_batch_size,
            self.config.seed,
        )
        return {f"eval_{name}": value for name, value in self.handle.broadcast(metrics).items()}

    def prefix_passes(self) -> Passes[None]:
        """Have the prefixes in the tree that a run has there that has come to this step by itself."""
        return self.window.restore(self.global_step, self.eval_plans, self.points)

    @property
    def held_tokens(self) -> int:
        """Places of the KV pool that the step in progress holds, beside kept prefixes."""
        return self.measure.held_tokens + (self.points.tokens if self.points.claimed else 0)

    def release_places(self) -> None:
        """Give them back; the step is to begin anew."""
        self.measure.release()
        if self.points.tokens:
            self.points.release()

    def trained_tokens(self) -> int:
        """Tokens of the examples drawn so far."""
        return self.drawn.trained_tokens(self.global_step)

    def close(self) -> None:
        """Give slots and locks back to the engine, the ones even if the others fail."""
        with ExitStack() as stack:
            stack.callback(self.points.release)
            stack.callback(self.measure.release)
            stack.callback(self.scorer.base_prefixes.release)
