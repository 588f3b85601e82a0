"""Questions about a text that are answered in words of one's own: SQuAD and DROP."""

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.mezo.data.tasks.base import Task, TextExample, part_of, text_of, texts_of


class Answered(Task):
    """The first answer is learned, and any of them is right."""

    invocation = "\nAnswer:"
    objective = "completion"
    max_new_tokens = 50


class SQuAD(Answered):
    """Questions whose answer stands in a paragraph of Wikipedia."""

    name = "squad"
    dataset = ("rajpurkar/squad",)

    def render(self, row: Mapping[str, Any]) -> TextExample:
        title, context, question = (text_of(row, column) for column in ("title", "context", "question"))
        prompt = f"Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:"
        return _answered(prompt, texts_of("answers", part_of(row, "answers", "text")))


class DROP(Answered):
    """Questions that take some counting over a passage."""

    name = "drop"
    dataset = ("ucinlp/drop",)

    def render(self, row: Mapping[str, Any]) -> TextExample:
        passage, question = text_of(row, "passage"), text_of(row, "question")
        prompt = f"Passage: {passage}\nQuestion: {question.strip()}\nAnswer:"
        return _answered(prompt, texts_of("answers_spans", part_of(row, "answers_spans", "spans")))


def _answered(prompt: str, answers: Sequence[str]) -> TextExample:
    return TextExample(prompt.strip(" "), (f" {answers[0]}\n",), 0, answers=tuple(answers))
