"""Turns of conversations as tokens: what a chat request would be rendered to, and the answer that follows on it.

SGLang renders both (``chat_templates``), so that an adapter learns from the prompts that it will meet. Their texts are tokenised
with those of other rows, as the server tokenises them: without special tokens where a Jinja template has written its own.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.conversation import Turn
from sglang.srt.mezo.errors import DataError
from sglang.srt.mezo.texts import Encoding, Texts

if TYPE_CHECKING:
    from sglang.srt.mezo.chat_templates import Template
    from transformers import PreTrainedTokenizerBase

_rendering = threading.Lock()  # SGLang's settings belong to the process


@dataclass(frozen=True)
class ChatSettings:
    """What decides how SGLang renders a chat request: its server arguments of these names. Can be sent to another process."""

    model_path: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    hf_chat_template_name: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] | None = None


def rendering(tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings) -> str:
    """A digest that changes with the tokenizer, its chat template or the settings: with anything that makes other tokens of a row."""
    parts = {name: value for name, value in asdict(settings).items() if name not in ("model_path", "revision")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    whole = json.dumps([parts, tokenizer.chat_template, tokenizer.special_tokens_map, vocabulary], default=str)
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()[:32]}"


class ChatRenderer:
    """Renders turns as a server with these settings renders requests. Threads may share it.

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
            self._loaded

    def answer(self, turn: Turn) -> Encoding[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Tokens of the request that asks for the answer, and of the answer as the template writes it after them, with its end.

        The request keeps its tokens as they are served, even where the tokenizer would merge across the border.

        Raises:
            DataError: the server would refuse the request, or the answer does not begin where the request ends.
        """
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
        """The last tokens of the request: those that follow on its messages, for the answer to follow on them.

        Raises:
            DataError: the server would refuse the request.
        """
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
    def _loaded(self):
        from sglang.srt.mezo.chat_templates import LoadedTemplate

        return LoadedTemplate(self._tokenizer, self._settings)

