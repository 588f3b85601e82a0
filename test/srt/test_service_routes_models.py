"""Routes for models, and who may call which route."""

import re

import openai
import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from service_app import ADMIN_KEY, API_KEY, UPSTREAM, make_app
from service_client import ROWS, add_job, client, http, service, upstream  # noqa: F401
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mezo.service.wire.records import StoredCheckpoint

# --- models -----------------------------------------------------------------------------------------------------------


def published(client, service, suffix):
    job = add_job(client, service, suffix=suffix)
    service.store.update_job(
        job.id, status="succeeded", fine_tuned_model=f"tiny:{suffix}", version=1, finished_at=1_700_000_000
    )
    return job


def test_models_are_sglangs_and_ours(client, service, upstream):
    job = published(client, service, "mine")
    add_job(client, service, suffix="unfinished")
    service.store.add_checkpoint(StoredCheckpoint(job.id, 5, "mine:ckpt-step-5", "run/checkpoint-5", {}))
    for name in ("theirs", "mine", "mine:ckpt-step-5"):
        upstream[name] = LoRARef(lora_name=name, lora_path=f"/adapters/{name}")
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "theirs", "tiny:mine"]
    mine = models["tiny:mine"]
    assert (mine.parent, mine.owned_by, mine.created) == ("tiny", "sglang-mezo", 1_700_000_000)
    assert models["theirs"].parent == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.models.retrieve("tiny:mine") == models["tiny:mine"]
    assert client.models.retrieve("tiny:mine:ckpt-step-5").parent == "tiny"
    for unknown in ("mine", "tiny:unfinished", "other:mine"):
        with pytest.raises(openai.NotFoundError, match=unknown):
            client.models.retrieve(unknown)


def test_a_model_is_deleted(client, service):
    published(client, service, "mine")
    assert client.models.delete("tiny:mine").deleted
    assert service.manager.calls == [("delete_model", "mine")]
    assert [model.id for model in client.models.list()] == ["tiny"]
    for unknown in ("tiny:mine", "tiny", "tiny:", "mine"):
        with pytest.raises(openai.NotFoundError, match="there is no fine-tuned model"):
            client.models.delete(unknown)


def test_checkpoints_of_a_job_that_was_cancelled_are_deleted_by_its_models_name(client, service):
    job = add_job(client, service, suffix="half")
    service.store.add_checkpoint(StoredCheckpoint(job.id, 5, "half:ckpt-step-5", "run/checkpoint-5", {}))
    service.store.update_job(job.id, status="cancelled")
    assert client.models.delete("tiny:half").deleted
    assert service.manager.calls == [("delete_model", "half")]


# --- authorisation ----------------------------------------------------------------------------------------------------


def our_routes(app):
    return [(method, route) for route in app.router.routes if route not in UPSTREAM for method in route.methods]


def test_each_route_of_ours_is_on_the_app_itself_with_a_level(service):
    routes = our_routes(make_app(service))
    assert len(routes) == 22
    assert all(isinstance(route, APIRoute) for _, route in routes)
    assert {method for method, _ in routes} == {"GET", "POST", "DELETE"}


@pytest.mark.parametrize(("api_key", "admin_api_key"), [(API_KEY, None), (API_KEY, ADMIN_KEY), (None, ADMIN_KEY)])
def test_who_may_call_what(service, api_key, admin_api_key):
    app = make_app(service, api_key, admin_api_key)
    http = TestClient(app, raise_server_exceptions=False)
    for method, route in our_routes(app):
        path = re.sub(r"\{[^}]*\}", "x", route.path)

        def allowed(*key):
            headers = {"Authorization": f"Bearer {key[0]}"} if key else {}
            return http.request(method, path, headers=headers).status_code != 401

        read_only = method == "GET"
        wanted = api_key if read_only or admin_api_key is None else admin_api_key
        others = {API_KEY, ADMIN_KEY, "wrong-key", ""} - {wanted}
        open_to_all = read_only and api_key is None
        assert allowed(wanted or "any"), (method, path)
        assert allowed() == open_to_all, (method, path)
        for key in others:
            assert allowed(key) == open_to_all, (method, path, key)


def test_a_wrong_key_changes_nothing(service):
    http = TestClient(make_app(service, API_KEY, ADMIN_KEY))
    form = {"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
    for key in ("wrong", API_KEY):
        assert http.post("/v1/files", headers={"Authorization": f"Bearer {key}"}, **form).status_code == 401
    assert service.store.files().data == []
    assert http.post("/v1/files", headers={"Authorization": f"Bearer {ADMIN_KEY}"}, **form).status_code == 200


def test_the_rest_of_the_app_keeps_its_own_errors(http):
    for response in (http.get("/v1/nothing"), http.put("/v1/files"), http.post("/v1/models")):
        assert response.status_code in (404, 405)
        assert response.json().keys() == {"detail"}
