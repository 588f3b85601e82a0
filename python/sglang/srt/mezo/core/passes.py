"""Long work in bounded pieces: a generator that yields after each, so that whoever drives it can serve in between."""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Passes = Generator[None, None, T]
"""Yields after every bounded piece of work and returns the result."""


def drain(passes: Passes[T]) -> T:
    """Do all pieces at once."""
    while True:
        try:
            next(passes)
        except StopIteration as stop:
            return stop.value
