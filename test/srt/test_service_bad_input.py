"""Bad input of every kind, at SGLang's application with our routes and the manager behind it; nothing is trained."""

import pytest

from bad_input import BODIES, JOBS, ROW, ROWS, UPLOADS, check
from service_client import add_file, http, service, upstream  # noqa: F401
from service_server import anyio_backend, runtime_context, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.service.jobs import tokenising

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", UPLOADS)
def test_a_wrong_upload_is_refused_and_leaves_nothing(http, service, kind, streamed):
    body, content_type, expected = UPLOADS[kind]
    content = (body[start : start + 65536] for start in range(0, len(body), 65536)) if streamed else body
    answer = http.post("/v1/files", content=content, headers={"Content-Type": content_type})
    check(answer.status_code, answer.json()["error"], *expected)
    assert list((service.settings.directory / "files").iterdir()) == [] == service.store.files().data


@pytest.mark.parametrize("kind", JOBS)
def test_a_wrong_job_is_refused_with_the_field_at_fault(http, service, kind):
    changes, expected = JOBS[kind]
    answer = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": add_file(service)} | changes)
    check(answer.status_code, answer.json()["error"], *expected)
    assert service.store.jobs().data == []


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/mezo/jobs/{job}/examples"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_cannot_be_read_is_refused(http, service, kind, path):
    content, status, message = BODIES[kind]
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": add_file(service)}).json()
    answer = http.post(path.format(job=job["id"]), content=content, headers=JSON)
    code = "file_too_large" if status == 413 else "invalid_json"
    check(answer.status_code, answer.json()["error"], status, None, code, message)
    assert service.manager.calls == [] and len(service.store.jobs().data) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ROWS)
async def test_a_job_fails_at_the_row_that_cannot_be_used(tmp_path, tokenizer, monkeypatch, kind):
    monkeypatch.setattr(tokenising, "_SMALL_BYTES", 8 << 20)  # in this process, whatever its size
    bad, reason = ROWS[kind]
    async with serving(tmp_path, tokenizer, context_length=512, kv_capacity=20_000) as server:
        job = await server.until(await server.create(ROW, "", bad), "failed")
        error = job.error
        assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
        assert error["message"].startswith("train.jsonl:3: ") and reason in error["message"]
        assert len(error["message"]) < 1000 and job.finished_at is not None and job.fine_tuned_model is None
        assert error["message"] in server.messages(job)[-1]
