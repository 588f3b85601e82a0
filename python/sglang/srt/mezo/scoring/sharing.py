"""Beginnings that rows have in common, to be run once: a template, a passage in it, the prompt of several options.

A forward pass writes the KV of all its tokens, layer by layer, before it attends to it. So a row can follow on tokens
that another row of the same pass runs: its first tokens are then that row's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.mezo.core.tokens import common_length


@dataclass(frozen=True)
class SharedPrefix:
    """What a row does not run itself: its first ``length`` tokens are those of ``row``, None where it runs them all."""

    row: int | None
    length: int


def plan_shared_prefixes(rows: Sequence[Sequence[int]], groups: Sequence[int]) -> dict[int, SharedPrefix]:
    """Decide what each row borrows, so that a token that rows of a group have in common runs once. No row borrows all
    it has.

    Args:
        rows: the tokens of each row.
        groups: rows share with those of the same group only.

    Returns:
        row -> what it borrows, every row after the one that it borrows from, and the groups one after the other.
    """
    borrowed: dict[int, SharedPrefix] = {}
    before = None
    for row in sorted(range(len(rows)), key=lambda row: (groups[row], rows[row])):
        # In this order no earlier row has more in common with a row than the one before it.
        length = (
            0
            if before is None or groups[before] != groups[row]
            else min(common_length(rows[before], rows[row]), len(rows[row]) - 1)
        )
        borrowed[row] = SharedPrefix(before if length else None, length)
        before = row
    return borrowed


def tokens_run(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that rows of one group run."""
    return sum(map(len, rows)) - sum(one.length for one in plan_shared_prefixes(rows, [0] * len(rows)).values())
