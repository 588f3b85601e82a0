"""What the study compares."""

from dataclasses import dataclass
from typing import Any

from sglang.srt.mezo.core.config import MezoConfig
from subsets import Moved, b_alone, last_layer, middle_layer

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """Settings, the learning rates to choose from, the steps of a run, and which matrices they move."""

    settings: dict[str, Any]
    rates: tuple[float, ...]
    steps: int
    moved: Moved | None = None


TWO_POINT = {
    "estimator": "two_sided",
    "num_perturbations": 1,
    "perturbation": "gaussian",
    "scale_by_loss_std": False,
    "zo_eps": 3e-3,
}
TWO_SIDED = {"estimator": "two_sided"}
ONE_SIDED = {"estimator": "one_sided", "zo_eps": 5e-4}  # beside theta a long step sees the curvature
UNSCALED = {"scale_by_loss_std": False}
VARIANTS = {
    PLAIN: Variant(TWO_POINT, (5e-4, 1e-3, 2e-3, 4e-3), 2000),
    "default": Variant({}, (MezoConfig().learning_rate,), 500),
    "two-sided": Variant(TWO_SIDED, (MezoConfig().learning_rate,), 250),
    "two-sided, unscaled": Variant({**TWO_SIDED, **UNSCALED}, (1e-2, 1.6e-2, 2e-2), 250),
    "one-sided": Variant(ONE_SIDED, (1e-2, 2e-2, 3e-2), 250),
    "one-sided, unscaled": Variant({**ONE_SIDED, **UNSCALED}, (1.6e-2, 2.4e-2, 3.2e-2), 250),
    "low rank": Variant({**TWO_POINT, "perturbation_rank": 1, "perturbation_interval": 50}, (1e-3, 2e-3, 4e-3), 2000),
    "momentum": Variant({**TWO_POINT, "momentum": 0.9}, (1e-4, 2e-4, 4e-4), 2000),
    "adamw": Variant({**TWO_POINT, "optim": "adamw"}, (3e-4, 1e-3, 3e-3), 2000),
    "16 directions": Variant({"num_perturbations": 16}, (2e-2, 3e-2, 4e-2), 250),
    "32 directions": Variant({"num_perturbations": 32}, (2e-2, 4e-2, 8e-2), 125),
    "64 directions": Variant({"num_perturbations": 64}, (4e-2, 8e-2, 1.6e-1), 62),
    "r = 32": Variant({"r": 32, "lora_alpha": 64}, (1e-2, 1.4e-2, 2e-2), 500),
    "B alone": Variant({}, (2e-2, 3e-2, 4e-2), 500, b_alone),
    "last layer": Variant({}, (4e-2, 1e-1, 2e-1), 500, last_layer),
    "middle layer": Variant({}, (4e-2, 1e-1, 2e-1), 500, middle_layer),
}
"""``default`` is what ``MezoConfig`` does by itself, its learning rate included; the others say what they change."""
