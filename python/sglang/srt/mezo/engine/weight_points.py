"""The engine's own weights as ``Points``: there is one copy of them, so one point at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sglang.srt.mezo.adapters.weights import FullWeights, Parameter
from sglang.srt.mezo.core.directions import Directions
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.points import Fill, Point, Round
from sglang.srt.mezo.engine.weights import Piece, mark_trained

_STRETCH, _STRETCH_ON_DEVICE = 1 << 20, 1 << 26  # numbers that are formed at a time before they are cast

Form = Callable[[torch.Tensor, torch.Tensor, int], object]
"""Puts into the second vector what is to be where the first, from a number of theta on, is."""


@dataclass(frozen=True)
class _Strip:
    """Numbers that follow each other in theta from ``start`` on, and where they go.

    Attributes:
        formed: float32 [n]: the engine's own memory, or scratch.
        target: of the engine's memory, what ``source`` of the scratch is cast into; None where it was formed in place.
    """

    start: int
    formed: torch.Tensor
    target: torch.Tensor | None = None
    source: torch.Tensor | None = None


class _At(NamedTuple):
    """Where a parameter begins in theta."""

    parameter: Parameter
    offset: int


class WeightPoints:
    """Writes ``cast(theta + scale z)`` over the weights, formed in float32 and rounded once; so what was there comes
    back bit for bit.

    Args:
        pieces: where the engine has the parameters that ``weights`` trains.
    """

    def __init__(self, handle: EngineHandle, weights: FullWeights, pieces: Sequence[Piece], estimator: Estimator):
        self._handle = handle
        self._weights = weights
        self._signs = SIGNS[estimator]
        self._with_theta = estimator == "one_sided"
        self._point = Point()
        self._claimed = False
        self._strips = list(_strips(handle.device, weights, pieces))
        self._refresh = [piece.refresh for piece in pieces if piece.refresh is not None]

    @property
    def current(self) -> Point:
        return self._point

    def write_current(self) -> None:
        self._write(lambda base, out, start: out.copy_(base))

    def rounds(self, directions: int) -> list[Round]:
        """One for each point. One-sided, theta comes first."""
        fills = [self._fill(k, sign) for k in range(directions) for sign in self._signs]
        return [Round([(self._point,)], fill) for fill in [*([self._fill_current] if self._with_theta else []), *fills]]

    def _fill_current(self, directions: Directions, zo_eps: float) -> Iterator[None]:
        self.write_current()
        yield

    def _fill(self, k: int, sign: int) -> Fill:
        def fill(directions: Directions, zo_eps: float) -> Iterator[None]:
            self._write(lambda base, out, start: directions.add(k, sign * zo_eps, base, out, start))
            yield

        return fill

    @torch.inference_mode()
    def _write(self, form: Form) -> None:
        for strip in self._strips:
            form(self._weights.theta[strip.start : strip.start + strip.formed.numel()], strip.formed, strip.start)
            if strip.target is not None and strip.source is not None:
                strip.target.copy_(strip.source)
        for refresh in self._refresh:
            refresh()

    @property
    def slots(self) -> int:
        return 0

    @property
    def tokens(self) -> int:
        return 0

    @property
    def claimed(self) -> bool:
        return self._claimed

    def claim(self) -> None:
        """The weights are this run's from now on."""
        mark_trained(self._handle)
        self._claimed = True

    def release(self) -> None:
        """Leave the engine with theta."""
        if self._claimed:
            self.write_current()
            self._claimed = False


def _strips(device: torch.device, weights: FullWeights, pieces: Sequence[Piece]) -> Iterator[_Strip]:
    places, offset = {}, 0
    for parameter, view in weights.parameters():
        places[parameter.name] = _At(parameter, offset)
        offset += view.numel()
    stretch = _STRETCH if device.type == "cpu" else _STRETCH_ON_DEVICE
    columns = [_columns(places[piece.name].parameter) for piece in pieces]
    scratch = torch.empty(min(offset, max(stretch, *columns)), device=device)
    for piece in pieces:
        yield from _strips_of(piece, places[piece.name], scratch)


def _strips_of(piece: Piece, at: _At, scratch: torch.Tensor) -> Iterator[_Strip]:
    """Whole rows of the parameter at a time; where a row is cut for the ranks, what is another's is formed as well."""
    columns = _columns(at.parameter)
    view = piece.view.view(-1, columns) if piece.dim == 0 else piece.view
    start = at.offset + (piece.first * columns if piece.dim == 0 else 0)
    if view.dtype is torch.float32 and view.shape[1] == columns and view.is_contiguous():
        yield _Strip(start, view.view(-1))
        return
    first = 0 if piece.dim == 0 else piece.first
    rows = scratch.numel() // columns
    for row in range(0, len(view), rows):
        target = view[row : row + rows]
        formed = scratch[: len(target) * columns]
        source = formed.view(-1, columns)[:, first : first + view.shape[1]]
        yield _Strip(start + row * columns, formed, target, source)


def _columns(parameter: Parameter) -> int:
    """Numbers of a row along its first dimension; a vector has rows of one."""
    return parameter.numel // parameter.shape[0] if parameter.numel else 1
