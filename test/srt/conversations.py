"""Rows of messages of every kind, and SGLang's own rendering of the requests that they stand for."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "opt-reviews"
TEMPLATES = {path.stem: str(path) for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}

_TEXT = "the plot is good."
_RATE = {
    "type": "function",
    "function": {
        "name": "rate",
        "description": "Rate it.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    },
}
_BARE = {"type": "function", "function": {"name": "stop"}}


def _user(content: Any = _TEXT) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _system(content: Any = "you are kind") -> dict[str, Any]:
    return {"role": "system", "content": content}


def _assistant(content: Any = " great", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _call(arguments: Any = '{"n": 3}', name: str = "rate", id: str = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(content: Any = "ok", id: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _row(*messages: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [*messages], **fields}


_ASKED = (_user(), _assistant(None, tool_calls=[_call()]), _result())

ROWS: dict[str, dict[str, Any]] = {
    # strings
    "one question": _row(_user(), _assistant()),
    "a system message": _row(_system(), _user(), _assistant()),
    "a system message alone": _row(_system(), _assistant()),
    "an empty system message": _row(_system(""), _user(), _assistant()),
    "two system messages": _row(_system(), _system("and short"), _user(), _assistant()),
    "a later system message": _row(_user(), _assistant(), _system("be short"), _user("again"), _assistant()),
    "three rounds": _row(_user("a"), _assistant("b"), _user("c"), _assistant("d"), _user("e"), _assistant("f")),
    "two users' messages in a row": _row(_user("a"), _user("b"), _assistant("c")),
    "an empty question": _row(_user(""), _assistant()),
    "blanks": _row(_user("  \n "), _assistant(" \n great \n")),
    "a question that ends with a line": _row(_user("good\n"), _assistant("yes")),
    "no ASCII": _row(_user("schön — 好 🙂"), _assistant("ça va")),
    "what looks like a template": _row(_user("{{ messages }} {% if x %}"), _assistant("<|im_end|>")),
    "what looks like a special token": _row(_user("</s><s>"), _assistant("a</s>b")),
    "a long question": _row(_user(_TEXT * 60), _assistant()),
    "a developer's message": _row({"role": "developer", "content": "be kind"}, _user(), _assistant()),
    # parts
    "a part": _row(_user(_parts(_TEXT)), _assistant()),
    "parts": _row(_user(_parts("the plot", "is good", "")), _assistant()),
    "no parts": _row(_user([]), _assistant()),
    "a system message in parts": _row(_system(_parts("you are", "kind")), _user(), _assistant()),
    "an answer in parts": _row(_user(), _assistant(_parts(" great", " indeed"))),
    "an earlier answer in parts": _row(_user(), _assistant(_parts("b")), _user(_parts("c")), _assistant(_parts("d"))),
    "strings and parts": _row(_system(), _user(_parts("a")), _assistant("b"), _user("c"), _assistant("d")),
    # tools
    "a tool": _row(_user(), _assistant(), tools=[_RATE]),
    "two tools": _row(_user(), _assistant(), tools=[_RATE, _BARE], parallel_tool_calls=False),
    "no tools": _row(_user(), _assistant(), tools=[]),
    "null for tools": _row(_user(), _assistant(), tools=None, parallel_tool_calls=None),
    "a type that JSON Schema does not have": _row(
        _user(),
        _assistant(),
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "varchar"}}}},
            }
        ],
    ),
    "a tool call before": _row(*_ASKED, _assistant(), tools=[_RATE]),
    "a tool call before, without tools": _row(*_ASKED, _assistant()),
    "a tool call with text": _row(_user(), _assistant("let me see", tool_calls=[_call()]), _result(), _assistant()),
    "a tool call with content left out": _row(
        _user(), {"role": "assistant", "tool_calls": [_call()]}, _result(), _assistant()
    ),
    "a tool call with empty content": _row(_user(), _assistant("", tool_calls=[_call()]), _result(), _assistant()),
    "arguments as an object": _row(_user(), _assistant(None, tool_calls=[_call({"n": 3})]), _result(), _assistant()),
    "no arguments": _row(_user(), _assistant(None, tool_calls=[_call("{}")]), _result(), _assistant()),
    "two tool calls": _row(
        _user(),
        _assistant(None, tool_calls=[_call(), _call(id="call_2")]),
        _result(),
        _result("no", "call_2"),
        _assistant(),
    ),
    "results in another order": _row(
        _user(),
        _assistant(None, tool_calls=[_call(), _call(id="call_2")]),
        _result("no", "call_2"),
        _result(),
        _assistant(),
    ),
    "a result in parts": _row(_user(), _assistant(None, tool_calls=[_call()]), _result(_parts("o", "k")), _assistant()),
    "null for tool calls": _row(
        _user(), _assistant("b", tool_calls=None), _user("c"), _assistant("d", tool_calls=None)
    ),
    # names, weights, reasoning, several answers
    "a name": _row(
        {**_user(), "name": "ann"}, _assistant("b", name="bob"), {**_user("c"), "name": "ann"}, _assistant("d")
    ),
    "weights": _row(_user("a"), _assistant("b", weight=1), _user("c"), _assistant("d", weight=0)),
    "all weights": _row(_user("a"), _assistant("b", weight=1), _user("c"), _assistant("d", weight=1)),
    "a weight left out": _row(
        _user("a"), _assistant("b"), _user("c"), _assistant("d", weight=0), _user("e"), _assistant("f", weight=1)
    ),
    "two answers in a row": _row(_user("a"), _assistant("b", weight=1), _assistant("c", weight=1)),
    "two answers in a row, in parts": _row(_user("a"), _assistant(_parts("b")), _assistant(_parts("c"))),
    "an answer after a null one": _row(_user("a"), _assistant(None, weight=0), _assistant("c", weight=1)),
    "reasoning": _row(
        _user("a"), _assistant("b", reasoning_content="hm"), _user("c"), _assistant("d", reasoning_content="hm hm")
    ),
}

ANSWERS_THAT_CALL: dict[str, dict[str, Any]] = {
    "null content": _row(_user(), _assistant(None, tool_calls=[_call()]), tools=[_RATE]),
    "empty content": _row(_user(), _assistant("", tool_calls=[_call()]), tools=[_RATE]),
    "no content": _row(_user(), {"role": "assistant", "tool_calls": [_call()]}, tools=[_RATE]),
    "text beside the call": _row(_user(), _assistant("x", tool_calls=[_call()]), tools=[_RATE]),
    "two calls": _row(
        _user(),
        _assistant(None, tool_calls=[_call(), _call('{"n": 4}', id="call_2")]),
        tools=[_RATE],
        parallel_tool_calls=True,
    ),
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an image": (
        _row(
            _user([*_parts("see"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
            _assistant(),
        ),
        "only supports text",
    ),
    "audio": (
        _row(_user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), _assistant()),
        "only supports text",
    ),
    "a part of no type": (_row(_user([{"text": "a"}]), _assistant()), "messages[0].content[0]"),
    "a part without text": (_row(_user([{"type": "text"}]), _assistant()), "messages[0].content[0]"),
    "a role that nobody has": (_row({"role": "judge", "content": "a"}, _assistant()), "messages[0].role='judge'"),
    "null content of a user": (_row(_user(None), _assistant()), "messages[0].content=None"),
    "arguments that are no JSON": (
        _row(_user(), _assistant(None, tool_calls=[_call("{n")]), _result(), _assistant()),
        "must be valid JSON",
    ),
    "arguments that are no object": (
        _row(_user(), _assistant(None, tool_calls=[_call("[3]")]), _result(), _assistant()),
        "must be a JSON object",
    ),
    "a tool without a name": (
        _row(_user(), _assistant(), tools=[{"type": "function", "function": {}}]),
        "tools[0].function.name",
    ),
    "tools that are no list": (_row(_user(), _assistant(), tools="rate"), "tools='rate'"),
    "a schema that is none": (
        _row(_user(), _assistant(), tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}]),
        "invalid 'parameters' schema",
    ),
    "no boolean": (_row(_user(), _assistant(), parallel_tool_calls="perhaps"), "parallel_tool_calls='perhaps'"),
}
"""What a server of a text model does not answer to, whatever its chat template."""


class SGLangsOwn:
    """SGLang's handler of chat requests in this process, put together as its HTTP server does it."""

    def __init__(self, template: str | None, **settings: Any):
        from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
        from sglang.srt.parser.template_manager import TemplateManager
        from sglang.srt.runtime_context import create_context, use_context
        from sglang.srt.server_args import ServerArgs

        context = create_context(ServerArgs(model_path="dummy", chat_template=template, **settings), role="tokenizer")
        self._in_force = lambda: use_context(context)
        manager = SimpleNamespace(
            tokenizer=AutoTokenizer.from_pretrained(MODEL),
            processor=None,
            server_args=None,
            model_path=str(MODEL),
            served_model_name="opt",
            model_config=SimpleNamespace(
                is_multimodal=False, hf_config=AutoConfig.from_pretrained(MODEL), get_default_sampling_params=dict
            ),
            config_value=context.config_leaf,
        )
        with self._in_force():
            templates = TemplateManager()
            templates.initialize_templates(manager, str(MODEL), template)
            self._handler = OpenAIServingChat(manager, templates)

    def prompt(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that the engine is given for a request; ValueError where it is refused."""
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        with self._in_force():
            request = ChatCompletionRequest.model_validate(body)
            if problem := self._handler._validate_request(request):
                raise ValueError(problem)
            return tuple(self._handler._convert_to_internal_request(request)[0].input_ids)


def request_for(row: Mapping[str, Any], answer: int) -> dict[str, Any]:
    """The body of the request that a client sends to get the message of that number."""
    return {
        "model": "opt",
        **{name: value for name, value in row.items() if value is not None},
        "messages": row["messages"][:answer],
    }
