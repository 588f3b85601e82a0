"""Two sentences and what the one says of the other."""

from collections.abc import Mapping
from typing import Any

from sglang.srt.mezo.data.tasks.base import MaskedText, Piece, Task, TextExample, choice, label_of, text_of


class SentencePair(Task):
    """Does the second sentence follow from the first, or say the same?

    Attributes:
        sentences: columns of the two.
        words: of the classes, after a line's end.
        masked_words: the same between two commas.
        masked_question: whether a question mark stands in the place of the first sentence's last character.
    """

    sentences: tuple[str, str]
    words: tuple[str, ...]
    masked_question = True
    first_limit: int | None = None

    def render(self, row: Mapping[str, Any]) -> TextExample:
        first, second = (text_of(row, column) for column in self.sentences)
        return choice(self.ask(first, second), self.words, label_of(row, self.words))

    def ask(self, first: str, second: str) -> str:
        """The prompt of two sentences."""
        raise NotImplementedError

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        first, second = (text_of(row, column) for column in self.sentences)
        kept = first[:-1] if self.masked_question else first
        before: Piece = kept if self.first_limit is None else (kept, self.first_limit)
        after = (",", f" {second[:1].lower()}{second[1:]}")
        words = tuple(f" {word}" for word in self.words)
        pieces = (before, "?") if self.masked_question else (before,)
        return MaskedText(pieces, after, words, label_of(row, words))


class MNLI(SentencePair):
    """Natural language inference over many genres. The decoder's prompt is CB's, as the paper has none."""

    name = "mnli"
    dataset = ("nyu-mll/glue", "mnli")
    eval_split = "validation_matched"
    invocation = " Yes, No, or Maybe?\n"
    sentences = ("premise", "hypothesis")
    words = ("Yes", "Maybe", "No")
    first_limit = 240
    masked_length = 256

    def ask(self, first: str, second: str) -> str:
        return f'Suppose {first} Can we infer that "{second}"? Yes, No, or Maybe?\n'


class SNLI(MNLI):
    """Natural language inference about pictures' captions. The decoder's prompt is CB's, as the paper has none."""

    name = "snli"
    dataset = ("stanfordnlp/snli",)
    eval_split = "validation"  # as the paper's code, which has no other rows of it
    first_limit = None

    def is_labelled(self, row: Mapping[str, Any]) -> bool:
        return row.get("label") != -1  # where the annotators did not agree


class CB(MNLI):
    """CommitmentBank: does a speaker hold a clause to be true?"""

    name = "cb"
    dataset = ("aps/super_glue", "cb")
    eval_split = "validation"
    words = ("Yes", "No", "Maybe")
    num_dev = 100

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        return Task.render_masked(self, row)


class RTE(SentencePair):
    """Does the second text follow from the first?"""

    name = "rte"
    dataset = ("nyu-mll/glue", "rte")
    invocation = " is true? Yes or No?\n"
    sentences = ("sentence1", "sentence2")
    words = ("Yes", "No")
    first_limit = 240
    masked_length = 256

    def ask(self, first: str, second: str) -> str:
        return f'{first}\nDoes this mean that "{second}" is true? Yes or No?\n'


class MRPC(SentencePair):
    """Do two sentences say the same? The decoder's prompt is ours, as the paper has none."""

    name = "mrpc"
    dataset = ("nyu-mll/glue", "mrpc")
    invocation = " mean the same? Yes or No?\n"
    sentences = ("sentence1", "sentence2")
    words = ("No", "Yes")
    masked_question = False
    masked_length = 128

    def ask(self, first: str, second: str) -> str:
        return f"{first}\n{second}\nDo these two sentences mean the same? Yes or No?\n"
