"""Which rows are drawn: a function of their number and a seed, the official code's where a task is named."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy
import torch

Drawn = TypeVar("Drawn")


def shuffled(rows: Sequence[Drawn], seed: int) -> list[Drawn]:
    """In the order of rows without a task."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[place] for place in order]


def permuted(rows: Sequence[Drawn], seed: int) -> list[Drawn]:
    """In the order in which the paper's code for decoders draws them (``Dataset.sample_subset``)."""
    return [rows[place] for place in numpy.random.RandomState(seed).permutation(len(rows))]


def few_of_each(
    rows: Sequence[Drawn], classes: Sequence[Hashable], k: int, seed: int
) -> tuple[list[Drawn], list[Drawn]]:
    """``k`` rows of each class to train on and the next ``k`` to choose by, fewer where a class has no more, as the
    paper's code for masked language models draws them (``generate_k_shot_data.py``)."""
    order = numpy.random.RandomState(seed).permutation(len(rows))
    of_class: dict[Hashable, list[int]] = {}
    for place in order:
        of_class.setdefault(classes[place], []).append(place)
    train, dev = ([place for own in of_class.values() for place in own[part]] for part in (slice(k), slice(k, 2 * k)))
    return [rows[place] for place in train], [rows[place] for place in dev]


def sets_of_demonstrations(pool: Sequence[Drawn], count: int, sets: int) -> list[list[Drawn]]:
    """``count`` rows of the pool for each of so many rows that are asked, as the paper's code draws them for in-context
    learning."""
    seeds = numpy.random.RandomState(0).randint(0, 10000, sets)
    return [permuted(pool, seed)[:count] for seed in seeds]
