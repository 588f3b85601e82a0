"""Where copies of what is trained lie in an engine, perturbed or not, and how rows run under one of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sglang.srt.mezo.core.directions import Directions


@dataclass(frozen=True, eq=False)
class Point:
    """A copy of what is trained. Rows under one point have the same KV where they begin alike; those of two have not.

    Attributes:
        adapter: its id in SGLang's LoRA pool, None for none.
        cached: int64 [tokens], places in the KV pool of what comes before every row.
        shift: what is added to the positions that rows have behind that.
    """

    adapter: str | None = None
    cached: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    shift: int = 0


BASE = Point()
"""The engine's model as it is, without an adapter."""

PointGroup = tuple[Point, ...]
"""Points that are scored in the same pass, as their losses are compared: both signs of a direction, or one alone."""

Fill = Callable[[Directions, float], Iterator[None]]


@dataclass(frozen=True)
class Round:
    """Points that an engine holds at the same time.

    Attributes:
        groups: in the order in which estimators take the losses.
        fill: of the step's directions and zo_eps: puts the points' numbers where they lie, a piece at a time.
    """

    groups: list[PointGroup]
    fill: Fill


class Points(Protocol):
    """The points of a run's steps."""

    @property
    def current(self) -> Point:
        """Theta itself, once ``write_current`` has put it there."""
        ...

    def write_current(self) -> None: ...

    def rounds(self, directions: int) -> list[Round]:
        """Of a step with so many directions, one after the other; each point at which the estimator needs the loss
        comes once."""
        ...

    @property
    def slots(self) -> int:
        """Adapters of SGLang's LoRA pool that they are."""
        ...

    @property
    def tokens(self) -> int:
        """Places of the KV pool that they are."""
        ...

    @property
    def claimed(self) -> bool:
        """Whether the engine has given the room for them."""
        ...

    def claim(self) -> None: ...

    def release(self) -> None:
        """Give the room back."""
        ...
