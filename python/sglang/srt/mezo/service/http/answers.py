"""Which adapter a request's ``model`` names, on every route of SGLang's, and which version of it has answered.

SGLang reads the adapter from the model's name on some routes. On the others (/v1/responses, /v1/score, Ollama's and
more) the base model would answer for any name. Here what follows the colon counts on all of them: that adapter answers,
or the request ends with status 404.
"""

import hashlib
import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response, StreamingResponse

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.wire.upstream import ChatCompletionResponse, CompletionResponse, SGLangORJSONResponse

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import EmbeddingReqInput, GenerateReqInput, LoRARef, TokenizerManager


@dataclass
class _Answer:
    """Of the request that the current task serves.

    Attributes:
        adapter: that its model names; None for the base model.
        fingerprint: of the adapter's version that answers, once that is known.
    """

    adapter: str | None
    fingerprint: str | None = None


_answer: ContextVar[_Answer | None] = ContextVar("mezo_answer", default=None)
"""What a request's task sets, the tasks that it starts inherit: answers that are streamed, or made in the
background."""


# --- hooks ------------------------------------------------------------------------------------------------------------


async def around_request(original: Callable[..., Awaitable[Any]], handler: Any, request: Any, raw_request: Any) -> Any:
    """OpenAIServingBase.handle_request: all of OpenAI's routes but /v1/responses."""
    _, adapter = handler._parse_model_parameter(
        getattr(request, "model", None) or ""
    )  # some of these requests have no model
    if not _begin(handler.tokenizer_manager, adapter):
        return _no_such_model(request.model)
    return _sign(await original(handler, request, raw_request), _answer.get())


async def around_responses(
    original: Callable[..., Awaitable[Any]], handler: Any, request: Any, raw_request: Any = None
) -> Any:
    """OpenAIServingResponses.create_responses."""
    _, adapter = handler._parse_model_parameter(request.model or "")
    if not _begin(handler.tokenizer_manager, adapter):
        return _no_such_model(request.model)
    return await original(handler, request, raw_request)


async def around_ollama(original: Callable[..., Awaitable[Any]], handler: Any, request: Any, raw_request: Any) -> Any:
    """OllamaServing.handle_chat and .handle_generate, whose clients put a tag behind a model's name."""
    manager = handler.tokenizer_manager
    name = request.model.removeprefix(f"{manager.served_model_name}:")
    adapter = None if name in (request.model, "latest") else name.removesuffix(":latest")
    if not _begin(manager, adapter):
        return SGLangORJSONResponse({"error": f"model {shown(request.model)} not found"}, HTTPStatus.NOT_FOUND)
    return await original(handler, request, raw_request)


def before_generating(
    manager: "TokenizerManager", obj: "GenerateReqInput | EmbeddingReqInput", *args: Any, **kwargs: Any
) -> None:
    """TokenizerManager.generate_request: where every route comes to."""
    answer = _answer.get()
    if answer is not None and answer.adapter is not None and not obj.lora_path:
        obj.lora_path = answer.adapter


async def around_resolving(
    original: Callable[..., Awaitable[None]], manager: "TokenizerManager", obj: "GenerateReqInput | EmbeddingReqInput"
) -> None:
    """TokenizerManager._resolve_lora_path: from now on the request has the version that the name stands for."""
    await original(manager, obj)
    answer = _answer.get()
    ids = {obj.lora_id} if isinstance(obj.lora_id, str) else set(obj.lora_id or ())
    if answer is not None and len(ids) == 1:
        versions = [ref for ref in manager.lora_registry.get_all_adapters().values() if ref.lora_id in ids]
        answer.fingerprint = fingerprint(versions[0]) if versions else None


# --- which adapter ----------------------------------------------------------------------------------------------------


def _begin(manager: "TokenizerManager", adapter: str | None) -> bool:
    """Take note of what the request asks for; False where there is no such adapter."""
    _answer.set(_Answer(adapter))
    return adapter is None or adapter in served_names.names(manager)


def _no_such_model(name: str) -> Response:
    message = f"The model {shown(name)} does not exist"
    content = {"message": message, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    return SGLangORJSONResponse({"error": content}, HTTPStatus.NOT_FOUND)


# --- which version ----------------------------------------------------------------------------------------------------


def fingerprint(version: "LoRARef") -> str:
    """A name for an adapter's weights: the same as long as they are, after a restart too.

    Jobs keep each version in a folder of its own, ``<job>/adapters/v<n>``, which is never written again. Of an adapter
    from elsewhere nothing is known but which loading of it this is.
    """
    parts = Path(version.lora_path or "").parts[-3:]
    of_job = len(parts) == 3 and parts[0].startswith("ftjob-")
    number = f"-{parts[2]}" if of_job and parts[1] == "adapters" else ""
    digest = hashlib.sha256(("/".join(parts) if of_job else version.lora_id).encode()).hexdigest()[:10]
    return f"fp_{version.lora_name}{number}-{digest}"


def _sign(response: Any, answer: _Answer | None) -> Any:
    """Put the fingerprint into an adapter's answer, streamed or not."""
    if answer is None:
        return response
    if isinstance(response, StreamingResponse):
        response.body_iterator = _signed(response.body_iterator, answer)
        return response
    if answer.fingerprint is None or not isinstance(response, ChatCompletionResponse | CompletionResponse):
        return response
    return SGLangORJSONResponse(
        {**response.model_dump(mode="json", by_alias=True), "system_fingerprint": answer.fingerprint}
    )


_ANSWER = re.compile(r'data: \{"id": ?"[^"]*", ?"object": ?"(chat\.completion\.chunk|text_completion)"')


async def _signed(chunks: AsyncIterable[Any], answer: _Answer) -> AsyncIterator[Any]:
    async for chunk in chunks:
        if answer.fingerprint is not None and isinstance(chunk, str) and _ANSWER.match(chunk):
            chunk = chunk.replace("{", f'{{"system_fingerprint":{json.dumps(answer.fingerprint)},', 1)
        yield chunk
