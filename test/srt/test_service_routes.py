"""OpenAI's routes, called by its own client and by hand: objects, paging, errors, and who may call what."""

import json
import re

import openai
import pytest

from service_client import ROWS, add_file, add_job, client, http, service, upstream  # noqa: F401
from sglang.srt.mezo.service.http import routes
from sglang.srt.mezo.service.jobs.threads import ServiceThreads
from sglang.srt.mezo.service.wire.records import StoredCheckpoint, StoredEvent

JOBS = "/v1/fine_tuning/jobs"


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"a", b"a\nb\n", b" \n\na\r\n\t\nb", b"a\n" * 1000, b"x" * 5000 + b"\n \n" + b"y" * 3000, b" " * 99],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_rows_are_counted_a_piece_at_a_time(tmp_path, monkeypatch, content, piece):
    monkeypatch.setattr(routes, "_PIECE_BYTES", piece)
    (tmp_path / "rows").write_bytes(content)
    assert routes._count_rows(tmp_path / "rows") == max(1, sum(bool(line.strip()) for line in content.split(b"\n")))


def supervised(**hyperparameters):
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def error_of(response, status):
    """OpenAI's nested error, and nothing beside it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert isinstance(body["error"]["code"], str)
    return body["error"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_through_the_client(client, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    with open(path, "rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "train.jsonl",
        len(ROWS),
        "fine-tune",
        "processed",
    )
    assert client.files.wait_for_processing(file.id) == client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    assert [listed.id for listed in client.files.list()] == [file.id]
    assert client.files.delete(file.id).deleted
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError, match=f"no such file: '{file.id}'"):
        client.files.content(file.id)


def test_files_are_paged_in_either_order(client, service):
    ids = [add_file(service) for _ in range(5)]
    page = client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == ([ids[4], ids[3]], True)
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list(after=ids[2])] == [ids[1], ids[0]]
    assert list(client.files.list(purpose="batch")) == []
    assert not client.files.list(limit=5).has_more
    assert not client.files.list(limit=10_000).has_more


def test_result_files_are_downloaded_and_nothing_is_trained_on_them(client, service):
    result = add_file(service, b"step,train_loss\n1,0.5\n", purpose="fine-tune-results", filename="step_metrics.csv")
    job = add_job(client, service)
    service.store.update_job(job.id, status="succeeded", result_files=[result])
    [listed] = client.fine_tuning.jobs.retrieve(job.id).result_files
    assert client.files.retrieve(listed).purpose == "fine-tune-results"
    response = client.files.content(listed)
    assert (
        response.text == "step,train_loss\n1,0.5\n"
        and f"{listed}.csv" in response.response.headers["content-disposition"]
    )
    for field in ("training_file", "validation_file"):
        with pytest.raises(
            openai.BadRequestError, match="its purpose is 'fine-tune-results', and 'fine-tune' is needed"
        ) as caught:
            client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": job.training_file, field: result})
        assert caught.value.param == field
    assert client.files.delete(listed).deleted


def test_a_file_in_use_stays(client, service):
    job = add_job(client, service)
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(job.training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(job.training_file).deleted


@pytest.mark.parametrize("filename", ["../../etc/passwd", 'a"b\r\nSet-Cookie: x', "имя.jsonl", "\0", "x;y=z"])
def test_a_download_carries_any_filename_harmlessly(http, service, filename):
    file_id = add_file(service, filename=filename)
    response = http.get(f"/v1/files/{file_id}/content")
    assert response.content == ROWS
    disposition = response.headers["content-disposition"]
    assert re.fullmatch(rf"attachment; filename={file_id}\.jsonl; filename\*=UTF-8''[\w.%~-]+", disposition, re.ASCII)
    assert "set-cookie" not in response.headers
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("file_id", ["file-none", "..%2Fmezo.sqlite", "%2Fetc%2Fpasswd", "file-%00", "x" * 5000])
def test_no_id_is_a_path(http, file_id):
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert http.get(path).status_code in (404, 405)
    assert http.delete(f"/v1/files/{file_id}").status_code in (404, 405)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_is_created_with_everything_resolved(client, service):
    validation = add_file(service)
    job = add_job(
        client,
        service,
        validation_file=validation,
        suffix="sentiment",
        seed=5,
        metadata={"run": "a"},
        method=supervised(n_epochs="auto", zo_eps=0.001, invocation=" It was", r=4),
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "tiny", 5)
    assert (job.organization_id, job.result_files, job.fine_tuned_model) == ("sglang-mezo", [], None)
    assert (job.validation_file, job.metadata, job.error) == (validation, {"run": "a"}, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (100, 16)
    resolved = job.method.supervised.hyperparameters
    assert (resolved.zo_eps, resolved.r, resolved.tuning, resolved.max_tokens_per_batch) == (0.001, 4, "alora", 256)
    stored = service.store.job(job.id)
    assert stored.config["seed"] == 5
    assert stored.adapter_name == "sentiment"
    assert stored.request["suffix"] == "sentiment"
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_the_older_hyperparameters_and_the_model_path_do_as_well(client, service):
    job = client.fine_tuning.jobs.create(
        model="/models/tiny", training_file=add_file(service), hyperparameters={"n_epochs": 2}
    )
    assert job.hyperparameters.n_epochs == 2
    assert job.model == "tiny"


def test_a_seed_is_drawn_kept_and_told(client, service):
    seeds = {add_job(client, service).seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)
    job = add_job(client, service)
    assert service.store.job(job.id).config["seed"] == service.store.job(job.id).seed == job.seed


def test_cancel_pause_and_resume(client, service):
    job = add_job(client, service)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled that is cancelled"):
        client.fine_tuning.jobs.cancel(job.id)


def test_jobs_events_and_checkpoints_are_paged(client, service):
    jobs = [add_job(client, service).id for _ in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == jobs[::-1]
    for step in range(1, 8):
        service.store.add_event(jobs[0], "info", f"Step {step}", "metrics", {"step": step})
        service.store.add_checkpoint(
            StoredCheckpoint(jobs[0], step, f"a:ckpt-step-{step}", f"run/checkpoint-{step}", {"step": step})
        )
    events = list(client.fine_tuning.jobs.list_events(jobs[0], limit=3))
    assert [event.message for event in events] == [
        *(f"Step {step}" for step in range(7, 0, -1)),
        f"Created fine-tuning job: {jobs[0]}",
    ]
    assert [event.type for event in events] == ["metrics"] * 7 + ["message"]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(jobs[0], limit=3))
    assert [checkpoint.step_number for checkpoint in checkpoints] == list(range(7, 0, -1))
    assert checkpoints[0].fine_tuned_model_checkpoint == "tiny:a:ckpt-step-7"
    assert not client.fine_tuning.jobs.checkpoints.list(jobs[0], limit=7).has_more
    assert client.fine_tuning.jobs.checkpoints.list(jobs[0], limit=6).has_more
    assert list(client.fine_tuning.jobs.checkpoints.list(jobs[1])) == []


def test_jobs_are_found_by_metadata(client, service):
    one = add_job(client, service, metadata={"run": "a", "team": "x"}).id
    two = add_job(client, service, metadata={"run": "b", "team": "x"}).id
    none = add_job(client, service).id

    def found(**query):
        return [job.id for job in client.fine_tuning.jobs.list(**query)]

    assert found(metadata={"team": "x"}) == [two, one]
    assert found(metadata={"team": "x", "run": "a"}) == [one]
    assert found(metadata={"team": "y"}) == []
    assert found(extra_query={"metadata": "null"}) == [none]
    with pytest.raises(openai.BadRequestError, match="metadata='x' is not allowed"):
        found(extra_query={"metadata": "x"})
    assert found(metadata={f"k{i}": "v" for i in range(16)}) == []
    with pytest.raises(openai.BadRequestError, match="1200 pairs of metadata are not allowed: at most 16"):
        found(metadata={f"k{i}": "v" for i in range(1200)})


def test_a_running_job_says_when_it_will_be_done(client, service):
    job = add_job(client, service)
    for step in (10, 20):
        data = {"step": step, "max_steps": 100}
        service.store.update_job(
            job.id, StoredEvent(job.id, "Step", "info", "metrics", data, created_at=1000 + 2 * step), status="running"
        )
    assert client.fine_tuning.jobs.retrieve(job.id).estimated_finish == 1200
    assert [listed.estimated_finish for listed in client.fine_tuning.jobs.list()] == [1200]


WRONG_JOBS = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found", "this server trains 'tiny' or '/models/tiny'"),
    ({"suffix": "taken"}, 409, "suffix", "conflict", "is taken"),
    ({"seed": "1"}, 400, "seed", "invalid_value", "seed='1' is not allowed"),
    ({"method": {"type": "dpo", "dpo": {}}}, 400, "method.dpo", "unknown_parameter", "method.dpo"),
    (
        {"hyperparameters": {"output_dir": "/tmp"}},
        400,
        "hyperparameters.output_dir",
        "unknown_parameter",
        "is not a hyperparameter",
    ),
]


@pytest.mark.parametrize(("more", "status", "param", "code", "message"), WRONG_JOBS)
def test_a_wrong_job_is_refused_with_the_field_at_fault(http, service, more, status, param, code, message):
    body = {"model": "tiny", "training_file": add_file(service)} | more
    error = error_of(http.post(JOBS, json=body), status)
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]
    assert service.store.jobs().data == []


def test_a_file_with_another_purpose_is_no_training_data(http, service):
    file_id = add_file(service, purpose="fine-tune-results")
    error = error_of(http.post(JOBS, json={"model": "tiny", "training_file": file_id}), 400)
    assert error["param"] == "training_file"
    assert "its purpose is 'fine-tune-results'" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m" * 500_000, "training_file": "file-1"},
        {"model": "tiny", "training_file": "f" * 500_000},
        {"model": "tiny", "training_file": "file-1", "q" * 500_000: 1},
        {"model": "tiny", "training_file": "file-1", **{str(number): 1 for number in range(50_000)}},
        {"model": "tiny", "training_file": "file-1", "metadata": {"k" * 500_000: "v"}},
        {"model": "tiny", "training_file": "file-1", "suffix": "s" * 500_000},
    ],
)
def test_an_error_repeats_the_beginning_of_what_is_wrong_only(http, body):
    response = http.post(JOBS, json=body)
    assert response.status_code in (400, 404) and len(response.content) < 2000


def test_an_unknown_hyperparameter_is_not_repeated_whole(http, service):
    response = http.post(
        JOBS, json={"model": "tiny", "training_file": add_file(service), "hyperparameters": {"q" * 500_000: 1}}
    )
    assert response.status_code == 400 and len(response.content) < 2000


def test_a_body_without_length_is_cut_off(http):
    response = http.post(JOBS, content=(b"x" * 65536 for _ in range(32)), headers={"Content-Type": "application/json"})
    assert error_of(response, 413)["code"] == "file_too_large"


def test_a_body_of_another_type_is_refused(http):
    error = error_of(http.post(JOBS, content=b'{"model": "tiny"}', headers={"Content-Type": "text/plain"}), 400)
    assert error["param"] == "Content-Type"


@pytest.mark.parametrize("path", ["/v1/files", JOBS, f"{JOBS}/{{job}}/events", f"{JOBS}/{{job}}/checkpoints"])
def test_a_wrong_page_is_refused(http, service, path):
    job_id = http.post(JOBS, json={"model": "tiny", "training_file": add_file(service)}).json()["id"]
    path = path.format(job=job_id)
    for limit in ("0", "-1", "10001", "x", "1.5", ""):
        error = error_of(http.get(path, params={"limit": limit}), 400)
        assert error["param"] == "limit"
        assert error["message"].startswith(f"limit={limit!r} is not allowed: ")
    error = error_of(http.get(path, params={"after": "none"}), 404)
    assert error["param"] == "after"


def test_a_wrong_order_is_refused(http):
    assert "'asc' or 'desc'" in error_of(http.get("/v1/files", params={"order": "up"}), 400)["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{JOBS}/ftjob-none"),
        ("POST", f"{JOBS}/ftjob-none/cancel"),
        ("POST", f"{JOBS}/ftjob-none/pause"),
        ("POST", f"{JOBS}/ftjob-none/resume"),
        ("GET", f"{JOBS}/ftjob-none/events"),
        ("GET", f"{JOBS}/ftjob-none/checkpoints"),
        ("GET", "/v1/files/file-none"),
        ("DELETE", "/v1/files/file-none"),
    ],
)
def test_what_does_not_exist_is_not_found(http, method, path):
    error = error_of(http.request(method, path), 404)
    assert error["code"] == "not_found"
    assert "-none" in error["message"]


def test_an_unexpected_exception_says_nothing_of_the_inside(http, service, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service.store, "file", broken)
    error = error_of(http.get("/v1/files/file-1"), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in json.dumps(error)
    assert "secret detail" in caplog.text


def test_before_the_service_is_ready_all_but_serving_waits(http, service, monkeypatch):
    service.ready = False
    with monkeypatch.context() as patch:
        patch.setattr(service, "threads", ServiceThreads())  # they are started with the service
        error = error_of(http.get("/v1/files"), 503)
        assert error["code"] == "not_ready"
        assert error_of(http.get("/mezo/status"), 503)["code"] == "not_ready"
        assert error_of(http.post(JOBS, json={}), 503)["code"] == "not_ready"
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny"]
        assert http.get("/v1/models/tiny").json()["id"] == "tiny"
