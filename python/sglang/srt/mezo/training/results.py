"""What a step and a run come to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """One step. Every tuple has one entry per direction; loss_minus is the baseline that loss_plus is compared with."""

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
