"""Where copies of what is trained lie in an engine, perturbed or not, and how rows run under one of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sglang.srt.mezo.core.directions import Directions
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.core.trainable import Trainable


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


class PackedPoints(ABC):
    """The points of which an engine holds many: theta itself first, then those of ``width`` directions at a time.

    Args:
        scratch: float32 [numel], where a point's numbers are formed before they are written.
    """

    def __init__(self, trainable: Trainable, estimator: Estimator, width: int, scratch: torch.Tensor):
        self.width = width
        self._trainable = trainable
        self._signs = SIGNS[estimator]
        self._with_theta = estimator == "one_sided"
        self._scratch = scratch
        self._points: list[Point] = []

    @property
    def count(self) -> int:
        """Of all points that are held at the same time."""
        return 1 + self.width * len(self._signs)

    @property
    def current(self) -> Point:
        return self._points[0]

    def of_direction(self, place: int) -> PointGroup:
        """Those of the direction at ``place``, from 0 to below ``width``, one for each of the estimator's ``SIGNS``."""
        first = 1 + place * len(self._signs)
        return tuple(self._points[first : first + len(self._signs)])

    def write_current(self) -> None:
        self.write(0, self._trainable.theta)

    def rounds(self, directions: int) -> list[Round]:
        """One for as many directions as there is room for. One-sided, theta comes before the first direction."""
        firsts = range(0, directions, self.width)
        return [self._round(first, min(first + self.width, directions)) for first in firsts]

    def _round(self, first: int, end: int) -> Round:
        with_theta = first == 0 and self._with_theta

        def fill(directions: Directions, zo_eps: float) -> Iterator[None]:
            if with_theta:
                self.write_current()
            for place, k in enumerate(range(first, end)):
                for number, sign in enumerate(self._signs, 1 + place * len(self._signs)):
                    self.write(number, directions.add(k, sign * zo_eps, self._trainable.theta, self._scratch))
                yield

        groups = [self.of_direction(place) for place in range(end - first)]
        return Round([*([(self.current,)] if with_theta else []), *groups], fill)

    @abstractmethod
    def write(self, number: int, theta: torch.Tensor) -> None:
        """Put numbers, float32 [numel], where the ``number``-th point has them, rounded once to the engine's dtype."""
