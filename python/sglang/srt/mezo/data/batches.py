"""Which examples each step sees: a pure function of the step, so that a resumed run sees what the whole run would
have seen."""

from functools import lru_cache
from typing import NamedTuple

import torch

from sglang.srt.mezo.core.noise import step_seed


class Portion(NamedTuple):
    """Training examples that count from a step on."""

    first_step: int
    examples: int


class BatchStream:
    """Batches of a seeded order of the examples: step t takes places [t B, (t + 1) B).

    Where a ``window`` is given, the order goes through windows of so many examples, each ``echoes`` times, before the
    next (data echoing, arXiv 1907.05550): what is kept for an example is then made once for many steps. Examples that
    are added start such an order anew, over all examples, at the step from which they count.

    Args:
        window: examples in a window; all of them by default.
        echoes: passes over a window that does not hold all examples.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, window: int | None = None, echoes: int = 1):
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.totals = [(0, num_examples)]
        """(first step, number of examples drawn from), in the order of the steps."""
        self._echoes = echoes

    @property
    def portions(self) -> list[Portion]:
        """What ``extend`` was called with, after what was there from the start."""
        counts = [0, *(count for _, count in self.totals)]
        return [Portion(first_step, count - before) for (first_step, count), before in zip(self.totals, counts)]

    def extend(self, first_step: int, added: int) -> None:
        """Draw from ``added`` more examples from ``first_step`` on, which must not lie before an earlier extension."""
        last_step, num_examples = self.totals[-1]
        assert first_step >= last_step
        if first_step == last_step:
            self.totals.pop()
        self.totals.append((first_step, num_examples + added))

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of ``step``."""
        stage = self._stage_of(step)
        first = (step - self.totals[stage][0]) * self.batch_size
        order = self._order(stage)
        return [order.example(place) for place in range(first, first + self.batch_size)]

    def window_of(self, step: int) -> tuple[int, int, int] | None:
        """A name for the window that ``step`` begins in; None where there is one window only."""
        stage = self._stage_of(step)
        order = self._order(stage)
        if order.window == order.count:
            return None
        cycle, window, _, _ = order.locate((step - self.totals[stage][0]) * self.batch_size)
        return stage, cycle, window

    def epoch(self, step: int) -> float:
        """Passes over the examples before ``step``."""
        return sum(places / count for places, (_, count) in zip(self._places(step), self.totals))

    def draws(self, step: int) -> list[int]:
        """How often each example is drawn before ``step``."""
        draws = [0] * self.totals[-1][1]
        for stage, places in enumerate(self._places(step)):
            for index, count in enumerate(self._order(stage).draws(places)):
                draws[index] += count
        return draws

    def first_epochs(self, step: int) -> list[int]:
        """Steps before ``step`` in which an example may have come for the first time: an epoch from each start of
        the order."""
        starts = [first_step for first_step, _ in self.totals] + [step]
        lengths = [-(-self._order(stage).cycle // self.batch_size) for stage in range(len(self.totals))]
        spans = ((start, min(start + length, end, step)) for start, length, end in zip(starts, lengths, starts[1:]))
        return [earlier for start, end in spans for earlier in range(start, end)]

    def _places(self, step: int) -> list[int]:
        """Examples drawn before ``step`` in each stage."""
        ends = [first_step for first_step, _ in self.totals[1:]] + [step]
        return [
            max(0, min(end, step) - first_step) * self.batch_size for (first_step, _), end in zip(self.totals, ends)
        ]

    def _stage_of(self, step: int) -> int:
        return max(index for index, (first_step, _) in enumerate(self.totals) if first_step <= step)

    def _order(self, stage: int) -> "_Order":
        count = self.totals[stage][1]
        if self.window is None or self.window >= count:
            return _Order(count, count, 1, self.seed, stage)
        return _Order(count, self.window, self._echoes, self.seed, stage)


class _Order(NamedTuple):
    """An endless order of ``count`` examples. A cycle is one shuffled pass over the windows, ``echoes`` times each."""

    count: int
    window: int
    echoes: int
    seed: int
    stage: int

    @property
    def cycle(self) -> int:
        return self.count * self.echoes

    def locate(self, place: int) -> tuple[int, int, int, int]:
        """(cycle, window in it, echo of the window, position in the echo)."""
        cycle, at = divmod(place, self.cycle)
        window, at = divmod(at, self.window * self.echoes)
        return cycle, window, *divmod(at, self._size(window))

    def example(self, place: int) -> int:
        cycle, window, echo, position = self.locate(place)
        return _echo(self, cycle, window, echo)[position]

    def draws(self, places: int) -> list[int]:
        """How often each example comes in the first ``places``."""
        cycle, window, echo, position = self.locate(places)
        draws = [cycle * self.echoes] * self.count
        for earlier in range(window):
            for example in self.examples(cycle, earlier):
                draws[example] += self.echoes
        for example in self.examples(cycle, window):
            draws[example] += echo
        for example in _echo(self, cycle, window, echo)[:position]:
            draws[example] += 1
        return draws

    def _size(self, window: int) -> int:
        return min(self.window, self.count - window * self.window)

    def examples(self, cycle: int, window: int) -> list[int]:
        return self.shuffled(self.count, cycle)[window * self.window : (window + 1) * self.window]

    def shuffled(self, count: int, cycle: int, window: int = 0, echo: int = 0) -> list[int]:
        seed = step_seed(self.seed, self.stage << 160 | cycle << 96 | window << 48 | echo)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed >> 1)).tolist()


@lru_cache(maxsize=8)
def _echo(order: _Order, cycle: int, window: int, echo: int) -> list[int]:
    """The examples of a window in the order of one echo; the first is as shuffled as the cycle."""
    examples = order.examples(cycle, window)
    return [examples[i] for i in order.shuffled(len(examples), cycle, window, echo)] if echo else examples
