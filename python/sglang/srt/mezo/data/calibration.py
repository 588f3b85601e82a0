"""The options of a row after a prompt that says nothing of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.mezo.data.examples import Encoder, Example
from sglang.srt.mezo.data.tasks import Task
from sglang.srt.mezo.data.texts import Encoding, Texts


class CalibrationEncoder(Encoder):
    """Rows of a task. Where its prompt is empty, and the tokenizer begins with no token of its own, that is the BOS
    token, or without one the EOS token."""

    def _encode_row(
        self, task: Task, fields: Mapping[str, Any], demonstrations: Sequence[str] = ()
    ) -> Encoding[Example]:
        text = task.render(fields)
        nothing = task.calibration(text)
        prompt, *joint = yield Texts([nothing, *(nothing + option for option in text.options)])
        options = tuple(tuple(ids[len(prompt) :]) for ids in joint)
        start: Any = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        return self._checked(Example(tuple(prompt) or (start,), options, text.label, right=text.right))
