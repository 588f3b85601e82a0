"""Uploaded files, streamed to disk under an id of ours; what the client calls a file is kept as data only."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.http.endpoint import says_longer, too_large
from sglang.srt.mezo.service.jobs.threads import ServiceThreads
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import StoredFile, new_id, now

PURPOSE = "fine-tune"
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("purpose", "file", _ANCHOR, _SECONDS)
_LIFETIMES = range(3600, 30 * 24 * 3600 + 1)  # seconds
_MAX_FILENAME = 255
_FORM_BYTES = 1 << 16  # of a form's body that are not the file: boundaries, headers, the purpose
_MAX_FIELD_BYTES = 1024


async def receive_file(request: Request, store: Store, threads: ServiceThreads, max_bytes: int) -> StoredFile:
    """Store the file of a multipart form. Whatever goes wrong, nothing of it is left behind.

    Raises:
        RequestError: 413 as soon as the file is known to be too large, 400 for another form than OpenAI's.
        OSError: the disk is full.
        ClientDisconnect: the client has gone away.
    """
    boundary = _boundary(request)
    if says_longer(request, max_bytes + _FORM_BYTES):
        raise too_large(max_bytes, "file")
    file_id = new_id("file-")
    partial = store.partial_path(file_id)
    try:
        with await asyncio.to_thread(_Form, boundary, partial, max_bytes) as form:
            async for chunk in request.stream():
                await asyncio.to_thread(form.feed, chunk)
            await asyncio.to_thread(form.finish)
        created_at, lifetime = now(), form.lifetime
        expires_at = None if lifetime is None else created_at + lifetime
        file = StoredFile(
            file_id, form.filename, PURPOSE, form.file_bytes, created_at, "processed", form.sha256, expires_at
        )
        return await asyncio.shield(threads.call(store.add_file, file))  # once begun, it is done whoever waits for it
    finally:
        # Where the request is cancelled meanwhile, too.
        await asyncio.shield(asyncio.to_thread(partial.unlink, missing_ok=True))


def _boundary(request: Request) -> bytes:
    content_type, parameters = parse_options_header(request.headers.get("content-type"))
    if content_type != b"multipart/form-data" or not parameters.get(b"boundary"):
        raise _bad("a file is sent as multipart/form-data with the fields purpose and file", "Content-Type")
    return parameters[b"boundary"]


class _Form:
    """OpenAI's form, ``purpose``, ``file`` and ``expires_after`` in any order, as it comes in. Its methods block."""

    def __init__(self, boundary: bytes, partial: Path, max_bytes: int):
        self.filename = ""
        self.file_bytes = 0
        self._max_bytes = max_bytes
        self._form_bytes = 0
        self._digest = hashlib.sha256()
        self._fields: dict[str, bytearray] = {}
        self._name = ""
        self._headers: dict[bytes, bytearray] = {}
        self._header = bytearray()
        self._ended = False
        callbacks: Any = {
            "on_part_begin": self._on_part_begin,
            "on_header_begin": self._on_header_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks, max_header_size=_FORM_BYTES)
        except FormParserError as error:
            raise _bad(f"the form's boundary cannot be used: {error}", "Content-Type") from error
        self._file = open(partial, "xb")

    def __enter__(self) -> "_Form":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self._digest.hexdigest()

    @property
    def lifetime(self) -> int | None:
        """Seconds until the file expires; None where it does not."""
        if _ANCHOR not in self._fields and _SECONDS not in self._fields:
            return None
        for name, allowed in (
            (_ANCHOR, "created_at"),
            (_SECONDS, f"a whole number from {_LIFETIMES[0]} to {_LIFETIMES[-1]}"),
        ):
            if name not in self._fields:
                raise _bad(
                    f"the form has no {name}, which goes with {_SECONDS if name == _ANCHOR else _ANCHOR}: {allowed}",
                    name,
                )
            text = self._text(name)
            if not (
                text == "created_at"
                if name == _ANCHOR
                else text.isascii() and text.isdecimal() and int(text) in _LIFETIMES
            ):
                raise RequestError(400, f"{name}={shown(text)} is not allowed: {allowed}", name, "invalid_value")
        return int(self._text(_SECONDS))

    def feed(self, chunk: bytes) -> None:
        """Parse and write a part of the body."""
        before = self.file_bytes
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _bad(f"the form is not multipart/form-data: {error}", None) from error
        self._form_bytes += len(chunk) - (self.file_bytes - before)
        if self._form_bytes > _FORM_BYTES:
            raise too_large(self._max_bytes, "file")

    def finish(self) -> None:
        """Check that all is there and bring it to the disk."""
        if not self._ended:
            raise _bad("the form ends before its last boundary", None)
        for name in ("purpose", "file"):
            if name not in self._fields:
                raise _bad(f"the form has no {name}", name)
        _require_purpose(self._text("purpose"))
        _ = self.lifetime  # raises where it cannot be
        if self.file_bytes == 0:
            raise _bad(f"the file {self.filename!r} is empty", "file")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _text(self, name: str) -> str:
        return self._fields[name].decode(errors="replace")

    # --- called by the parser -----------------------------------------------------------------------------------------

    def _on_part_begin(self) -> None:
        self._headers = {}

    def _on_header_begin(self) -> None:
        self._header = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers.setdefault(bytes(self._header).lower(), bytearray()).extend(data[start:end])

    def _on_headers_finished(self) -> None:
        disposition = bytes(self._headers.get(b"content-disposition", b""))
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name not in _FIELDS:
            raise _bad(
                f"the form's field {self._name[:100]!r} is not supported: {', '.join(_FIELDS)} are",
                self._name[:100] or None,
            )
        if self._name in self._fields:
            raise _bad(f"the form has more than one {self._name}", self._name)
        self._fields[self._name] = bytearray()
        if self._name == "file":
            if "purpose" in self._fields:
                _require_purpose(self._text("purpose"))
            self.filename = _filename(options)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.file_bytes += end - start
            if self.file_bytes > self._max_bytes:
                raise too_large(self._max_bytes, "file")
            content = memoryview(data)[start:end]
            self._digest.update(content)
            self._file.write(content)
        else:
            self._fields[self._name] += data[start:end]
            if len(self._fields[self._name]) > _MAX_FIELD_BYTES:
                raise _bad(f"{self._name} is longer than {_MAX_FIELD_BYTES} bytes", self._name)

    def _on_end(self) -> None:
        self._ended = True


def _filename(options: dict[bytes, bytes]) -> str:
    if b"filename" not in options:
        raise _bad("the field file is no file: it comes without a filename", "file")
    raw = options[b"filename"]
    try:
        filename = raw.decode()
    except UnicodeDecodeError:
        filename = raw.decode("latin-1")
    if not 1 <= len(filename) <= _MAX_FILENAME:
        raise _bad(f"the filename has {len(filename)} characters, and 1 to {_MAX_FILENAME} are allowed", "file")
    return filename


def _require_purpose(purpose: str) -> None:
    if purpose != PURPOSE:
        raise RequestError(400, f"purpose={purpose[:100]!r} is not allowed: {PURPOSE}", "purpose", "invalid_value")


def _bad(message: str, param: str | None) -> RequestError:
    return RequestError(400, message, param, "invalid_form")
