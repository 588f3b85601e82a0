"""Completions that the model itself writes at several points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.core.errors import DivergedError
from sglang.srt.mezo.core.noise import sample_uniform
from sglang.srt.mezo.core.objective import Generation
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.engine.forward import Sequenced, extend
from sglang.srt.mezo.engine.handle import EngineHandle
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

    All rows that fit into one pass go on together, a token a pass; the KV of what they have written is held until they
    are over.
    """

    def __init__(self, handle: EngineHandle, scorer: Scorer, generation: Generation, completions: Completions):
        self._handle = handle
        self._scorer = scorer
        self._generation = generation
        self._completions = completions

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[list[list[str]]]:
        """A completion of every plan at every point.

        Args:
            seed: of what is drawn: the ``k``-th plan's completion is drawn by the same numbers at all points.
            keep: base-model prefixes may stay locked afterwards.

        Returns:
            Points, in the order of ``groups``, and in each the texts of the plans.
        """
        texts = [[""] * len(plans) for group in groups for _ in group]
        for items in self._scorer.batches(plans, groups, self._generation.max_new_tokens):
            yield from self._scorer.prepare(items)
            with self._scorer.running(items, keep, self._generation.max_new_tokens) as ran:
                written = self._write(items, ran, seed)
            for item, tokens in zip(items, written):
                texts[item.number][item.plan] = self._completions.text(tokens)
            yield
        return texts

    def _write(self, items: Sequence[Item], ran: Ran, seed: int) -> list[list[int]]:
        """The tokens that each item goes on with."""
        places, held = ran.places(), []
        written: list[list[int]] = [[] for _ in items]
        going, hidden = list(range(len(items))), ran.hidden
        rows = [ran.rows[one][-1] for one in going]
        try:
            while going:
                self._require_finite(hidden, held)
                drawn = [(items[one].plan, len(written[one])) for one in going]
                for one, token in zip(going, self._next(hidden, rows, seed, drawn)):
                    written[one].append(token)
                going = [one for one in going if not self._completions.is_over(written[one])]
                if going:
                    hidden, new = extend(self._handle, [_after(items[one], places[one], written[one]) for one in going])
                    held.append(new)
                    for one, place in zip(going, new.split(1)):
                        places[one] = torch.cat((places[one], place))
                    rows = list(range(len(going)))
        finally:
            if held:
                self._handle.kv_allocator.free(torch.cat(held))
        return written

    def _require_finite(self, hidden: torch.Tensor, held: Sequence[torch.Tensor]) -> None:
        if hidden.isfinite().all():
            return
        if held:  # what a point that has diverged wrote last; the scorer erases what it wrote first
            erase(self._handle.kv_allocator.get_kvcache(), held[-1])
        raise DivergedError(
            "what the model computes at a point is infinite or not a number: lower learning_rate or zo_eps"
        )

    def _next(
        self, hidden: torch.Tensor, rows: Sequence[int], seed: int, drawn: Sequence[tuple[int, int]]
    ) -> list[int]:
        """The tokens after ``rows`` of ``hidden``; ``drawn`` has the number of the text, and of its token."""
        temperature = self._generation.temperature
        uniform = [sample_uniform(seed, *one) for one in drawn] if temperature else [0.0] * len(drawn)
        with torch.inference_mode():
            tokens = self._scorer.head.next_tokens(
                hidden,
                torch.tensor(rows, device=hidden.device),
                temperature,
                torch.tensor(uniform, dtype=torch.float64),
            )
        return self._handle.broadcast(tokens.tolist())


def _after(item: Item, places: torch.Tensor, written: Sequence[int]) -> Sequenced:
    """The last token that was written, behind all others."""
    return Sequenced(places, tuple(written[-1:]), ((item.point.adapter, 1),), shift=item.point.shift)
