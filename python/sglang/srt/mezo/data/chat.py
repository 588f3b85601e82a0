"""What decides how a conversation becomes tokens, and what renders one.

SGLang renders conversations (``engine.chat``), so that an adapter learns from the prompts that it will meet.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.mezo.data.conversation import Turn
from sglang.srt.mezo.data.texts import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatSettings:
    """What decides how SGLang renders a chat request: its server arguments of these names. Can be sent to another
    process."""

    model_path: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    hf_chat_template_name: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] | None = None


def rendering(tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings) -> str:
    """A digest that changes with the tokenizer, its chat template or the settings: with anything that makes other
    tokens of a row."""
    parts = {name: value for name, value in asdict(settings).items() if name not in ("model_path", "revision")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    whole = json.dumps([parts, tokenizer.chat_template, tokenizer.special_tokens_map, vocabulary], default=str)
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()[:32]}"


class Renderer(Protocol):
    """Renders turns as a server renders requests. Each method raises DataError where the server would refuse the
    request."""

    def answer(self, turn: Turn) -> Encoding[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Tokens of the request that asks for the answer, and of the answer as the template writes it after them, with
        its end.

        DataError too where the answer does not begin where the request ends.
        """
        ...

    def generation_prompt(self, turn: Turn) -> tuple[int, ...]:
        """The last tokens of the request: those that follow on its messages, for the answer to follow on them."""
        ...
