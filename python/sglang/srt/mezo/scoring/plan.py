"""A score plan: which sequences a batch of examples runs, which of their tokens are a reusable prefix, what is read.

Every row of a plan is scored once per adapter slot. Where KV may be shared is decided here and nowhere else.
"""

import hashlib
import json
import marshal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from sglang.srt.mezo.core.config import Tuning
from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.invocation import invocation_start
from sglang.srt.mezo.scoring.sharing import tokens_run

_MARSHAL_FORMAT = 2  # in which equal numbers give equal bytes


class PrefixScope(Enum):
    """Between which rows the KV of a prefix is the same, exactly."""

    BASE = "base"
    """The adapter does not act on the prefix: base-model KV, shared by all slots, steps and ordinary traffic."""

    SLOT = "slot"
    """What is trained acts on every token: KV holds for the rows of one point in one pass only, which share what they
    begin with.

    Sharing it between the two signs would lose the term z . dL/dtheta of the prompt at every eps.
    """


PREFIX_SCOPE: dict[Tuning, PrefixScope] = {
    "alora": PrefixScope.BASE,
    "lora": PrefixScope.SLOT,
    "full": PrefixScope.SLOT,
    "prefix": PrefixScope.SLOT,
}


@dataclass(frozen=True)
class Row:
    """One sequence: ``prefix`` runs on the base model, ``suffix`` in every slot.

    ``reads[i] = (position, token)`` asks for the log-probability of ``token`` after ``suffix[position]``, or,
    where that is a mask, in its place.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    reads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ExamplePlan:
    """The rows of one example, and the option (counted within the example) that each read belongs to.

    Attributes:
        label: the option that is learned.
        columns: where the model itself goes on after the one row: those of the example.
        right: all options that are right; none where there is nothing to choose from.
    """

    rows: tuple[Row, ...]
    option_of_read: tuple[int, ...] = ()
    option_lengths: tuple[int, ...] = ()
    label: int = 0
    columns: Mapping[str, Any] | None = None
    right: tuple[int, ...] = ()

    @cached_property
    def slot_tokens(self) -> int:
        """Tokens that run in every slot."""
        return tokens_run([row.suffix for row in self.rows])

    @property
    def single_token_options(self) -> bool:
        return all(length == 1 for length in self.option_lengths)


def digest_of_plans(plans: Iterable[ExamplePlan]) -> str:
    """Changes with any token, reading or label of the examples, and with their order."""
    digest = hashlib.sha256()
    for plan in plans:
        rows = tuple((row.prefix, row.suffix, row.reads) for row in plan.rows)
        digest.update(marshal.dumps((rows, plan.option_lengths, plan.label), _MARSHAL_FORMAT))
        if len(plan.right) > 1:
            digest.update(marshal.dumps(plan.right, _MARSHAL_FORMAT))
        if plan.columns is not None:
            digest.update(json.dumps(plan.columns, default=str, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()[:32]}"


@dataclass(frozen=True)
class Planner:
    """Builds plans for one way of tuning.

    Attributes:
        tuning: decides the scope of prefixes.
        invocation: token ids from which an aLoRA adapter is active; empty for ordinary LoRA.
    """

    tuning: Tuning
    invocation: tuple[int, ...] = ()

    @property
    def scope(self) -> PrefixScope:
        return PREFIX_SCOPE[self.tuning]

    def plan(self, example: Example) -> ExamplePlan:
        """Options of one token each are read off one row; longer ones get a row each, which share the prompt."""
        prefix, rest = self._split(example.prompt)
        if example.columns is not None:
            return ExamplePlan((Row(prefix, rest, ()),), columns=example.columns)
        if example.mask is not None:
            rows = (Row((), rest, tuple((example.mask, option[0]) for option in example.options)),)
        elif all(len(option) == 1 for option in example.options):
            rows = (Row(prefix, rest, tuple((len(rest) - 1, option[0]) for option in example.options)),)
        else:
            rows = tuple(_option_row(prefix, rest, option) for option in example.options)
        return ExamplePlan(
            rows=rows,
            option_of_read=tuple(i for i, option in enumerate(example.options) for _ in option),
            option_lengths=tuple(map(len, example.options)),
            label=example.label,
            right=example.right or ((example.label,) if len(example.options) > 1 else ()),
        )

    def _split(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut a prompt before the first token that the adapter acts on."""
        cut = invocation_start(prompt, self.invocation) if self.scope is PrefixScope.BASE else 0
        return prompt[:cut], prompt[cut:]


def _option_row(prefix: tuple[int, ...], rest: tuple[int, ...], option: tuple[int, ...]) -> Row:
    reads = tuple((len(rest) - 1 + i, token) for i, token in enumerate(option))
    return Row(prefix, rest + option[:-1], reads)


def needs_normaliser(plans: Sequence[ExamplePlan], objective: Objective) -> bool:
    """The softmax normaliser cancels in a choice between single tokens at one position, and only there."""
    return objective == "completion" or not all(plan.single_token_options for plan in plans)
