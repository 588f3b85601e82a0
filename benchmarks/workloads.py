"""Batches with the shape of real tasks: lengths are measured, tokens are random, as speed does not depend on them.

Lengths are in tokens of a byte-level BPE of 49,152 words, over 1,000 training rows of each task in the MeZO paper's
templates. Quantiles are evenly spaced.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang.srt.mezo.data.examples import Example

_BOS = 2
_FIRST_WORD = 20  # tokens below are kept for what has a meaning

SST2_LENGTHS = {
    6: 7,
    7: 10,
    8: 14,
    9: 7,
    10: 19,
    11: 15,
    12: 25,
    13: 27,
    14: 30,
    15: 33,
    16: 32,
    17: 25,
    18: 32,
    19: 35,
    20: 31,
    21: 30,
    22: 33,
    23: 41,
    24: 24,
    25: 31,
    26: 46,
    27: 28,
    28: 42,
    29: 33,
    30: 29,
    31: 30,
    32: 26,
    33: 20,
    34: 22,
    35: 18,
    36: 17,
    37: 22,
    38: 14,
    39: 12,
    40: 13,
    41: 13,
    42: 12,
    43: 13,
    44: 15,
    45: 10,
    46: 9,
    47: 10,
    48: 11,
    49: 4,
    50: 8,
    51: 4,
    53: 3,
    54: 2,
    55: 1,
    56: 3,
    57: 2,
    58: 1,
    62: 2,
    63: 1,
    64: 1,
    69: 2,
}
"""Prompt length -> rows."""

BOOLQ_LENGTHS = (
    43,
    53,
    61,
    67,
    70,
    74,
    80,
    84,
    87,
    90,
    93,
    96,
    100,
    103,
    106,
    109,
    113,
    115,
    117,
    119,
    123,
    126,
    129,
    132,
    135,
    137,
    141,
    144,
    147,
    150,
    153,
    157,
    161,
    165,
    171,
    174,
    178,
    184,
    188,
    196,
    204,
    210,
    218,
    227,
    235,
    250,
    266,
    283,
    318,
    397,
)
MULTIRC_PASSAGES = (144, 163, 261, 277, 285, 316, 317, 328, 331, 340, 358, 360, 373, 385, 446, 479, 496, 506, 512, 513)
MULTIRC_QUESTIONS = (15, 16, 17, 17, 18, 19, 19, 20, 21, 21, 22, 23, 24, 25, 26, 27, 28, 28, 31, 36)
MULTIRC_ANSWERS = (11, 11, 12, 12, 12, 13, 13, 13, 13, 14, 14, 15, 15, 16, 17, 18, 20, 22, 25, 37)
"""With the fixed words around them."""
COPA_PROMPTS = (6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12)
COPA_OPTIONS = (4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 9, 10)


@dataclass(frozen=True)
class Workload:
    """Shape of a classification task.

    Attributes:
        lengths: prompt length -> how often it occurs; what ``demonstrations`` and ``passages`` add is not counted.
        invocation: length of the invocation at the end of the prompt.
        options: lengths to draw an option's from; all examples have the same two where there is one length.
        demonstrations: number of examples that all prompts begin with.
        passages: lengths of passages; three examples in a row begin with the same one.
    """

    name: str
    lengths: dict[int, int]
    invocation: int
    options: Sequence[int] = (1,)
    demonstrations: int = 0
    passages: Sequence[int] = field(default=())

    def examples(self, count: int, vocab_size: int, seed: int = 0) -> list[Example]:
        """Random examples of these lengths; all prompts end in the same invocation."""
        source = random.Random(seed)

        def words(length: int) -> tuple[int, ...]:
            return tuple(source.randrange(_FIRST_WORD, vocab_size) for _ in range(length))

        def prompts(number: int) -> list[tuple[int, ...]]:
            lengths = source.choices(list(self.lengths), weights=list(self.lengths.values()), k=number)
            return [(*words(length - 1 - self.invocation), *self.invocation_tokens) for length in lengths]

        verbalizers = (words(1), words(1))
        start = (_BOS, *(token for prompt in prompts(self.demonstrations) for token in (*prompt, *verbalizers[0])))
        examples, passage = [], ()
        for i, prompt in enumerate(prompts(count)):
            if self.passages and i % 3 == 0:
                passage = words(source.choice(self.passages))
            options = (
                verbalizers if self.options == (1,) else tuple(words(source.choice(self.options)) for _ in range(2))
            )
            examples.append(Example((*start, *passage, *prompt), options, i % 2))
        return examples

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return tuple(range(10, 10 + self.invocation))


def _quantiles(*parts: Sequence[int]) -> dict[int, int]:
    """Lengths of a sum of independent parts, each given by quantiles."""
    sums = {0: 1}
    for part in parts:
        longer: dict[int, int] = {}
        for length, weight in sums.items():
            for more in part:
                longer[length + more] = longer.get(length + more, 0) + weight
        sums = longer
    return sums


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sst2", SST2_LENGTHS, invocation=2),
        Workload("boolq", _quantiles(BOOLQ_LENGTHS), invocation=2),
        Workload("multirc", _quantiles(MULTIRC_QUESTIONS, MULTIRC_ANSWERS), invocation=2, passages=MULTIRC_PASSAGES),
        Workload("copa", _quantiles(COPA_PROMPTS), invocation=1, options=COPA_OPTIONS),
        Workload("icl16", SST2_LENGTHS, invocation=2, demonstrations=16),
    )
}
