"""Questions about a text, with answers to choose from: SuperGLUE's."""

from collections.abc import Mapping
from typing import Any

from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.data.tasks.base import Task, TextExample, choice, label_of, text_of, texts_of

NO_YES = ("No", "Yes")


class BoolQ(Task):
    """Is it so, by the passage?"""

    name = "boolq"
    dataset = ("aps/super_glue", "boolq")
    invocation = "\n"

    def render(self, row: Mapping[str, Any]) -> TextExample:
        passage, question = text_of(row, "passage"), text_of(row, "question")
        question = question if question.endswith("?") else f"{question}?"
        prompt = f"{passage} {question[:1].upper()}{question[1:]}\n"
        return choice(prompt, ("Yes", "No"), 1 - label_of(row, NO_YES))


class WSC(Task):
    """Does the pronoun stand for that?"""

    name = "wsc"
    dataset = ("aps/super_glue", "wsc.fixed")
    invocation = "? Yes or No?\n"

    def render(self, row: Mapping[str, Any]) -> TextExample:
        text, noun, pronoun = (text_of(row, column) for column in ("text", "span1_text", "span2_text"))
        prompt = f'{text}\nIn the previous sentence, does the pronoun "{pronoun.lower()}" refer to {noun}? Yes or No?\n'
        return choice(prompt, NO_YES, label_of(row, NO_YES))


class WiC(Task):
    """Has the word one meaning in both sentences?"""

    name = "wic"
    dataset = ("aps/super_glue", "wic")
    invocation = "\n"

    def render(self, row: Mapping[str, Any]) -> TextExample:
        word, first, second = (text_of(row, column) for column in ("word", "sentence1", "sentence2"))
        prompt = f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{first}\n{second}\n'
        return choice(prompt, NO_YES, label_of(row, NO_YES))


class MultiRC(Task):
    """Is that a right answer to the question about the paragraph?"""

    name = "multirc"
    dataset = ("aps/super_glue", "multirc")
    invocation = " Is that correct? Yes or No?\n"

    def render(self, row: Mapping[str, Any]) -> TextExample:
        paragraph, question, answer = (text_of(row, column) for column in ("paragraph", "question", "answer"))
        prompt = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
        return choice(prompt, NO_YES, label_of(row, NO_YES))


class COPA(Task):
    """Which of two sentences is the cause, or the effect? Prompts end in one of two words."""

    name = "copa"
    dataset = ("aps/super_glue", "copa")
    objective = "completion"
    num_dev = 100
    ends: Mapping[str, str] = {"cause": " because", "effect": " so"}

    def render(self, row: Mapping[str, Any]) -> TextExample:
        asked = text_of(row, "question")
        if asked not in self.ends:
            raise DataError(f"question={shown(asked)} must be cause or effect")
        premise = text_of(row, "premise").rstrip().removesuffix(".")
        choices = [_begun(text_of(row, column)) for column in ("choice1", "choice2")]
        return choice(f"{premise}{self.ends[asked]}", choices, label_of(row, choices))

    def calibration(self, text: TextExample) -> str:
        return text.prompt.rsplit(" ", 1)[-1]


def _begun(sentence: str) -> str:
    """With a small letter at the beginning, as it goes on with another one."""
    first, *others = sentence.split(" ")
    return " " + " ".join([first if first == "I" else first.lower(), *others])


class ReCoRD(Task):
    """Which of the news text's entities is left out of the sentence?"""

    name = "record"
    dataset = ("aps/super_glue", "record")
    invocation = "\n-"
    objective = "completion"

    def render(self, row: Mapping[str, Any]) -> TextExample:
        passage, query = text_of(row, "passage"), text_of(row, "query")
        entities, answers = (texts_of(column, row[column]) for column in ("entities", "answers"))
        entities = list(dict.fromkeys(entities))
        missing = [answer for answer in answers if answer not in entities]
        if missing:
            raise DataError(f"answers={shown(missing)} are none of the entities")
        options = [f" {query.replace('@placeholder', entity)}" for entity in entities]
        right = sorted({entities.index(answer) for answer in answers})
        prompt = passage.replace("@highlight\n", "- ") + "\n-"
        return choice(prompt, options, entities.index(answers[0]), right)

    def calibration(self, text: TextExample) -> str:
        return "-"
