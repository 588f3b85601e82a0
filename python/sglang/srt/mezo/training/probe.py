"""Losses beside the adapter as it is: what a step of MeZO looks at."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import Directions
from sglang.srt.mezo.core.estimator import projected_grads, with_baselines
from sglang.srt.mezo.core.optimizer import Optimizer
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.points import Points
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.scoring.plan import ExamplePlan


@dataclass(frozen=True)
class Probe:
    """Scores batches at theta + zo_eps z; theta stays as it is."""

    handle: EngineHandle
    config: MezoConfig
    measure: Measure
    optimizer: Optimizer
    points: Points

    def directions(self, zo_random_seed: int) -> Directions:
        """Those of a step's seed, as many as a step has."""
        return self.optimizer.directions(zo_random_seed, self.config.num_perturbations)

    def loss_passes(
        self, batch: Sequence[ExamplePlan], directions: Directions, zo_eps: float, seed: int = 0
    ) -> Passes[tuple[list[float], list[float]]]:
        """Losses at theta + zo_eps z_k and what they are compared with, of as many directions in the same packed passes
        as the engine holds at a time.

        Args:
            seed: of what is drawn by chance; the same at all points.

        Returns:
            One number per direction of each, as ``with_baselines`` gives them.
        """
        losses = []
        for points in self.points.rounds(len(directions)):
            yield from points.fill(directions, zo_eps)
            measured = yield from self.measure.passes(batch, points.groups, seed)
            losses += measured.loss.mean.tolist()
        return with_baselines(self.handle.broadcast(losses), self.config.estimator)

    def passes(
        self, batch: Sequence[ExamplePlan], zo_random_seed: int, zo_eps: float
    ) -> Passes[dict[str, list[float]]]:
        """``loss_plus``, ``loss_minus`` (the baselines) and ``projected_grad`` along the directions of a seed."""
        directions = self.directions(zo_random_seed)
        losses, baselines = yield from self.loss_passes(batch, directions, zo_eps, zo_random_seed)
        return {
            "loss_plus": losses,
            "loss_minus": baselines,
            "projected_grad": self.estimate(losses, baselines, zo_eps),
        }

    def estimate(self, losses: Sequence[float], baselines: Sequence[float], zo_eps: float) -> list[float]:
        """One projected gradient for each direction, from what ``loss_passes`` returns."""
        return projected_grads(losses, baselines, zo_eps, self.config.estimator, self.config.scale_by_loss_std)
