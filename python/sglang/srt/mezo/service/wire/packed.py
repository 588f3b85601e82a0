"""Examples as bytes: what is kept of a job's files once they are tokenised, and what the scheduler is sent.

A part is what goes into one command: one array of int32, which NumPy writes and reads in one step. The number of
numbers comes first, and of examples, then the label and the number of options of each, then the lengths of each prompt
and its options, then their tokens. Behind them lie the columns of the examples as JSON.
"""

import itertools
import json
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
        own = size(example)
        tokens += own
        if part and (len(part) == MAX_EXAMPLES or tokens > MAX_TOKENS):
            yield part
            part, tokens = [], own
        part.append(example)
    if part:
        yield part


def size(example: Example) -> int:
    """In tokens; columns count as many as their text has, roughly."""
    columns = 0 if example.columns is None else len(json.dumps(example.columns)) // 4
    return len(example.prompt) + sum(map(len, example.options)) + columns


def pack(examples: Sequence[Example]) -> bytes:
    texts = [text for example in examples for text in (example.prompt, *example.options)]
    counts = [len(examples), *(example.label for example in examples), *(len(example.options) for example in examples)]
    numbers = np.fromiter(itertools.chain(counts, map(len, texts), itertools.chain.from_iterable(texts)), dtype="<i4")
    columns = json.dumps([example.columns for example in examples])
    return np.int32(len(numbers)).astype("<i4").tobytes() + numbers.tobytes() + columns.encode()


def unpack(part: bytes) -> list[Example]:
    """The examples that were packed; ValueError where the bytes are no part."""
    [total] = np.frombuffer(part[:4], dtype="<i4").tolist()
    numbers = iter(np.frombuffer(part[4 : 4 * total + 4], dtype="<i4").tolist())

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
    columns = json.loads(part[4 * total + 4 :])
    return [
        Example(prompt, tuple(rest), label, columns=own)
        for (prompt, *rest), label, own in zip(texts, labels, columns, strict=True)
    ]
