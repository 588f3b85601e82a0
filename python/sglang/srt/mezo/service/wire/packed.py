"""Examples as bytes: what is kept of a job's files once they are tokenised, and what the scheduler is sent.

A part is what goes into one command: one array of int32, which NumPy writes and reads in one step. The number of
examples comes first, then the label and the number of options of each, then the lengths of each prompt and its options,
then their tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sglang.srt.mezo.data.examples import Example

# Of one part: the scheduler takes it in between two batches.
MAX_EXAMPLES = 256
MAX_TOKENS = 65_536


def parts(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in order, as many at a time as go into one part; a longer one has its own."""
    part: list[Example] = []
    tokens = 0
    for example in examples:
        tokens += num_tokens(example)
        if part and (len(part) == MAX_EXAMPLES or tokens > MAX_TOKENS):
            yield part
            part, tokens = [], num_tokens(example)
        part.append(example)
    if part:
        yield part


def num_tokens(example: Example) -> int:
    return len(example.prompt) + sum(map(len, example.options))


def pack(examples: Sequence[Example]) -> bytes:
    texts = [text for example in examples for text in (example.prompt, *example.options)]
    counts = [len(examples), *(example.label for example in examples), *(len(example.options) for example in examples)]
    numbers = itertools.chain(counts, map(len, texts), itertools.chain.from_iterable(texts))
    return np.fromiter(numbers, dtype="<i4").tobytes()


def unpack(part: bytes) -> list[Example]:
    """The examples that were packed; ValueError where the bytes are no part."""
    numbers = iter(np.frombuffer(part, dtype="<i4").tolist())

    def take(count: int) -> list[int]:
        taken = list(itertools.islice(numbers, count))
        if len(taken) != count:
            raise ValueError(f"a part of {len(part)} bytes ends too soon")
        return taken

    [count] = take(1)
    labels, options = take(count), take(count)
    lengths = iter(take(count + sum(options)))
    texts = [[tuple(take(length)) for length in itertools.islice(lengths, 1 + number)] for number in options]
    if next(numbers, None) is not None:
        raise ValueError(f"a part of {len(part)} bytes goes on too long")
    return [Example(prompt, tuple(rest), label) for (prompt, *rest), label in zip(texts, labels)]
