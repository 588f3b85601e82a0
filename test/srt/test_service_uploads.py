"""Files come in by pieces and within bounds, whatever a client sends; what fails leaves nothing on disk."""

import errno
import hashlib
import os
import socket
import threading
import time

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from clients import openai_client
from service_app import make_app, serving
from service_client import service  # noqa: F401
from sglang.srt.mezo.service.http import uploads
from sglang.srt.mezo.service.store import store as stores
from sglang.srt.mezo.service.wire.records import StoredFile, new_id
from stored import make_job

ROWS = b'{"prompt": "a", "completion": "b"}\n'
MIB = 1 << 20
BOUNDARY = "frontier"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture
def port(service):
    with serving(make_app(service)) as port:
        yield port


def part(name, content=b"", filename=None):
    disposition = f'Content-Disposition: form-data; name="{name}"' + (
        f'; filename="{filename}"' if filename is not None else ""
    )
    return f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + content + b"\r\n"


def expiry(anchor=b"created_at", seconds=b"3600"):
    return part("expires_after[anchor]", anchor) + part("expires_after[seconds]", seconds)


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", ROWS, "a.jsonl")
END = f"--{BOUNDARY}--\r\n".encode()


def head(length):
    """Head of a request by hand."""
    return f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM_TYPE}\r\n{length}\r\n\r\n".encode()


def post(service, body, content_type=FORM_TYPE):
    http = TestClient(make_app(service), raise_server_exceptions=False)
    return http.post("/v1/files", content=body, headers={"Content-Type": content_type})


def left(service):
    return os.listdir(service.settings.directory / "files")


def refused(service, body, status=400, **kwargs):
    response = post(service, body, **kwargs)
    assert response.status_code == status, response.text
    assert left(service) == []
    assert service.store.files().data == []
    return response.json()["error"]


@pytest.mark.parametrize(
    "body", [PURPOSE + FILE + END, FILE + PURPOSE + END, b"\r\n" + PURPOSE + FILE + END + b"epilogue"]
)
def test_the_fields_come_in_any_order(service, body):
    file = post(service, body).json()
    assert (file["filename"], file["bytes"], file["purpose"], file["object"]) == (
        "a.jsonl",
        len(ROWS),
        "fine-tune",
        "file",
    )
    assert left(service) == [file["id"]]
    assert service.store.file_path(file["id"]).read_bytes() == ROWS
    assert service.store.file(file["id"]).sha256 == hashlib.sha256(ROWS).hexdigest()


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_form_can_be_cut_anywhere(service, size):
    content = b"\r\n--frontie\r\n\r-\n" * 20 + b"\r"
    body = PURPOSE + part("file", content, "a.jsonl") + END
    file = post(service, (body[start : start + size] for start in range(0, len(body), size))).json()
    assert service.store.file_path(file["id"]).read_bytes() == content


@pytest.mark.parametrize(
    "filename",
    [
        "a.jsonl",
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "имя \N{GRINNING FACE}",
        "a\0b",
        "a\x07\tb",
        "n" * 255,
        "$(id)",
    ],
)
def test_a_filename_is_data(service, filename):
    file = post(service, PURPOSE + part("file", ROWS, filename) + END).json()
    assert service.store.file(file["id"]).filename == file["filename"] == filename
    assert left(service) == [file["id"]]


@pytest.mark.parametrize("filename", ["", "n" * 256, "n" * 1000, "\N{GRINNING FACE}" * 256])
def test_a_filename_has_a_length(service, filename):
    error = refused(service, PURPOSE + part("file", ROWS, filename) + END)
    assert error["message"] == f"the filename has {len(filename)} characters, and 1 to 255 are allowed"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (PURPOSE + PURPOSE + FILE + END, "purpose", "more than one purpose"),
        (FILE + part("purpose", b"") + END, "purpose", "purpose='' is not allowed: fine-tune"),
        (FILE + part("purpose", b"\xff") + END, "purpose", "is not allowed: fine-tune"),
        (FILE + part("purpose", b"p" * 2000) + END, "purpose", "purpose is longer than 1024 bytes"),
        (PURPOSE + part("expires_in", b"3600") + FILE + END, "expires_in", "is not supported"),
        (
            PURPOSE + part("expires_after[seconds]", b"3600") + FILE + END,
            "expires_after[anchor]",
            "the form has no expires_after[anchor]",
        ),
        (
            PURPOSE + part("expires_after[anchor]", b"created_at") + FILE + END,
            "expires_after[seconds]",
            "from 3600 to 2592000",
        ),
        (
            PURPOSE + expiry(b"last_active_at") + FILE + END,
            "expires_after[anchor]",
            "'last_active_at' is not allowed: created_at",
        ),
        (
            PURPOSE + expiry(seconds=b"3599") + FILE + END,
            "expires_after[seconds]",
            "'3599' is not allowed: a whole number from 3600 to 2592000",
        ),
        (PURPOSE + FILE + expiry(seconds=b"2592001") + END, "expires_after[seconds]", "'2592001' is not allowed"),
        (PURPOSE + expiry(seconds=b"-3600") + FILE + END, "expires_after[seconds]", "'-3600' is not allowed"),
        (PURPOSE + expiry(seconds=b"3600.5") + FILE + END, "expires_after[seconds]", "'3600.5' is not allowed"),
        (
            PURPOSE + expiry(seconds="\N{ARABIC-INDIC DIGIT FOUR}".encode() * 4) + FILE + END,
            "expires_after[seconds]",
            "is not allowed",
        ),
        (PURPOSE + part("", b"x") + FILE + END, None, "field '' is not supported"),
        (PURPOSE + FILE[:-10], None, "the form ends before its last boundary"),
        (b"", None, "the form ends before its last boundary"),
        (b"nonsense", None, "not multipart/form-data"),
        (PURPOSE + b"--frontier\r\nno header\r\n\r\nx" + END, None, "not multipart/form-data"),
        (b"--frontier\r\n\r\nx\r\n" + END, None, "field '' is not supported"),
        (b"--frontier\r\n" + b"A: b\r\n" * 100 + b"\r\nx\r\n" + END, None, "not multipart/form-data"),
    ],
)
def test_another_form_is_refused(service, body, param, message):
    error = refused(service, body)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 300}",
        "multipart/mixed; boundary=frontier",
    ],
)
def test_another_content_type_is_refused(service, content_type):
    assert refused(service, PURPOSE + FILE + END, content_type=content_type)["param"] == "Content-Type"


def test_the_limit_is_of_the_file_alone(service):
    assert service.settings.max_file_bytes == MIB
    file = post(service, PURPOSE + part("file", b"x" * MIB, "a.jsonl") + END).json()
    assert file["bytes"] == MIB
    service.store.delete_file(file["id"])
    error = refused(service, PURPOSE + part("file", b"x" * (MIB + 1), "a.jsonl") + END, status=413)
    assert (error["code"], error["param"]) == ("file_too_large", "file")
    assert error["message"] == f"at most {MIB} bytes are taken"


@pytest.mark.parametrize(
    "filler",
    [b"\r\n" * MIB + PURPOSE + FILE + END, PURPOSE + FILE + END + b"x" * 2 * MIB, part("purpose", b"p" * 2 * MIB)],
)
def test_what_is_no_file_is_bounded_too(service, filler):
    chunks = (filler[start : start + 65536] for start in range(0, len(filler), 65536))
    response = post(service, chunks)
    assert response.status_code in (400, 413)
    assert left(service) == []


def test_too_large_by_its_own_word_is_refused_before_a_byte_is_read(service, port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(f"Content-Length: {1 << 40}"))
        answer = b""
        while received := connection.recv(65536):  # to the end: the server closes
            answer += received
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert left(service) == []


def test_reading_stops_soon_after_the_limit(service, port):
    sent = 0

    def body():
        nonlocal sent
        yield PURPOSE + part("file", b"", "a.jsonl")[:-2]
        for _ in range(4096):
            sent += 65536
            yield b"x" * 65536

    response = httpx.post(f"http://127.0.0.1:{port}/v1/files", content=body(), headers={"Content-Type": FORM_TYPE})
    assert response.status_code == 413
    assert sent < 64 * MIB  # what socket buffers and the closing connection swallow, of 256 MiB
    assert left(service) == []


def test_the_client_learns_that_its_file_is_too_large(service, port):
    client = openai_client(f"http://127.0.0.1:{port}")
    for size in [MIB + 1, 8 * MIB] * 5:
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("a.jsonl", b"x" * size), purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (413, "file_too_large", "file")
        assert f"at most {MIB} bytes are taken" in str(caught.value)
    assert left(service) == []


@pytest.mark.parametrize("length", ["Content-Length: 500000", "Transfer-Encoding: chunked"])
def test_a_client_that_goes_away_leaves_nothing(service, port, length):
    data = PURPOSE + part("file", b"x" * 100_000, "a.jsonl")
    if "chunked" in length:
        data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(length) + data)
        wait_until(lambda: left(service))
    wait_until(lambda: not left(service))
    assert service.store.files().data == []
    assert httpx.get(f"http://127.0.0.1:{port}/v1/files").status_code == 200


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_is_reported_and_leaves_nothing(service, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(uploads.os, "fsync", no_room)
    assert refused(service, PURPOSE + FILE + END, status=507)["code"] == "disk_full"


def test_a_file_that_the_store_does_not_take_leaves_nothing(service, monkeypatch):
    def broken(_):
        raise RuntimeError("no")

    monkeypatch.setattr(service.store, "add_file", broken)
    assert refused(service, PURPOSE + FILE + END, status=500)["code"] == "internal_error"


def test_serving_goes_on_while_the_disk_is_slow(service, port, monkeypatch):
    ready = threading.Event()
    monkeypatch.setattr(stores, "_rename", lambda partial, path: ready.wait(120) and os.rename(partial, path))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        body = PURPOSE + FILE + END
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        wait_until(lambda: left(service))
        assert httpx.get(f"http://127.0.0.1:{port}/v1/files", timeout=60).status_code == 200
        assert not ready.is_set()
        ready.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("seconds", [3600, 30 * 24 * 3600])
def test_a_file_expires_after_so_many_seconds(service, port, monkeypatch, seconds):
    client = openai_client(f"http://127.0.0.1:{port}")
    stays = client.files.create(file=("stays.jsonl", ROWS), purpose="fine-tune")
    file = client.files.create(
        file=("a.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": seconds}
    )
    assert (stays.expires_at, file.expires_at) == (None, file.created_at + seconds)
    monkeypatch.setattr(stores, "now", lambda: file.expires_at - 1)
    service.store.delete_expired()
    assert [listed.id for listed in client.files.list()] == [file.id, stays.id] and client.files.retrieve(
        file.id
    ) == file
    monkeypatch.setattr(stores, "now", lambda: file.expires_at)
    for _ in range(2):  # before it is deleted, and after that
        assert [listed.id for listed in client.files.list()] == [stays.id]
        for gone in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match=file.id):
                gone(file.id)
        with pytest.raises(openai.NotFoundError) as caught:
            client.fine_tuning.jobs.create(model="tiny", training_file=stays.id, validation_file=file.id)
        assert caught.value.param == "validation_file"
        service.store.delete_expired()
        assert left(service) == [stays.id]


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_that_has_expired_stays_as_long_as_a_job_needs_it(service, monkeypatch, field):
    file, other = (
        StoredFile(new_id("file-"), "a.jsonl", "fine-tune", len(ROWS), 1000, "processed", expires_at=expires_at)
        for expires_at in (4600, None)
    )
    for added in (file, other):
        service.store.partial_path(added.id).write_bytes(ROWS)
        service.store.add_file(added)
    monkeypatch.setattr(stores, "now", lambda: 4000)
    job = service.store.add_job(make_job(**{"training_file": other.id, field: file.id, "status": "paused"}))
    monkeypatch.setattr(stores, "now", lambda: 5000)
    service.store.delete_expired()
    assert service.store.file(file.id) == file and file in service.store.files().data
    service.store.update_job(job.id, status="cancelled")
    assert file not in service.store.files().data
    service.store.delete_expired()
    assert not service.store.file_path(file.id).exists() and service.store.file_path(other.id).exists()
