"""Sequences of token ids, and what they begin with in common."""

import itertools
from collections.abc import Iterable, Sequence

Tokens = tuple[int, ...]


def distinct_tokens(texts: Iterable[Tokens]) -> int:
    """Tokens of a tree of all texts: what several begin with counts once."""
    ordered = sorted(texts)
    return sum(map(len, ordered)) - sum(common_length(a, b) for a, b in itertools.pairwise(ordered))


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, by comparing slices: they are long, and Python is slow."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
