"""The page /mezo/: one document without outside assets. It holds no data: its script reads the JSON routes.

A browser cannot send a key when it opens an address, so the page is delivered without one, and asks for the key that
the JSON routes need.
"""

import base64
import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.mezo.service.http.endpoint import reads

_FOLDER = Path(__file__).parent


def install(app: FastAPI) -> None:
    """Add the page's routes."""
    for path, endpoint in _ENDPOINTS.items():
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)


def after_keys(result: None, app: FastAPI, **keys: str | None) -> None:
    """After SGLang's ``add_api_key_middleware``: what is added last is asked first."""
    app.add_middleware(PageBeforeKeys)


class PageBeforeKeys:
    """Middleware that answers for the page itself and passes everything else on.

    It goes in front of SGLang's check of keys, which has no level for what needs none. What is asked for is read from
    where routing reads it, and nothing but the page can come out.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in _ENDPOINTS:
            answer = await _ENDPOINTS[scope["path"]](Request(scope))
        await answer(scope, receive, send)


@reads
async def _page(request: Request) -> Response:
    return HTMLResponse(_HTML, headers=_HEADERS)


@reads
async def _to_page(request: Request) -> Response:
    return RedirectResponse("mezo/")  # relative: the server may have a path of its own in front of it


_ENDPOINTS = {"/mezo/": _page, "/mezo": _to_page}


def _document() -> tuple[str, str]:
    """The page, and a Content-Security-Policy that allows its own style and scripts by their digests, and nothing
    else."""
    html = _read("page.html")
    allowed: dict[str, list[str]] = {"style": [], "script": []}
    for kind, name in (("style", "page.css"), ("script", "curves.js"), ("script", "page.js")):
        text, mark = _read(name), f"/* {name} */"
        assert html.count(mark) == 1, mark
        html = html.replace(mark, text)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(allowed['script'])}; style-src {' '.join(allowed['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


_HTML, _POLICY = _document()
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
