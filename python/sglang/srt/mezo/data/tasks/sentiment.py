"""Sentences of film reviews and the feeling in them, and questions and what they ask for."""

from collections.abc import Mapping
from typing import Any

from sglang.srt.mezo.data.tasks.base import MaskedText, Task, TextExample, choice, label_of, text_of


class SST2(Task):
    """Is a sentence of a film review positive or negative?"""

    name = "sst2"
    dataset = ("nyu-mll/glue", "sst2")
    invocation = " It was"
    words = (" terrible", " great")
    masked_length = 128

    def render(self, row: Mapping[str, Any]) -> TextExample:
        return choice(f"{text_of(row, 'sentence').strip()} It was", self.words, label_of(row, self.words))

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        return MaskedText((text_of(row, "sentence"), " It was"), (".",), self.words, label_of(row, self.words))

    def calibration(self, text: TextExample) -> str:
        return "It was"


class SST5(Task):
    """As SST-2, in five degrees. The decoder's prompt is ours, as the paper has none."""

    name = "sst5"
    dataset = ("SetFit/sst5",)
    eval_split = "test"
    invocation = " It was"
    words = (" terrible", " bad", " okay", " good", " great")
    masked_length = 128

    def render(self, row: Mapping[str, Any]) -> TextExample:
        return choice(f"{text_of(row, 'text').strip()} It was", self.words, label_of(row, self.words))

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        before = ((text_of(row, "text"), 110), " It was")
        return MaskedText(before, (".",), self.words, label_of(row, self.words))

    def calibration(self, text: TextExample) -> str:
        return "It was"


class TREC(Task):
    """What does a question ask for? The decoder's prompt is ours, as the paper has none."""

    name = "trec"
    dataset = ("CogComp/trec",)
    eval_split = "test"
    invocation = "\nType of answer:"
    words = (" Expression", " Entity", " Description", " Human", " Location", " Number")
    masked_length = 128

    def render(self, row: Mapping[str, Any]) -> TextExample:
        prompt = f"Question: {text_of(row, 'text').strip()}\nType of answer:"
        return choice(prompt, self.words, label_of(row, self.words, "coarse_label"))

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        after = (":", (f" {text_of(row, 'text')}", 110))
        return MaskedText((), after, self.words, label_of(row, self.words, "coarse_label"))

    def calibration(self, text: TextExample) -> str:
        return "Type of answer:"
