"""The seam to SGLang's template manager and to its handler of /v1/chat/completions, which render a conversation.

To import this module takes seconds, as SGLang's come with it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError
from transformers import PretrainedConfig

from sglang.srt.entrypoints.openai.protocol import ChatCompletionMessageGenericParam, ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.mezo.core.errors import ConfigError, DataError, shown
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.conversation import Turn
from sglang.srt.parser.conversation import generate_chat_conv
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.runtime_context import create_context, get_context, use_context
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_transformers_utils import get_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """A request for an answer.

    Attributes:
        text: its prompt.
        messages: as SGLang gives them to a Jinja template, with the template's further arguments.
    """

    request: ChatCompletionRequest
    answer: ChatCompletionMessageGenericParam
    text: str
    messages: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Template(Protocol):
    """A chat template. Each method raises DataError for what the server would refuse.

    Attributes:
        special_tokens: whether the tokenizer adds its special tokens to what the template writes.
    """

    special_tokens: bool

    def ask(self, turn: Turn) -> Asked:
        """The request for a turn's answer."""
        ...

    def messages_alone(self, asked: Asked) -> str:
        """The prompt without what is there for the answer to follow on."""
        ...

    def tell(self, asked: Asked, with_calls: bool = True) -> str:
        """The messages and the answer, with its tool calls or without."""
        ...


class LoadedTemplate:
    """The chat template of these settings, and SGLang's settings of the process to use it under.

    Raises:
        ConfigError: SGLang has no chat template of that name, or cannot read the model's configuration.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings):
        self._context = None
        if not get_context().is_config_namespace_published("serving"):  # as it is in a server
            fields = {name: value for name, value in asdict(settings).items() if value is not None}
            self._context = create_context(ServerArgs(**{**fields, "model_path": "dummy"}), role="tokenizer")
        with self.in_force():
            self.template = _load(tokenizer, settings)

    def in_force(self) -> AbstractContextManager:
        """Not for two threads at a time."""
        return nullcontext() if self._context is None else use_context(self._context)


# --- SGLang's handler -------------------------------------------------------------------------------------------------


class _Handler(OpenAIServingChat):
    """The server's handler of chat requests, up to the text of a prompt.

    Attributes:
        given: what it has given to the chat template last.
        renders: False to stop short of the chat template.
    """

    given: tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]
    renders = True

    def _render_and_encode_chat_template(self, messages, **arguments) -> tuple[str, None]:
        self.given = messages, arguments
        return self.render(messages, **arguments) if self.renders else "", None

    def render(self, messages, *, tools, template_kwargs, add_generation_prompt, **_) -> str:
        """As the method above does it for the server, which encodes the text then."""
        tokenizer: Any = self.tokenizer_manager.tokenizer
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            return_dict=False,
            **template_kwargs,
        )


class _ModelConfig:
    """Of SGLang's ModelConfig what rendering reads. Text is trained on, so other parts are refused as a text model
    does it."""

    is_multimodal = False

    def __init__(self, hf_config: PretrainedConfig):
        self.hf_config = hf_config

    def get_default_sampling_params(self) -> dict[str, Any]:
        return {}


class _TokenizerManager:
    """Of SGLang's TokenizerManager what rendering reads."""

    processor = None
    server_args = None

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings):
        self.tokenizer = tokenizer
        self.model_path = self.served_model_name = settings.model_path
        self.model_config = _ModelConfig(_hf_config(settings))
        self._settings = settings

    def config_value(self, name: str) -> Any:
        return getattr(self._settings, name)


def _hf_config(settings: ChatSettings) -> PretrainedConfig:
    if not settings.model_path:
        return PretrainedConfig()
    try:
        return get_config(settings.model_path, settings.trust_remote_code, settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model_path", settings.model_path, f"a hub name or a folder with a model ({error})"
        ) from error


def _load(tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings) -> Template:
    manager: Any = _TokenizerManager(tokenizer, settings)
    templates = TemplateManager()
    try:
        templates.load_chat_template(manager, settings.chat_template, settings.model_path)
    except Exception as error:  # of another type for every way in which a file can be wrong
        raise ConfigError(
            "chat_template", settings.chat_template, f"a name that SGLang knows, or a .jinja or .json file ({error})"
        ) from error
    handler = _Handler(manager, templates)
    name = templates.chat_template_name
    return _JinjaTemplate(handler) if name is None else _ConversationTemplate(handler, name)


# --- templates --------------------------------------------------------------------------------------------------------


class _JinjaTemplate:
    """The tokenizer's, or one from a file."""

    special_tokens = False

    def __init__(self, handler: _Handler):
        self._handler = handler
        self._tokenizer: Any = handler.tokenizer_manager.tokenizer

    def ask(self, turn: Turn) -> Asked:
        if self._handler.chat_encoding_spec is not None:
            raise DataError(
                f"SGLang writes this model's chats without a chat template ({self._handler.chat_encoding_spec}), and "
                "no answers"
            )
        if self._tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template, which messages need")
        if self._handler._prompt_text_round_trip_is_lossy:
            raise DataError("the chat template of this tokenizer writes tokens that have no text")
        request, answer = _request(self._handler, turn)
        text: Any = _process(self._handler, request).prompt_ids  # as the handler above renders it, not its tokens
        return Asked(request, answer, text, *self._handler.given)

    def messages_alone(self, asked: Asked) -> str:
        return self._text(asked.messages, asked.arguments)

    def tell(self, asked: Asked, with_calls: bool = True) -> str:
        request = _with_messages(asked.request, [_answer(asked, with_calls)])
        request._format_add_generation_prompt = False  # else SGLang makes a user's message of it
        self._handler.renders = False
        try:
            _process(self._handler, request)
        finally:
            self._handler.renders = True
        messages, _ = self._handler.given
        return self._text([*asked.messages, *messages], asked.arguments)

    def _text(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        try:
            return self._handler.render(messages, **{**arguments, "add_generation_prompt": False})
        except Exception as error:
            raise _refusal(error) from error


class _ConversationTemplate:
    """One of SGLang's own, by its name."""

    special_tokens = True

    def __init__(self, handler: _Handler, name: str):
        self._handler = handler
        self._name = name

    def ask(self, turn: Turn) -> Asked:
        request, answer = _request(self._handler, turn)
        return Asked(request, answer, _process(self._handler, request).prompt)

    def messages_alone(self, asked: Asked) -> str:
        return self._without_blank(asked.request)

    def tell(self, asked: Asked, with_calls: bool = True) -> str:
        return self._without_blank(_with_messages(asked.request, [*asked.request.messages, _answer(asked, with_calls)]))

    def _without_blank(self, request: ChatCompletionRequest) -> str:
        """The messages without the blank one that stands for the answer to come."""
        try:
            conversation = generate_chat_conv(request, self._name)
        except ValueError as error:
            raise _refusal(error) from error
        conversation.messages.pop()
        return conversation.get_prompt()


# --- requests ---------------------------------------------------------------------------------------------------------


def _request(handler: _Handler, turn: Turn) -> tuple[ChatCompletionRequest, ChatCompletionMessageGenericParam]:
    """The request that asks for a turn's answer, and the answer as a message of a request."""
    messages = [*turn.asked["messages"], turn.answer]
    try:
        request = ChatCompletionRequest.model_validate({**turn.asked, "messages": messages})
    except ValidationError as error:
        raise DataError(_problem(error, messages)) from error
    refusal = handler._validate_request(request)
    if refusal:
        raise DataError(f"a request with these messages is refused: {refusal}")
    answer: Any = request.messages[-1]
    return _with_messages(request, request.messages[:-1]), answer


def _with_messages(request: ChatCompletionRequest, messages: Sequence[Any]) -> ChatCompletionRequest:
    return request.model_copy(update={"messages": list(messages)})


def _answer(asked: Asked, with_calls: bool) -> ChatCompletionMessageGenericParam:
    return asked.answer if with_calls else asked.answer.model_copy(update={"tool_calls": None})


def _process(handler: _Handler, request: ChatCompletionRequest):
    try:
        return handler._process_messages(request, is_multimodal=False)
    except Exception as error:  # a template may raise anything, which the server answers with an error
        raise _refusal(error) from error


def _refusal(error: Exception) -> DataError:
    return DataError(f"the chat template refuses the messages: {error}")


def _problem(error: ValidationError, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the request's schema has against it, as near to the cause as it says."""
    found = (0, str(error))
    for problem in error.errors():
        place = problem["loc"]
        if place[0] == "messages":  # which have two schemas, of which that of the message's role counts
            if any("UserParam" in str(part) for part in place) != (messages[int(place[1])].get("role") == "user"):
                continue
        names = [
            part for part in place if isinstance(part, int) or part.isidentifier() and part.islower() and part != "str"
        ]  # no types
        if len(names) > found[0]:
            path = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
            found = (len(names), f"{path}={shown(problem['input'])} is not allowed: {problem['msg']}")
    return found[1]
