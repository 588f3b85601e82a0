"""SST-2: is a sentence of a film review positive or negative?"""

from collections.abc import Mapping
from typing import Any

from sglang.srt.mezo.data.tasks.base import MaskedText, Task, TextExample, text_of


class SST2(Task):
    name = "sst2"
    dataset = ("nyu-mll/glue", "sst2")
    invocation = " It was"
    words = (" terrible", " great")

    def render(self, row: Mapping[str, Any]) -> TextExample:
        return TextExample(
            prompt=f"{text_of(row, 'sentence').strip()}{self.invocation}", options=self.words, label=row["label"]
        )

    def render_masked(self, row: Mapping[str, Any]) -> MaskedText:
        return MaskedText((text_of(row, "sentence"), " It was"), (".",), self.words, row["label"])
