"""Turns of conversations as tokens: what a chat request would be rendered to, and the answer that follows on it.

SGLang renders both (``chat_templates``). Their texts are tokenised with those of other rows, as the server tokenises
them: without special tokens where a Jinja template has written its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.conversation import Turn
from sglang.srt.mezo.data.texts import Encoding, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sglang.srt.mezo.engine.chat_templates import LoadedTemplate, Template

_rendering = threading.Lock()  # SGLang's settings belong to the process


class ChatRenderer:
    """A ``Renderer`` that does as a server with these settings. Threads may share it.

    Args:
        tokenizer: the model's; the chat template of ``settings`` is put into it.

    Raises:
        ConfigError: SGLang has no chat template of the name in ``settings``.

    Without such a name SGLang is imported for the first turn, which takes seconds in a process that has not done so.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings):
        self._tokenizer = tokenizer
        self._settings = settings
        if settings.chat_template is not None:
            _ = self._loaded

    def answer(self, turn: Turn) -> Encoding[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The request keeps its tokens as they are served, even where the tokenizer would merge across the border."""
        with self._template() as template:
            asked = template.ask(turn)
            told = template.tell(asked)
            if turn.answer.get("tool_calls") and template.tell(asked, with_calls=False) == told:
                raise DataError(f"{turn.name}.tool_calls cannot be learned: the chat template does not write them")
        if not told.startswith(asked.text):
            raise DataError("the chat template writes the answer differently than its generation prompt announces")
        prompt, joint = yield Texts([asked.text, told], template.special_tokens)
        if joint[: len(prompt)] == prompt and len(joint) > len(prompt):
            return tuple(prompt), tuple(joint[len(prompt) :])
        [alone] = yield Texts([told[len(asked.text) :]], special_tokens=False)
        return tuple(prompt), tuple(alone)

    def generation_prompt(self, turn: Turn) -> tuple[int, ...]:
        with self._template() as template:
            asked = template.ask(turn)
            texts = [asked.text, template.messages_alone(asked)]
        whole, before = self._tokenizer(texts, add_special_tokens=template.special_tokens).input_ids
        differing = (place for place, (one, other) in enumerate(zip(whole, before)) if one != other)
        return tuple(whole[next(differing, len(before)) :])

    @contextmanager
    def _template(self) -> "Iterator[Template]":
        with _rendering, self._loaded.in_force():
            yield self._loaded.template

    @cached_property
    def _loaded(self) -> "LoadedTemplate":
        from sglang.srt.mezo.engine.chat_templates import LoadedTemplate

        return LoadedTemplate(self._tokenizer, self._settings)
