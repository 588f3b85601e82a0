"""Rows of ``{"messages"}`` in OpenAI's fine-tuning format: which messages are answers to learn, and what asks for each.

Nothing in a row is passed over: a field means what it means to OpenAI, or is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mezo.core.errors import DataError, shown

_ROW_FIELDS = ("messages", "tools", "parallel_tool_calls")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight")
_INSTEAD = {"functions": "tools", "function_call": "tool_calls"}
"""OpenAI's older names, which SGLang does not read in a request either."""


@dataclass(frozen=True)
class Turn:
    """An answer to learn.

    Attributes:
        asked: ``messages``, ``tools`` and ``parallel_tool_calls`` of the chat completion request that asks for it.
        answer: the assistant's message.
        name: of the answer in its row, such as ``messages[2]``.
    """

    asked: Mapping[str, Any]
    answer: Mapping[str, Any]
    name: str


def turns(fields: Mapping[str, Any]) -> list[Turn]:
    """What a row trains on: its last message; where messages have a weight, every assistant message whose weight is not
    0.

    Raises:
        DataError: naming the field at fault.
    """
    _require_known("", fields, _ROW_FIELDS)
    messages = fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2 or not _is_answer(messages[-1]):
        raise DataError("messages must be a list of two or more that ends with an assistant message")
    for number, message in enumerate(messages):
        _require_message(f"messages[{number}]", message)
    clean = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    settings = {name: fields[name] for name in ("tools", "parallel_tool_calls") if fields.get(name) is not None}
    return [
        Turn({"messages": clean[:number], **settings}, clean[number], f"messages[{number}]")
        for number in _targets(messages)
    ]


def _targets(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the answers to learn; as with OpenAI, a weight that is left out is 1 where another message has one."""
    weights = {number: message.get("weight") for number, message in enumerate(messages) if _is_answer(message)}
    if all(weight is None for weight in weights.values()):
        targets = [len(messages) - 1]
    else:
        targets = [number for number, weight in weights.items() if weight != 0]
    if not targets:
        raise DataError("no message is left to train on: every assistant message has weight 0")
    if targets[0] == 0:
        raise DataError("messages[0] is an assistant message that nothing asks for: give it weight 0")
    for number in targets:
        message = messages[number]
        if not message.get("content") and not message.get("tool_calls"):
            raise DataError(
                f"messages[{number}].content={shown(message.get('content'))} must be a non-empty string in an answer "
                "to learn, unless it has tool_calls"
            )
    return targets


def _require_message(name: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{name}={shown(message)} must be an object with a role and a content")
    _require_known(f"{name}.", message, _MESSAGE_FIELDS)
    content, weight = message.get("content"), message.get("weight")
    if not isinstance(content, (str, list)) and not (content is None and _is_answer(message)):
        raise DataError(f"{name}.content={shown(content)} must be a string or a list of parts")
    if weight is None:
        return
    if not _is_answer(message):
        raise DataError(f"{name}.weight={shown(weight)} is not allowed: only assistant messages have a weight")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{name}.weight={shown(weight)} must be 0 or 1")


def _require_known(prefix: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in fields.items():
        if name in known or value in (None, []):  # which says nothing
            continue
        instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"there are {', '.join(known)}"
        raise DataError(f"{prefix}{name}={shown(value)} is not supported in a row of messages: {instead}")


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"
