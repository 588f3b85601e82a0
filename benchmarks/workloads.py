"""Batches with the shape of real tasks: lengths are measured, tokens are random, as speed does not depend on them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.mezo.data import Example

SST2_LENGTHS = {
    6: 7, 7: 10, 8: 14, 9: 7, 10: 19, 11: 15, 12: 25, 13: 27, 14: 30, 15: 33, 16: 32, 17: 25, 18: 32, 19: 35, 20: 31, 21: 30,
    22: 33, 23: 41, 24: 24, 25: 31, 26: 46, 27: 28, 28: 42, 29: 33, 30: 29, 31: 30, 32: 26, 33: 20, 34: 22, 35: 18, 36: 17,
    37: 22, 38: 14, 39: 12, 40: 13, 41: 13, 42: 12, 43: 13, 44: 15, 45: 10, 46: 9, 47: 10, 48: 11, 49: 4, 50: 8, 51: 4, 53: 3,
    54: 2, 55: 1, 56: 3, 57: 2, 58: 1, 62: 2, 63: 1, 64: 1, 69: 2,
}  # fmt: skip
"""Prompt length in tokens -> rows, over 1,000 training rows of SST-2 in the paper's template (byte-level BPE, with BOS)."""


@dataclass(frozen=True)
class Workload:
    """Shape of a classification task.

    Attributes:
        lengths: prompt length in tokens -> how often it occurs.
        invocation: length of the invocation at the end of the prompt.
        options: length of each option.
    """

    name: str
    lengths: dict[int, int]
    invocation: int
    options: Sequence[int]

    def examples(self, count: int, vocab_size: int, seed: int = 0) -> list[Example]:
        """Random examples of these lengths; all prompts end in the same invocation."""
        source = random.Random(seed)
        invocation = self.invocation_tokens
        options = tuple(tuple(source.sample(range(20, vocab_size), length)) for length in self.options)
        lengths = source.choices(list(self.lengths), weights=list(self.lengths.values()), k=count)
        return [
            Example((2, *(source.randrange(20, vocab_size) for _ in range(length - 1 - len(invocation))), *invocation), options, i % 2)
            for i, length in enumerate(lengths)
        ]

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return tuple(range(10, 10 + self.invocation))


WORKLOADS = {workload.name: workload for workload in (Workload("sst2", SST2_LENGTHS, invocation=2, options=(1, 1)),)}
