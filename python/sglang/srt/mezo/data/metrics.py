"""How well a text answers a question: SQuAD's metrics, as the MeZO paper's code has them."""

from collections import Counter
from collections.abc import Sequence

_NONE = ("CANNOTANSWER", "no answer")
"""A first answer that says that there is none: then nothing else is right."""


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the answers, up to case, punctuation and articles; else 0."""
    return float(_words(text) in map(_words, answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """The best F1 score of the text's words against those of an answer; of a text without words 0, unlike SQuAD 2's."""
    if answers[0] in _NONE:
        return exact_match(text, answers[:1])
    return max(_overlap(_words(text), _words(answer)) for answer in answers)


def _overlap(words: Sequence[str], others: Sequence[str]) -> float:
    common = (Counter(words) & Counter(others)).total()
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(others)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    from transformers.data.metrics.squad_metrics import normalize_answer

    return normalize_answer(text).split()
