"""Many rows to tokens in few calls of the tokenizer: a call costs as much as tokenising a hundred short texts.

A row is encoded by a generator that yields the `Texts` it needs and is sent their tokens. The generators of many rows
go on together, and what they ask for at the same time is tokenised at once.
"""

from collections.abc import Generator, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sglang.srt.mezo.core.errors import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
TokenIds = list[int]

_MAX_CHARACTERS = 1 << 18  # of one call: what the rows in it ask for next is in memory at once

BAD_ROW = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What comes of a row that is not as its form says; DataError is a ValueError."""


class Texts(NamedTuple):
    """What a row asks for: the tokens of each text, with the special tokens that the tokenizer adds by itself or
    without."""

    texts: Sequence[str]
    special_tokens: bool = True


Encoding = Generator[Texts, list[TokenIds], Result]


def encode_together(
    tokenizer: "PreTrainedTokenizerBase", encodings: Sequence[Encoding[Result]]
) -> list[Result | Exception]:
    """What each encoding returns, or the error of a bad row that it ends with."""
    outcomes: dict[int, Result | Exception] = {}
    waiting: list[tuple[int, Texts]] = []

    def advance(place: int, answer: list[TokenIds] | Exception | None = None) -> None:
        encoding = encodings[place]
        try:
            if isinstance(answer, Exception):
                asked = encoding.throw(answer)
            else:
                asked = next(encoding) if answer is None else encoding.send(answer)
            _require_texts(asked)
            waiting.append((place, asked))
        except StopIteration as stop:
            outcomes[place] = stop.value
        except BAD_ROW as error:
            outcomes[place] = error

    for place in range(len(encodings)):
        advance(place)
    while waiting:
        group = _newest(waiting)
        for (place, _), answer in zip(group, _answers(tokenizer, [asked for _, asked in group]), strict=True):
            advance(place, answer)
    return [outcomes[place] for place in range(len(encodings))]


def _require_texts(asked: Texts) -> None:
    for text in asked.texts:
        if not isinstance(text, str):
            raise TypeError(f"{shown(text)} is no text")


def _newest(waiting: list[tuple[int, Texts]]) -> list[tuple[int, Texts]]:
    """Take the last to ask, as many as go into one call: rows that are nearly done are finished before others are
    begun."""
    group, characters = [waiting.pop()], 0
    while waiting and characters < _MAX_CHARACTERS:
        group.append(waiting.pop())
        characters += sum(map(len, group[-1][1].texts))
    return group


def _answers(tokenizer: "PreTrainedTokenizerBase", asked: Sequence[Texts]) -> Sequence[list[TokenIds] | Exception]:
    try:
        return _tokenised(tokenizer, asked)
    except BAD_ROW as error:
        if len(asked) == 1:
            return [error]
        return [answer for one in asked for answer in _answers(tokenizer, [one])]  # one of them cannot be tokenised


def _tokenised(tokenizer: "PreTrainedTokenizerBase", asked: Sequence[Texts]) -> list[list[TokenIds]]:
    tokens = {}
    for special_tokens in {one.special_tokens for one in asked}:
        texts = [text for one in asked if one.special_tokens == special_tokens for text in one.texts]
        tokens[special_tokens] = iter(_token_ids(tokenizer, texts, special_tokens))
    return [[next(tokens[one.special_tokens]) for _ in one.texts] for one in asked]


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], special_tokens: bool) -> list[TokenIds]:
    """As a call of the tokenizer gives them. Where that would only pass the texts on to its backend, nothing but
    them is asked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    passes_on = backend is not None and _passes_on(type(tokenizer)) and not (backend.truncation or backend.padding)
    if backend is not None and passes_on and backend.encode_special_tokens == tokenizer.split_special_tokens:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special_tokens)]
    return tokenizer(list(texts), add_special_tokens=special_tokens).input_ids


@cache
def _passes_on(kind: type) -> bool:
    from transformers import PreTrainedTokenizerFast

    return issubclass(kind, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
