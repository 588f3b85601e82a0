"""SGLang's application with our routes on it, and clients for it."""

from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from clients import openai_client
from service_app import make_app, make_service, serving
from sglang.srt.entrypoints import http_server
from sglang.srt.mezo.service.wire.records import StoredFile, new_id, now

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 40


@pytest.fixture(autouse=True)
def upstream(monkeypatch):
    """What SGLang's own model routes look at; adapters can be added to the dictionary."""
    adapters = {}
    tokenizer_manager = SimpleNamespace(
        served_model_name="tiny",
        model_config=SimpleNamespace(context_len=128),
        lora_registry=SimpleNamespace(get_all_adapters=lambda: adapters),
    )
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=tokenizer_manager))
    monkeypatch.setattr(http_server, "get_lora", lambda: SimpleNamespace(enable_lora=True))
    return adapters


@pytest.fixture
def service(tmp_path):
    service = make_service(tmp_path)
    yield service
    service.close()


@pytest.fixture
def http(service):
    return TestClient(make_app(service), raise_server_exceptions=False)


@pytest.fixture
def client(service):
    with serving(make_app(service)) as port:
        yield openai_client(f"http://127.0.0.1:{port}")


def add_file(service, content=ROWS, purpose="fine-tune", filename="train.jsonl"):
    file_id = new_id("file-")
    service.store.partial_path(file_id).write_bytes(content)
    return service.store.add_file(StoredFile(file_id, filename, purpose, len(content), now(), "processed")).id


def add_job(client, service, **more):
    return client.fine_tuning.jobs.create(model="tiny", training_file=add_file(service), **more)
