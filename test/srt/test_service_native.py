"""The routes beyond OpenAI's: what reaches the manager, what comes back, and what is refused on the way."""

import inspect
import json

import pytest

from service_app import RecordingManager
from service_client import http, service  # noqa: F401
from sglang.srt.mezo.service.jobs.manager import JobManager
from sglang.srt.mezo.service.wire.records import StoredFile, new_id, now

ROW = {"prompt": "a", "completion": "b"}


@pytest.fixture
def job_id(service, http):
    file_id = new_id("file-")
    service.store.partial_path(file_id).write_bytes(json.dumps(ROW).encode())
    service.store.add_file(StoredFile(file_id, "a.jsonl", "fine-tune", len(json.dumps(ROW)), now(), "processed"))
    body = {
        "model": "tiny",
        "training_file": file_id,
        "hyperparameters": {"num_perturbations": 2, "estimator": "two_sided", "zo_eps": 0.5},
    }
    return http.post("/v1/fine_tuning/jobs", json=body).json()["id"]


def test_the_stand_in_has_the_managers_methods():
    for name, method in inspect.getmembers(RecordingManager, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(getattr(JobManager, name)).parameters
            ), name


def test_examples_are_appended(http, service, job_id):
    response = http.post(f"/mezo/jobs/{job_id}/examples", json={"rows": [ROW, ROW]})
    assert response.json() == {"step": 11, "added": 2}
    assert service.manager.calls == [("append_rows", job_id, [ROW, ROW])]


@pytest.mark.parametrize(
    ("body", "checkpoint"), [({}, None), ({"checkpoint": None}, None), ({"checkpoint": "ftckpt_1"}, "ftckpt_1")]
)
def test_an_adapter_is_published(http, service, job_id, body, checkpoint):
    assert http.post(f"/mezo/jobs/{job_id}/publish", json=body).json() == {"model": "tiny:ft-1"}
    assert service.manager.calls == [("publish_checkpoint", job_id, checkpoint)]


@pytest.mark.parametrize(("sent", "zo_eps"), [({}, None), ({"zo_eps": None}, None), ({"zo_eps": 1}, 1.0)])
def test_a_perturbation_is_evaluated(http, service, job_id, sent, zo_eps):
    response = http.post(f"/mezo/jobs/{job_id}/evaluate", json={"rows": [ROW], "zo_random_seed": 2**64 - 1} | sent)
    assert response.json() == {"loss_plus": [0.5], "loss_minus": [0.25], "projected_grad": [12.5]}
    assert service.manager.calls == [("evaluate", job_id, [ROW], 2**64 - 1, zo_eps)]


@pytest.mark.parametrize(("sent", "publish"), [({}, True), ({"publish": False}, False)])
def test_an_update_is_applied(http, service, job_id, sent, publish):
    body = {"zo_random_seed": 3, "projected_grad": [1, -2.5], "learning_rate": 0.001} | sent
    assert http.post(f"/mezo/jobs/{job_id}/update", json=body).json() == {"step": 12, "model": "tiny:ft-1"}
    assert service.manager.calls == [("update", job_id, 3, [1.0, -2.5], 0.001, publish)]


UPDATE = {"zo_random_seed": 3, "projected_grad": [1.0, 2.0], "learning_rate": 0.001}
EVALUATE = {"rows": [ROW], "zo_random_seed": 3}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("examples", {}, "rows"),
        ("examples", {"rows": []}, "rows"),
        ("examples", {"rows": ROW}, "rows"),
        ("examples", {"rows": ["a"]}, "rows.0"),
        ("examples", {"rows": [ROW], "split": "eval"}, "split"),
        ("publish", {"checkpoint": 3}, "checkpoint"),
        ("publish", {"directory": "/etc"}, "directory"),
        ("evaluate", {"zo_random_seed": 3}, "rows"),
        ("evaluate", {"rows": [ROW]}, "zo_random_seed"),
        ("evaluate", EVALUATE | {"zo_random_seed": -1}, "zo_random_seed"),
        ("evaluate", EVALUATE | {"zo_random_seed": 2**64}, "zo_random_seed"),
        ("evaluate", EVALUATE | {"zo_random_seed": 1.5}, "zo_random_seed"),
        ("evaluate", EVALUATE | {"zo_random_seed": True}, "zo_random_seed"),
        ("evaluate", EVALUATE | {"zo_eps": 0}, "zo_eps"),
        ("evaluate", EVALUATE | {"zo_eps": "1"}, "zo_eps"),
        ("evaluate", EVALUATE | {"zo_eps": 1e300}, "zo_eps"),
        ("evaluate", EVALUATE | {"zo_eps": 1e-320}, "zo_eps"),
        ("evaluate", EVALUATE | {"rows": [ROW] * 257}, "rows"),
        ("update", UPDATE | {"projected_grad": 1.0}, "projected_grad"),
        ("update", UPDATE | {"projected_grad": [1.0, "2"]}, "projected_grad.1"),
        ("update", UPDATE | {"projected_grad": [1.0, 1e39]}, "projected_grad.1"),
        ("update", UPDATE | {"learning_rate": 0}, "learning_rate"),
        ("update", UPDATE | {"learning_rate": None}, "learning_rate"),
        ("update", UPDATE | {"learning_rate": 1e30}, "learning_rate"),
        ("update", UPDATE | {"publish": "yes"}, "publish"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field_at_fault(http, service, job_id, route, body, param):
    response = http.post(f"/mezo/jobs/{job_id}/{route}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert service.manager.calls == []


def test_rows_nested_too_deeply_are_refused_whole(http, service, job_id):
    body = b'{"rows": [{"text": "a", "extra": ' + b"[" * 900 + b"]" * 900 + b"}]}"
    response = http.post(f"/mezo/jobs/{job_id}/examples", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"] == "the body is nested too deeply"
    assert service.manager.calls == []


def test_rows_are_bounded_by_the_limit_of_files(http, service, job_id):
    big = {"rows": [{"prompt": "a" * (1 << 20), "completion": "b"}]}
    assert http.post(f"/mezo/jobs/{job_id}/examples", json=big).status_code == 413


@pytest.mark.parametrize("route", ["examples", "publish", "evaluate", "update"])
def test_an_unknown_job_is_not_found(http, route):
    response = http.post(f"/mezo/jobs/ftjob-none/{route}", json={})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert http.get("/mezo/jobs/ftjob-none/metrics").status_code == 404


def test_metrics_are_followed_line_by_line(http, service, job_id):
    def metrics(after):
        return http.get(f"/mezo/jobs/{job_id}/metrics", params={"after": after}).json()

    assert metrics(0) == {"data": [], "next": 0}
    path = service.store.job_directory(job_id) / "run" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        file.writelines(
            json.dumps({"step": step, "loss": float("nan") if step == 2 else 0.5}) + "\n" for step in range(1, 2503)
        )
        file.write('{"step": 2503, "lo')
    first = metrics(0)
    assert (first["next"], len(first["data"])) == (1000, 1000)
    assert first["data"][:2] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert [line["step"] for line in metrics(2000)["data"]] == list(range(2001, 2503))
    assert metrics(2502) == {"data": [], "next": 2502}
    with open(path, "a") as file:
        file.write('ss": 0.1}\n')
    assert metrics(2502) == {"data": [{"step": 2503, "loss": 0.1}], "next": 2503}
    with open(path, "a") as file:
        file.write('{"step": 2504, "lo{"step"\n{"step": 2505}\n')
    assert metrics(2503) == {"data": [{"step": 2505}], "next": 2505}, "a damaged line is left out, and counts"
    for after in ("-1", "x", "", "10000000000000000000"):
        assert http.get(f"/mezo/jobs/{job_id}/metrics", params={"after": after}).json()["error"]["param"] == "after"


def test_the_status_says_what_the_engine_can_do_and_does(http, service, job_id):
    status = http.get("/mezo/status").json()
    assert status["engine"]["max_lora_rank"] == 16
    assert status["settings"]["share"] == service.settings.share
    assert str(service.settings.directory) not in json.dumps(status)
    assert status["current_job"] is None
    service.store.update_job(job_id, status="running")
    status = http.get("/mezo/status").json()
    assert status["current_job"]["id"] == job_id
    assert status["serving"]["idle"]["count"] == 0
