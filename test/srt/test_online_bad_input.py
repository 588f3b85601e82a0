"""Bad input at the front door of a real server: each kind gets its error, and requests and the job beside it go on as
before.

The server has a key for users and one for administrators. One job trains from the first test to the last. Of each
table some kinds come here; all of them meet the application without an engine in ``test_service_bad_input``.
"""

import json
import shutil
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import pytest
from transformers import GPT2Config

from bad_input import (
    BODIES,
    FILE,
    FORM,
    JOBS,
    MIB,
    NAMED_JOBS,
    PURPOSE,
    REFUSED_FLAGS,
    ROW,
    ROWS,
    UPLOADS,
    check,
    few,
    form,
)
from bad_requests import BATCH, CHANGES, DAMAGES, PATHS, READS, REQUESTS, STEP
from clients import http_client, openai_client
from front_door import FrontDoor, in_background, start  # noqa: F401
from live_server import LiveServer


@pytest.fixture(scope="module")
def refused_starts(tmp_path_factory, request) -> dict[str, Future]:
    """Servers with the wrong flags that tests ask for, one after the other."""
    folder = tmp_path_factory.mktemp("refused")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(folder / "gpt2")
    name = test_a_server_that_cannot_train_says_so_and_ends.__name__
    wrong = [test.callspec.params["flags"] for test in request.session.items if test.originalname == name]
    return dict(zip(wrong, in_background(folder, *(f"--mezo-dir mezo {flags}" for flags in wrong))))


@pytest.fixture(scope="module")
def door(refused_starts, tmp_path_factory) -> Iterator[FrontDoor]:
    directory = tmp_path_factory.mktemp("server") / "mezo"
    keys = ("--api-key", "user-key", "--admin-api-key", "admin-key")
    with LiveServer(directory, *keys, "--mezo-max-file-mb", "1", "--enable-metrics", key="user-key") as server:
        yield FrontDoor(server)


@pytest.fixture(scope="module", autouse=True)
def second_start(door, tmp_path_factory) -> Future:
    """A server on the folder of the one that runs."""
    (future,) = in_background(tmp_path_factory.mktemp("second"), f"--mezo-dir {door.server.directory}")
    return future


@pytest.fixture(scope="module")
def background() -> Iterator[ThreadPoolExecutor]:
    """For what takes seconds and is looked at later."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def health(background) -> Iterator[list[tuple[str, Future]]]:
    """Answers to /health, which takes a second, after each test."""
    yield (checks := [])
    assert [name for name, check in checks if check.result().status_code != 200] == []


@pytest.fixture(autouse=True)
def alive(door, background, health, request) -> Iterator[None]:
    """After each test: the server is well, and answers as it did before everything."""
    yield
    health.append((request.node.name, background.submit(door.server.http.get, "/health")))
    assert door.greedy() == door.answer


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", few(UPLOADS))
def test_a_wrong_upload_is_refused_and_leaves_nothing(door, kind, streamed):
    body, content_type, expected = UPLOADS[kind]
    before = door.stored()
    content = (body[start : start + 65536] for start in range(0, len(body), 65536)) if streamed else body
    answer = door.http.post("/v1/files", content=content, headers={"Content-Type": content_type})
    check(answer.status_code, answer.json()["error"], *expected)
    assert door.stored() == before


def test_the_client_learns_that_its_file_is_too_large(door):
    with pytest.raises(openai.APIStatusError) as caught:
        door.put(b"x" * (MIB + 1))
    check(caught.value.status_code, caught.value.body, 413, "file", "file_too_large", f"at most {MIB} bytes")


def test_a_length_is_believed_before_the_body_comes(door):
    head = (
        "POST /v1/files HTTP/1.1\nHost: x\nAuthorization: Bearer admin-key\n"
        f"Content-Type: {FORM}\nContent-Length: {1 << 40}"
    )
    status, body = door.raw(head)
    check(status, body["error"], 413, "file", "file_too_large", f"at most {MIB} bytes")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "a\0b", "files/../../x", "n" * 255, "a%2f..%2fb"]
)
def test_a_name_that_looks_like_a_path_is_only_a_name(door, name):
    before = door.stored()
    answer = door.http.post("/v1/files", content=form(PURPOSE, ("file", name, FILE[2])), headers={"Content-Type": FORM})
    file = answer.raise_for_status().json()
    assert file["filename"] == name and door.stored() - before == {file["id"]}
    assert door.admin.files.delete(file["id"]).deleted and door.stored() == before


@pytest.mark.parametrize("length", ["Content-Length: 500000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_goes_away_in_mid_upload_leaves_nothing(door, length, reset):
    before = door.stored()
    data = form(PURPOSE, ("file", "a.jsonl", b"x" * 100_000), end=b"")
    if "chunked" in length:
        data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
    head = f"POST /v1/files HTTP/1.1\nHost: x\nAuthorization: Bearer admin-key\nContent-Type: {FORM}\n{length}\n\n"
    with socket.create_connection(("127.0.0.1", door.server.port)) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + data)
        door.server.until(lambda: door.stored() != before, every=0.01)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    door.server.until(lambda: door.stored() == before, every=0.01)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(ROWS))
def test_a_job_fails_at_the_row_that_cannot_be_used(door, kind):
    bad, reason = ROWS[kind]
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    job = door.create(door.put(json.dumps(ROW).encode() + b"\n\n" + line + b"\n", "bad.jsonl"))
    failed = door.server.wait_for(job.id, "failed")
    error = failed.error
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert error.message.startswith("bad.jsonl:3: ") and reason in error.message and len(error.message) < 1000
    assert failed.finished_at and failed.fine_tuned_model is None
    assert error.message in door.server.client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].message


@pytest.mark.parametrize(
    ("param", "content", "message"),
    [
        ("training_file", b"\n \n", "bad.jsonl: no row"),
        ("validation_file", b"\n", "bad.jsonl: no row"),
        ("validation_file", b"{", "bad.jsonl:1: not JSON"),
    ],
)
def test_a_job_names_the_file_that_cannot_be_used(door, param, content, message):
    files = {"training_file": door.files[0], param: door.put(content, "bad.jsonl")}
    failed = door.server.wait_for(door.create(**files).id, "failed")
    assert (failed.error.code, failed.error.param) == (f"invalid_{param}", param) and failed.error.message.startswith(
        message
    )


@pytest.mark.parametrize(
    "kind", ["label out of range", "invocation missing", "too many options", "unknown form", "label a long text"]
)
def test_rows_for_a_running_job_are_taken_whole_or_not_at_all(door, kind):
    answer = door.http.post(f"/mezo/jobs/{door.running}/examples", json={"rows": [ROW, ROWS[kind][0]]})
    check(answer.status_code, answer.json()["error"], 400, "rows.1", "invalid_row", f"rows[1]: {ROWS[kind][1]}")
    assert list((door.server.directory / "jobs" / door.running).glob("appended-*")) == []


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*few(JOBS), *NAMED_JOBS])
def test_a_wrong_job_is_refused_with_the_field_at_fault(door, kind):
    changes, expected = (JOBS | NAMED_JOBS)[kind]
    jobs = door.admin.fine_tuning.jobs
    newest = door.server.client.fine_tuning.jobs.list(limit=1).data[0].id
    with pytest.raises(openai.APIStatusError) as caught:
        jobs.create(model="reviews-model", training_file=door.files[0], extra_body=changes)
    check(caught.value.status_code, caught.value.body, *expected)
    assert door.server.client.fine_tuning.jobs.list(limit=1).data[0].id == newest


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/mezo/jobs/{running}/examples"])
@pytest.mark.parametrize("kind", few(BODIES))
def test_a_body_that_cannot_be_read_is_refused(door, kind, path):
    content, status, message = BODIES[kind]
    answer = door.http.post(door.path(path), content=content, headers={"Content-Type": "application/json"})
    check(
        answer.status_code,
        answer.json()["error"],
        status,
        None,
        "file_too_large" if status == 413 else "invalid_json",
        message,
    )


def test_a_body_of_another_type_is_refused(door):
    answer = door.http.post("/v1/fine_tuning/jobs", content=b"model=a")
    check(answer.status_code, answer.json()["error"], 400, "Content-Type", "invalid_content_type", "application/json")


# --- requests about jobs, files and models ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=[f"{method} {path[:60]}" for method, path, *_ in REQUESTS])
def test_a_request_that_cannot_be_carried_out_says_why(door, number):
    method, path, body, expected = REQUESTS[number]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    http = door.server.http if method == "GET" else door.http
    answer = http.request(method, door.path(path), content=content, headers={"Content-Type": "application/json"})
    status, param, code, message = expected
    check(answer.status_code, answer.json()["error"], status, param, code, door.path(message))


def test_a_checkpoint_is_published_for_its_own_job_only(door):
    checkpoint = door.server.client.fine_tuning.jobs.checkpoints.list(door.done).data[0].id
    answer = door.http.post(f"/mezo/jobs/{door.paused}/publish", json={"checkpoint": checkpoint})
    check(
        answer.status_code,
        answer.json()["error"],
        404,
        "checkpoint",
        "not_found",
        f"no such checkpoint: '{checkpoint}'",
    )


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_adapter_that_cannot_be_applied_is_refused(door, tmp_path, kind):
    damage, message = DAMAGES[kind]
    folder = shutil.copytree(door.server.directory / "jobs" / door.done / "adapters" / "v1", tmp_path / "adapter")
    damage(folder)
    answer = door.http.post("/load_lora_adapter", json={"lora_name": "damaged", "lora_path": str(folder)})
    body = answer.json()
    assert (answer.status_code, body["success"]) == (400, False) and message in body["error_message"]
    assert "damaged" not in body["loaded_adapters"]


def test_tensors_that_are_none_are_refused(door):
    body = {"lora_name": "damaged", "config_dict": {}, "serialized_named_tensors": ["aGVsbG8="]}
    answer = door.http.post("/load_lora_adapter_from_tensors", json=body)
    assert answer.status_code == 400 and "serialized_named_tensors" in answer.json()["error_message"]


@pytest.mark.parametrize(
    "adapter", ["nobody", "deleted", "cancelled", "running", "../../etc", "done:ckpt-step-7", "a:b:c"]
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_model_that_does_not_exist_answers_nothing(door, route, adapter):
    prompt = {"prompt": "a"} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = door.server.http.post(
        f"/v1/{route}", json={"model": f"reviews-model:{adapter}", "max_tokens": 1, **prompt}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (
        404,
        "model_not_found",
    ) and adapter in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_no_address_is_a_path(door, path):
    status, body = door.raw(f"GET {path} HTTP/1.1\nHost: x\nAuthorization: Bearer user-key\nConnection: close")
    assert status == 404 and (
        body == {"detail": "Not Found"} or body["error"]["code"] in ("not_found", "model_not_found")
    )


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong", "USER-KEY", "user-key"])
def test_what_changes_something_needs_the_administrators_key_and_what_reads_a_users(door, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with http_client(door.server.url, headers=headers, timeout=300) as http:
        for method, path in CHANGES:
            assert http.request(method, door.path(path)).status_code == 401, path
        for path in READS:
            assert http.get(door.path(path)).status_code == (200 if key == "user-key" else 401), path
    assert door.server.job(door.running).status == "running"


def test_the_client_says_that_its_key_is_wrong(door):
    for key in ("none", "user-key"):
        client = openai_client(door.server.url, key)
        with pytest.raises(openai.AuthenticationError):
            client.fine_tuning.jobs.create(model="reviews-model", training_file=door.files[0])


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, marks=[pytest.mark.slow] * (flags not in few(REFUSED_FLAGS))) for flags in REFUSED_FLAGS],
)
def test_a_server_that_cannot_train_says_so_and_ends(door, refused_starts, flags):
    status, output = refused_starts[flags].result()
    assert status == 1 and f"sglang-mezo refuses to start: {REFUSED_FLAGS[flags]}" in output.splitlines()[-1]
    assert "Traceback" not in output and "Load weight begin" not in output
    assert "Load weight begin" in door.server.log_text()  # which a server says that does not stop before


@pytest.mark.slow
def test_a_second_server_on_the_same_folder_says_so_and_ends(door, second_start):
    status, output = second_start.result()
    assert status == 1 and "Traceback" not in output
    reason = f"--mezo-dir='{door.server.directory}' is not allowed: a folder that no other server uses"
    assert f"sglang-mezo refuses to start: {reason}" in output


# --- after everything ------------------------------------------------------------------------------------------------


def test_the_job_beside_all_this_has_gone_on(door):
    step = door.server.last_step(door.running)
    assert door.server.job(door.running).status == "running"
    door.server.wait_for_step(door.running, step + 20)
    assert door.admin.fine_tuning.jobs.cancel(door.running).status == "cancelled"


@pytest.mark.parametrize(
    "values",
    [{"learning_rate": 1e6}, {"learning_rate": 1e6, "max_steps": 1}, {"lora_alpha": 1e6, "zo_eps": 1e6}],
    ids=str,
)
def test_a_job_that_diverges_fails_alone(door, values):
    job = door.create(door.files[0], **{"clip_projected_grad": None, "max_steps": 1000, **values})
    failed = door.server.wait_for(job.id, "failed")
    assert failed.error.code == "DivergedError" and "lower learning_rate or zo_eps" in failed.error.message


def test_a_refused_update_leaves_the_adapter_as_it_was(door):
    before = door.http.post(f"/mezo/jobs/{door.paused}/evaluate", json=BATCH).raise_for_status().json()
    for wrong in ({"projected_grad": [1e38]}, {"learning_rate": 1e30}, {"projected_grad": [1.0, 1.0]}):
        assert door.http.post(f"/mezo/jobs/{door.paused}/update", json=STEP | wrong).status_code == 400
    answer = door.http.post(f"/mezo/jobs/{door.paused}/evaluate", json=BATCH | {"zo_eps": 1e6})
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "diverged"
    assert door.http.post(f"/mezo/jobs/{door.paused}/evaluate", json=BATCH).raise_for_status().json() == before
    assert door.admin.fine_tuning.jobs.resume(door.paused).status in ("queued", "running")
    door.server.wait_for_step(door.paused, before["step"] + 1)
    door.admin.fine_tuning.jobs.cancel(door.paused)


def test_a_small_job_still_succeeds(door):
    job = door.server.wait_for(door.create(*door.files, suffix="last", max_steps=3).id, "succeeded")
    answer = door.server.client.completions.create(
        model=job.fine_tuned_model, prompt=ROW["prompt"], max_tokens=1, temperature=0
    )
    assert answer.choices[0].text


def test_an_update_that_would_lead_an_adapter_astray_is_refused_and_the_adapter_answers_as_before(door):
    job = door.server.wait_for(door.create(door.files[0], suffix="astray", max_steps=1).id, "succeeded")
    astray = {"zo_random_seed": 1, "projected_grad": [1e30], "learning_rate": 1e6}
    refusal = door.http.post(f"/mezo/jobs/{job.id}/update", json=astray)
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "projected_grad", refusal.text
    for sampling in (
        {"temperature": 1},
        {"temperature": 1, "top_p": 0.5},
        {"temperature": 1, "top_k": 5, "min_p": 0.1},
    ):
        body = {"model": job.fine_tuned_model, "prompt": ROW["prompt"], "max_tokens": 4, **sampling}
        assert (
            door.http.post("/v1/completions", json=body, headers={"Authorization": "Bearer user-key"}).status_code
            == 200
        )


def test_nothing_is_left_behind(door):
    directory = door.server.directory
    assert {path.name for path in directory.parent.iterdir()} == {"mezo", "mezo.log"}
    names = {path.name for path in directory.iterdir() if not path.name.startswith("mezo.sqlite-")}
    assert names == {"files", "jobs", "mezo.lock", "mezo.sqlite"}
    assert door.stored() == {file.id for file in door.server.client.files.list()}
    jobs = {job.id for job in door.server.client.fine_tuning.jobs.list(limit=100)}
    assert {path.name for path in (directory / "jobs").iterdir()} <= jobs
    assert [path for path in directory.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")] == []


def test_no_answer_was_a_failure_of_the_server(door):
    log = door.server.log_text()
    assert '" 500' not in log and " failed\n" not in log
