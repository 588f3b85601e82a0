"""Completions that the model itself writes at several points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.core.errors import DivergedError
from sglang.srt.mezo.core.noise import sample_uniform
from sglang.srt.mezo.core.objective import Generation
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.forward import Sequenced, extend_into
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.held_places import HeldPlaces, keeps_keys
from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.engine.points import PointGroup
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.scorer import Item, Ran, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Completions:
    """When a completion is over, and what it says.

    Args:
        tokenizer: the model's.
        ends: tokens that end a text beside the tokenizer's own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", generation: Generation, ends: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._generation = generation
        end: Any = tokenizer.eos_token_id
        self._ends = {*ends, end}

    def is_over(self, tokens: list[int]) -> bool:
        stop = self._generation.stop
        return (
            len(tokens) == self._generation.max_new_tokens
            or tokens[-1] in self._ends
            or (stop is not None and stop in self._tokenizer.decode(tokens))
        )

    def text(self, tokens: list[int]) -> str:
        """Without what ends it."""
        tokens = tokens[:-1] if tokens[-1] in self._ends else tokens
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return text if self._generation.stop is None else text.partition(self._generation.stop)[0]


class Generator:
    """Writes on after planned rows, on what the scorer shares between them.

    All rows that fit into one pass go on together, a token a pass. Their KV lies in places of the pool that stay ours
    from pass to pass, and for the rows after them, until ``release``.
    """

    def __init__(self, handle: EngineHandle, scorer: Scorer, generation: Generation, completions: Completions):
        self._handle = handle
        self._scorer = scorer
        self._generation = generation
        self._completions = completions
        self._held: HeldPlaces | None = None
        tree = handle.tree_cache
        self._may_pause = tree.supports_prefix_sharing() and keeps_keys(tree)

    @property
    def held_tokens(self) -> int:
        """Places of the pool that are ours now."""
        return len(self._held.places) if self._held is not None and self._held.is_valid else 0

    def release(self) -> None:
        """Give the places back; what is being written is lost."""
        held, self._held = self._held, None
        if held is not None and held.is_valid:
            held.release()

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[list[list[str]]]:
        """A completion of every plan at every point, a forward pass of at most the scorer's ``max_tokens`` at a time;
        where no places can stay ours, all completions of some rows at a time.

        Args:
            seed: of what is drawn: the ``k``-th plan's completion is drawn by the same numbers at all points.
            keep: base-model prefixes may stay locked afterwards.

        Returns:
            Points, in the order of ``groups``, and in each the texts of the plans.
        """
        texts = [[""] * len(plans) for group in groups for _ in group]
        for items in self._scorer.batches(plans, groups, self._generation.max_new_tokens):
            yield from self._scorer.prepare(items)
            places = self._places(self._scorer.tokens_of(items, self._generation.max_new_tokens))
            with self._scorer.running(items, keep, places) as ran:
                written = yield from self._write(items, ran, places[len(ran.kv_indices) :], seed)
            for item, tokens in zip(items, written):
                texts[item.number][item.plan] = self._completions.text(tokens)
            if not self._may_pause:
                self.release()
            yield
        return texts

    def _places(self, count: int) -> torch.Tensor:
        """So many of ours."""
        if self._held is None or self.held_tokens < count:
            self.release()
            self._held = HeldPlaces(self._handle, count)
        return self._held.places[:count]

    def _write(self, items: Sequence[Item], ran: Ran, free: torch.Tensor, seed: int) -> Passes[list[list[int]]]:
        """The tokens that each item goes on with; their KV goes to free places."""
        places = ran.places()
        written: list[list[int]] = [[] for _ in items]
        self._require_finite(ran.hidden)
        last = [ran.rows[number][-1] for number in range(len(items))]
        going = self._go_on(range(len(items)), items, written, ran.hidden[last], seed)
        while going:
            if self._may_pause:
                yield
            few, going = going[: self._scorer.max_tokens], going[self._scorer.max_tokens :]
            new, free = free[: len(few)], free[len(few) :]
            hidden = extend_into(self._handle, [_after(items[one], places[one], written[one]) for one in few], new)
            self._require_finite(hidden, new)
            for one, place in zip(few, new.split(1)):
                places[one] = torch.cat((places[one], place))
            going += self._go_on(few, items, written, hidden, seed)
        return written

    def _require_finite(self, hidden: torch.Tensor, places: torch.Tensor | None = None) -> None:
        """What a point that has diverged has left in ``places`` is erased."""
        if hidden.isfinite().all():
            return
        if places is not None:
            erase(self._handle.kv_allocator.get_kvcache(), places)
        raise DivergedError(
            "what the model computes at a point is infinite or not a number: lower learning_rate or zo_eps"
        )

    def _go_on(
        self, few: Sequence[int], items: Sequence[Item], written: list[list[int]], hidden: torch.Tensor, seed: int
    ) -> list[int]:
        """Append the token after each row of ``hidden`` to what a few of the items have written; returns those that
        are not over."""
        tokens = self._next(hidden, seed, [(items[one].plan, len(written[one])) for one in few])
        for one, token in zip(few, tokens):
            written[one].append(token)
        return [one for one in few if not self._completions.is_over(written[one])]

    def _next(self, hidden: torch.Tensor, seed: int, drawn: Sequence[tuple[int, int]]) -> list[int]:
        """The tokens after the rows of ``hidden``; ``drawn`` has the number of each text, and of its token."""
        temperature = self._generation.temperature
        uniform = [sample_uniform(seed, *one) for one in drawn] if temperature else [0.0] * len(drawn)
        with torch.inference_mode():
            tokens = self._scorer.head.next_tokens(
                hidden,
                torch.arange(len(hidden), device=hidden.device),
                temperature,
                torch.tensor(uniform, dtype=torch.float64),
            )
        return self._handle.broadcast(tokens.tolist())


def _after(item: Item, places: torch.Tensor, written: Sequence[int]) -> Sequenced:
    """The last token that was written, behind all others."""
    return Sequenced(places, tuple(written[-1:]), ((item.point.adapter, 1),), shift=item.point.shift)
