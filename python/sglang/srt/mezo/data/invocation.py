"""Where an activated LoRA adapter starts to act (PEFT's ``alora_invocation_tokens``): one rule for training and
serving.

The prompt decides, not the answer: that is what a served request sees.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""In the place of an invocation: the generation prompt of the chat template, where all prompts end with it."""


def invocation_tokens(invocation: str | Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What a setting stands for: the tokens of a text, or tokens."""
    return tuple(
        tokenizer(invocation, add_special_tokens=False).input_ids if isinstance(invocation, str) else invocation
    )


def invocation_setting(tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str | list[int]:
    """The text that stands for these tokens; they themselves where no text does, as it would be tokenised otherwise
    on its own."""
    text: Any = tokenizer.decode(list(tokens))
    return text if text != AUTO and invocation_tokens(text, tokenizer) == tuple(tokens) else list(tokens)


def find_invocation(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Start of the last occurrence of ``invocation`` in ``prompt``, None if there is none."""
    wanted, width = list(invocation), len(invocation)
    for start in range(len(prompt) - width, -1, -1):
        if prompt[start] == wanted[0] and list(prompt[start : start + width]) == wanted:
            return start
    return None


def invocation_start(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """Like ``find_invocation``; raises DataError where the adapter would never act."""
    start = find_invocation(prompt, invocation)
    if start is None:
        raise DataError(
            f"the prompt does not hold the invocation tokens {list(invocation)}; its last tokens are "
            f"{list(prompt[-8:])}"
        )
    return start
