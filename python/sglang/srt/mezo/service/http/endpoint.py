"""What every route of ours has in common: its authorisation level, its errors in OpenAI's shape, its JSON body."""

import asyncio
import functools
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang.srt.mezo.core.errors import CapacityError, ConfigError, DataError, shown
from sglang.srt.mezo.service.http.latency import LatencyRecorder
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.manager import JobManager
from sglang.srt.mezo.service.jobs.threads import ServiceThreads
from sglang.srt.mezo.service.store.disk import storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError, StoreBusy
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.settings import ServiceSettings
from sglang.srt.mezo.service.wire.upstream import AuthLevel, SGLangORJSONResponse, auth_level

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
_MAX_NAME = 100  # characters of a name from a client that a message repeats
_MAX_NAMES = 10
_BUSY_SECONDS = 8.0  # that a request which changes something waits for the store before it begins

reads = auth_level(AuthLevel.NORMAL)
changes = auth_level(AuthLevel.ADMIN_OPTIONAL)

Handler = Callable[..., Awaitable[Any]]


class Service(Protocol):
    """What the routes work on. All but ``settings``, ``latency`` and ``threads`` is there while it is ``ready`` only.

    Handlers run in SGLang's event loop: what touches the store or the manager goes through ``threads``.
    """

    ready: bool
    settings: ServiceSettings
    latency: LatencyRecorder
    threads: ServiceThreads
    store: Store
    manager: JobManager
    client: EngineClient
    engine: EngineDescription


class Wire(BaseModel):
    """A JSON object from a client: no other fields than these, and no value turned into another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


WireModel = TypeVar("WireModel", bound=Wire)


class Endpoint(NamedTuple):
    """body: what its requests hold in JSON, for the API's description; the handler reads it (``read_json``)."""

    method: str
    path: str
    handler: Handler
    body: type[Wire] | None = None


def add_routes(app: FastAPI, endpoints: Iterable[Endpoint], service: Service | None = None) -> None:
    """Put the endpoints on the app itself: a router that is included would lose their authorisation levels.

    service: they answer 503 until it is ready, and those that change something while its store is locked; None for
    endpoints that do without it.
    """
    for method, path, handler, body in endpoints:
        level = getattr(handler, "_auth_level", None)
        assert isinstance(level, AuthLevel), handler
        needed = [] if service is None else _needed(service, method)
        app.router.add_api_route(
            path,
            _rendered(handler),
            methods=[method],
            dependencies=[Depends(need) for need in needed],
            response_model=None,
            response_class=SGLangORJSONResponse,
            route_class_override=_Route,
            openapi_extra=None if body is None else {"requestBody": _described(body)},
        )


def _described(body: type[Wire]) -> dict[str, Any]:
    """An OpenAPI request body."""
    schema = body.model_json_schema()
    own = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        """Without references, which would look for their models in the description of the whole API."""
        if isinstance(part, list):
            return list(map(inlined, part))
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(own[part["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in part.items()}

    return {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}


def _needed(service: Service, method: str) -> list[Handler]:
    async def ready() -> None:
        if not service.ready:
            raise RequestError(
                HTTPStatus.SERVICE_UNAVAILABLE, "the training service is not ready yet; ask again", None, "not_ready"
            )

    async def writable() -> None:
        await require_writable(service)

    return [ready] if method == "GET" else [ready, writable]


async def require_writable(service: Service) -> None:
    """Raises StoreBusy where a change would have to wait, before anything of it is done."""
    try:
        await asyncio.wait_for(service.threads.call(service.store.require_unlocked), _BUSY_SECONDS)
    except TimeoutError as error:
        raise StoreBusy() from error


def _rendered(handler: Handler) -> Handler:
    """FastAPI would look at every value of an answer before it is written, which for a long list takes a second."""

    @functools.wraps(handler)
    async def answer(*args: Any, **kwargs: Any) -> Response:
        content = await handler(*args, **kwargs)
        return SGLangORJSONResponse(content) if isinstance(content, dict) else content

    return answer


class _Route(APIRoute):
    """Turns whatever an endpoint raises into a response, before the app's own handlers would give it another shape."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handle = super().get_route_handler()

        async def handle_or_explain(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return _explain(request, error)

        return handle_or_explain


def _explain(request: Request, error: Exception) -> Response:
    known = _request_error(error)
    if known is None:
        logger.exception("%s %s failed", request.method, request.url.path)
        known = RequestError(
            HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed to answer; its log says why", None, "internal_error"
        )
    # A part of the body may be unread. To close the connection is what keeps the client from sending the rest.
    headers = {} if request.method == "GET" else {"Connection": "close"}
    if isinstance(known, StoreBusy):
        headers["Retry-After"] = str(known.RETRY_SECONDS)
    kind = "server_error" if known.status >= 500 else "invalid_request_error"
    content = {"error": {"message": known.message, "type": kind, "param": known.param, "code": known.code}}
    return SGLangORJSONResponse(content, known.status, headers)


def _request_error(error: Exception) -> RequestError | None:
    """The same error as a RequestError, None where nobody expected it."""
    match error:
        case RequestError():
            return error
        case OSError() | sqlite3.Error():
            return storage_error(error)
        case ConfigError():
            return RequestError(400, str(error), error.field, "invalid_value")
        case DataError():
            return RequestError(400, str(error), None, "invalid_data")
        case CapacityError():
            return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), None, "no_capacity")
        case RequestValidationError():
            return invalid([{**problem, "loc": problem["loc"][1:]} for problem in error.errors()])
        case HTTPException():
            return RequestError(error.status_code, str(error.detail), None, "invalid_request")
        case ClientDisconnect():
            return RequestError(400, "the client went away", None, "client_disconnected")
        case _:
            return None


def invalid(problems: Sequence[Mapping[str, Any]]) -> RequestError:
    """From pydantic's list of problems."""
    unknown = [_path(problem) for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(unknown[:_MAX_NAMES]) + (", ..." if len(unknown) > _MAX_NAMES else "")
        return RequestError(400, f"not supported here: {names}", unknown[0], "unknown_parameter")
    problem = problems[0]
    param = _path(problem)
    if problem["type"] == "missing":
        return RequestError(400, f"{param} is missing", param, "missing_parameter")
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return RequestError(400, f"{param}={shown(problem['input'])} is not allowed: {message}", param, "invalid_value")


def _path(problem: Mapping[str, Any]) -> str:
    return ".".join(str(part)[:_MAX_NAME] for part in problem["loc"] if part != "[key]")


async def read_json(request: Request, model: type[WireModel], max_bytes: int = MAX_BODY_BYTES) -> WireModel:
    """The body of a request.

    Raises:
        RequestError: 413 as soon as the body is known to be longer, 400 where it is not JSON or not as ``model`` says.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError(
            400,
            "the body must be JSON, sent with Content-Type: application/json",
            "Content-Type",
            "invalid_content_type",
        )
    require_length(request, max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return await asyncio.to_thread(_validated, body, model)


def _validated(body: bytearray, model: type[WireModel]) -> WireModel:
    content = _parsed(body)
    if not isinstance(content, dict):
        raise RequestError(400, f"the body must be a JSON object, not {type(content).__name__}", None, "invalid_json")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)) from None


def _parsed(body: bytearray) -> Any:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not JSON: {error}", None, "invalid_json") from error
    try:
        orjson.dumps(
            content
        )  # it writes less deep a nesting than it reads, and what Python could neither show nor store ends here
    except orjson.JSONEncodeError as error:
        raise RequestError(400, "the body is nested too deeply", None, "invalid_json") from error
    return content


def require_length(request: Request, max_bytes: int) -> None:
    """Refuse a body that says itself that it is too long, without reading it."""
    if says_longer(request, max_bytes):
        raise too_large(max_bytes)


def says_longer(request: Request, max_bytes: int) -> bool:
    length = request.headers.get("content-length", "")
    return length.isdigit() and int(length) > max_bytes


def too_large(max_bytes: int, param: str | None = None) -> RequestError:
    return RequestError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {max_bytes} bytes are taken", param, "file_too_large"
    )
