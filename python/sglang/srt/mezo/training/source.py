"""Where the examples of each step come from: all of them at hand and drawn, or a stream that is read on.

Either way they are a pure function of the step, so that a resumed run sees what the whole run would have seen.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.batches import BatchStream, Portion
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.streams import ExampleStream
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.scoring.plan import ExamplePlan, digest_of_plans


class Source(Protocol):
    """Training examples, as a run sees them.

    Attributes:
        max_steps: where the run ends.
    """

    max_steps: int

    @property
    def window(self) -> int | None:
        """Examples whose prefixes are kept at a time, by which the order of them goes; None where nothing is given up
        for others."""
        ...

    @window.setter
    def window(self, window: int | None) -> None: ...

    @property
    def plans(self) -> Sequence[ExamplePlan]:
        """Those that are in memory for the whole run."""
        ...

    def batch(self, step: int) -> list[ExamplePlan]:
        """The examples of ``step``, on every rank."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the examples before ``step``."""
        ...

    def window_of(self, step: int) -> object:
        """A name for the window that ``step`` begins in; None where there is one only."""
        ...

    def first_batches(self, steps: int) -> Iterator[list[ExamplePlan]]:
        """Batches before step ``steps`` in which an example may have come for the first time."""
        ...

    def seen(self) -> Any:
        """What a run that goes on must find again, as JSON has it."""
        ...

    def is_same(self, seen: Any) -> bool:
        """Whether the examples are those that an earlier ``seen`` is of."""
        ...


class DrawnSource:
    """Examples that are all at hand, in the order of a ``BatchStream``.

    Args:
        portions: of the plans in their order, where some count from a later step on.

    Raises:
        ConfigError: ``portions`` are of another number of examples.
    """

    def __init__(
        self, plans: list[ExamplePlan], config: MezoConfig, portions: Sequence[Portion] = (), window: int | None = None
    ):
        (_, initial), *later = portions or [Portion(0, len(plans))]
        if initial + sum(added for _, added in later) != len(plans):
            raise ConfigError(
                "portions", list(map(tuple, portions)), f"{len(plans)} examples, as many as there are, in all"
            )
        self.plans = plans
        self.max_steps = config.steps_for(initial)
        self.stream = BatchStream(initial, config.train_batch_size, config.seed, window, config.echoes)
        for first_step, added in later:
            self.stream.extend(first_step, added)
        self._seen: list[list[Any]] = []

    @property
    def window(self) -> int | None:
        return self.stream.window

    @window.setter
    def window(self, window: int | None) -> None:
        self.stream.window = window

    def batch(self, step: int) -> list[ExamplePlan]:
        return [self.plans[i] for i in self.stream.batch(step)]

    def epoch(self, step: int) -> float:
        return self.stream.epoch(step)

    def window_of(self, step: int) -> object:
        return self.stream.window_of(step)

    def first_batches(self, steps: int) -> Iterator[list[ExamplePlan]]:
        return map(self.batch, self.stream.first_epochs(steps))

    def seen(self) -> list[list[Any]]:
        """[examples, their digest] of each part that came together."""
        new = self.plans[sum(count for count, _ in self._seen) :]
        if new:
            self._seen = [*self._seen, [len(new), digest_of_plans(new)]]
        return self._seen

    def is_same(self, seen: Any) -> bool:
        """Part by part; what came later, as a portion of its own, is new."""
        if not isinstance(seen, list):
            return False
        first = 0
        for count, digest in seen:
            if digest_of_plans(self.plans[first : first + count]) != digest:
                return False
            first += count
        if first not in [total for _, total in self.stream.totals]:
            return False
        self._seen = seen
        return True

    def extend(self, plans: Sequence[ExamplePlan], step: int, record: Callable[[], None]) -> int:
        """Add examples; returns the first step that draws from them, ``step`` or one after it. Where ``record``, which
        is called once they are added, raises, they are not."""
        totals, before = list(self.stream.totals), len(self.plans)
        first_step = max(step, totals[-1][0])
        self.stream.extend(first_step, len(plans))
        self.plans += plans
        try:
            record()
        except Exception:
            self.stream.totals = totals
            del self.plans[before:]
            raise
        return first_step

    def trained_tokens(self, step: int) -> int:
        """Tokens of the examples drawn before ``step``; a prompt counts once for each of its options that has a row of
        its own."""
        lengths = (sum(len(row.prefix) + len(row.suffix) for row in plan.rows) for plan in self.plans)
        return sum(length * draws for length, draws in zip(lengths, self.stream.draws(step)))


class StreamedSource:
    """Examples in the order of a stream, batch after batch, and again from its first where it ends. One batch is in
    memory.

    The leader reads, and the other ranks have from it what it read.

    Args:
        held_out: what a run is judged by, which a run that goes on must find again too.
        plan: what becomes of examples.

    Raises:
        ConfigError: ``max_steps`` is open.
        DataError: there is no example, or the first cannot be read.
    """

    def __init__(
        self,
        handle: EngineHandle,
        config: MezoConfig,
        stream: ExampleStream,
        held_out: Iterable[ExamplePlan],
        plan: Callable[[Sequence[Example]], list[ExamplePlan]],
    ):
        require_length(config)
        self.plans: Sequence[ExamplePlan] = ()
        self.window: int | None = None
        self.max_steps = config.max_steps
        self._handle = handle
        self._batch_size = config.train_batch_size
        self._stream = stream
        self._plan = plan
        self._held_out = digest_of_plans(held_out)
        self._examples_in_a_pass: int | None = None
        self._begin()
        self._held: tuple[int, list[ExamplePlan]] | None = None
        self.batch(0)

    def batch(self, step: int) -> list[ExamplePlan]:
        if self._held is None or self._held[0] != step:
            self._held = step, self._plan(self._handle.on_leader(self._read, step))
        return self._held[1]

    def epoch(self, step: int) -> float:
        """0 before the stream has ended for the first time, as nobody knows how long it is."""
        return 0.0 if self._examples_in_a_pass is None else step * self._batch_size / self._examples_in_a_pass

    def window_of(self, step: int) -> object:
        return None

    def first_batches(self, steps: int) -> Iterator[list[ExamplePlan]]:
        return map(self.batch, range(steps))

    def seen(self) -> dict[str, Any]:
        """How many batches were read, and the digest of them and of what is held out."""
        return {"batches": self._batches, "digest": self._digest}

    def is_same(self, seen: Any) -> bool:
        if not isinstance(seen, dict):
            return False
        self._read(seen["batches"] - 1)
        return self._digest == seen["digest"]

    def _begin(self) -> None:
        self._examples = self._endless()
        self._batches, self._digest = 0, self._held_out

    def _endless(self) -> Iterator[Example]:
        while True:
            examples = 0
            for example in self._stream:
                yield example
                examples += 1
            if not examples:
                raise DataError("there is no example in the stream to train on")
            self._examples_in_a_pass = examples

    def _read(self, step: int) -> list[Example]:
        """The examples of ``step``, by reading on, or where it lies behind, from the beginning."""
        if step < self._batches:
            self._begin()
        batch: list[Example] = []
        while self._batches <= step:
            batch = [*islice(self._examples, self._batch_size)]
            self._digest = _chained(self._digest, batch)
            self._batches += 1
        return batch


def require_length(config: MezoConfig) -> None:
    """Raise ConfigError where nothing says how far a run over a stream goes."""
    if config.max_steps < 1:
        raise ConfigError("max_steps", config.max_steps, "at least 1 beside a stream, as nobody knows how long it is")


def _chained(digest: str, batch: Sequence[Example]) -> str:
    """That of all examples up to those of ``batch``, from that of those before it."""
    whole = repr((digest, [(example.prompt, example.options, example.label) for example in batch]))
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()[:32]}"
