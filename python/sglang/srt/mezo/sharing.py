"""Beginnings that rows of one slot have in common, to be run once for all of them.

Rows are laid into a tree of beginnings (a template, a passage in it, a question to it), cut where it branches. Beginnings of
one level run in one forward pass, after the level above. A level costs a pass, so it must save enough tokens.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHORTEST = 4  # tokens of a beginning; of random texts many begin with the same word
PASS_COST = 64
"""Tokens that a forward pass costs beside those it runs, as weights are read once more."""


@dataclass(frozen=True)
class Node:
    """A piece of text that runs once for the rows of a group; it follows on ``parent``, a node's number, or on nothing."""

    group: int
    parent: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Sharing:
    """How rows are run.

    Attributes:
        nodes: parents before children.
        levels: numbers of the nodes that run in each pass.
        rows: for every row the node that its own tokens follow on, and the position of the first of them.
    """

    nodes: tuple[Node, ...]
    levels: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int | None, int], ...]


@dataclass(eq=False)
class _Open:
    """A node in the making: tokens start..end of row ``row``, which ``count`` rows share."""

    parent: "_Open | None"
    row: int
    start: int
    end: int
    count: int

    @property
    def saved(self) -> int:
        return (self.count - 1) * (self.end - self.start)


def share(rows: Sequence[Sequence[int]], limits: Sequence[int], groups: Sequence[int]) -> Sharing:
    """Decide what the rows share.

    Args:
        rows: the tokens of each row.
        limits: how many of a row's first tokens may run apart from it: less than all of them.
        groups: rows share with those of the same group only.
    """
    order = sorted(range(len(rows)), key=lambda row: (groups[row], rows[row][: limits[row]]))
    heads = [rows[row][: limits[row]] for row in order]
    common = [common_length(a, b) for a, b in zip(heads, heads[1:])]
    starts = [0, *(i for i in range(1, len(order)) if groups[order[i]] != groups[order[i - 1]]), len(order)]
    nodes, parents = _tree(order, common, list(zip(starts, starts[1:])))
    nodes, parents = _worth_a_pass(nodes, parents)
    numbers: dict[_Open | None, int | None] = {None: None} | {node: number for number, node in enumerate(nodes)}
    return Sharing(
        nodes=tuple(Node(groups[node.row], numbers[node.parent], rows[node.row][node.start : node.end]) for node in nodes),
        levels=tuple(tuple(numbers[node] for node in level) for level in _levels(nodes)),
        rows=tuple((numbers[node], node.end if node else 0) for node in map(parents.__getitem__, range(len(rows)))),
    )


def tokens_run(rows: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Tokens that rows of one slot take by themselves."""
    sharing = share(rows, limits, [0] * len(rows))
    rests = (len(row) - start for row, (_, start) in zip(rows, sharing.rows))
    return sum(len(node.tokens) for node in sharing.nodes) + sum(rests)


def distinct_tokens(texts: Iterable[tuple[int, ...]]) -> int:
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


def _tree(
    order: Sequence[int], common: Sequence[int], groups: Sequence[tuple[int, int]]
) -> tuple[list[_Open], dict[int, _Open | None]]:
    """All nodes that are long enough, parents first, and the last node above every row.

    Args:
        order: rows, sorted by group and tokens.
        common: how much each row of the order has in common with the next one.
        groups: start and end of each group in the order.
    """
    nodes, parents = [], {}
    ranges: list[tuple[int, int, _Open | None]] = [(low, high, None) for low, high in groups]
    while ranges:
        low, high, parent = ranges.pop()
        if high - low == 1:
            parents[order[low]] = parent
            continue
        start, end = 0 if parent is None else parent.end, min(common[low : high - 1])
        if end - start >= _SHORTEST:
            parent = _Open(parent, order[low], start, end, high - low)
            nodes.append(parent)
        cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] == end), high]
        ranges += [(first, last, parent) for first, last in zip(cuts, cuts[1:])]
    return nodes, parents


def _worth_a_pass(nodes: list[_Open], parents: dict[int, _Open | None]) -> tuple[list[_Open], dict[int, _Open | None]]:
    """Drop levels that save too little: what was shared there runs with what follows it."""
    level = 0
    while len(levels := _levels(nodes)) > level:
        dropped = levels[level]
        if sum(node.saved for node in dropped) >= PASS_COST:
            level += 1
            continue
        nodes = [node for node in nodes if node not in dropped]
        for node in nodes:
            if node.parent in dropped:
                node.start, node.parent = node.parent.start, node.parent.parent
        parents = {row: node.parent if node in dropped else node for row, node in parents.items()}
    return nodes, parents


def _levels(nodes: list[_Open]) -> list[list[_Open]]:
    """Nodes by their distance from the start; parents come first in ``nodes``."""
    level_of: dict[_Open | None, int] = {None: -1}
    levels: list[list[_Open]] = []
    for node in nodes:
        level_of[node] = level_of[node.parent] + 1
        if level_of[node] == len(levels):
            levels.append([])
        levels[level_of[node]].append(node)
    return levels
