"""Requests at the end of the server: new ones are refused, and what waits for an engine that has ended is answered."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.srt.mezo.service.wire.upstream import SGLangORJSONResponse

_ENDED = {"message": "the server is shutting down", "type": "server_error", "param": None, "code": "shutting_down"}


class RequestsInFlight:
    """Every HTTP request of the application, SGLang's routes and ours.

    A web server that is asked to end waits for all of them, without a bound: for a publication whose adapter no
    scheduler will load any more, for rows that a client sends slowly.
    """

    def __init__(self):
        self._tasks: set[asyncio.Task] = set()
        self._refused = self._ended = False

    def refuse(self) -> None:
        """Answer those that come from now on with 503."""
        self._refused = True

    def end(self) -> None:
        """Answer all that wait with 503, now; an answer that has begun is broken off."""
        self._refused = self._ended = True
        for task in self._tasks:
            task.cancel()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """``app`` with its requests known here."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._answer(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return answer

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None, "a request is served by a task"
        self._tasks.add(task)
        try:
            if not self._refused:
                return await app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not self._ended:
                raise
        finally:
            self._tasks.discard(task)
        if not has_begun:
            await SGLangORJSONResponse({"error": _ENDED}, 503, {"Connection": "close"})(scope, receive, send)
