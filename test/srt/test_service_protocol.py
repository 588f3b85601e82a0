"""What goes over the wire has OpenAI's fields, read back here by the types of its own client."""

import json

import pytest
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import ValidationError

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.service.http.endpoint import invalid
from sglang.srt.mezo.service.http.protocol import (
    CreateJob,
    bounded_page_object,
    checkpoint_object,
    checkpoint_page_object,
    estimated_finish,
    event_object,
    file_object,
    job_object,
    model_object,
    page_object,
)
from sglang.srt.mezo.service.store.database import Page
from sglang.srt.mezo.service.wire.records import GOES_ON, StoredCheckpoint, StoredEvent, StoredFile, StoredJob

FILE = StoredFile("file-1", "train.jsonl", "fine-tune", 120, 1_700_000_000, "processed")


def job(**changes) -> StoredJob:
    fields = {
        "id": "ftjob-1",
        "created_at": 1_700_000_000,
        "finished_at": None,
        "status": "running",
        "model": "tiny",
        "training_file": "file-1",
        "validation_file": None,
        "seed": 7,
        "suffix": None,
        "adapter_name": "ft-1",
        "metadata": {},
        "request": {},
        "hyperparameters": {"n_epochs": 32, "batch_size": 16, "learning_rate_multiplier": 1},
        "config": MezoConfig(max_steps=2000, target_modules=["q_proj"], tuning="lora").to_dict(),
        "fine_tuned_model": None,
        "trained_tokens": None,
        "error": None,
        "step": 10,
        "version": 0,
    }
    return StoredJob(**fields | changes)


def has_all_fields(wire, model, *but):
    """OpenAI's type takes it, and misses none of its fields."""
    model.model_validate(wire)
    assert set(model.model_fields) - set(but) <= wire.keys()
    assert json.loads(json.dumps(wire)) == wire


def test_a_file():
    has_all_fields(file_object(FILE), FileObject)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"status": "succeeded", "finished_at": 1_700_000_100, "fine_tuned_model": "tiny:ft-1", "trained_tokens": 5000},
        {
            "status": "failed",
            "error": {"code": "invalid_training_file", "message": "train.jsonl:3: not JSON", "param": "training_file"},
        },
        {"metadata": {"run": "a"}, "validation_file": "file-2"},
    ],
)
def test_a_job(changes):
    stored = job(**changes)
    wire = job_object(stored)
    has_all_fields(wire, FineTuningJob)
    assert {name: wire[name] for name in changes} == changes
    assert wire["object"] == "fine_tuning.job"
    assert wire["result_files"] == []


def test_a_job_carries_every_hyperparameter_as_resolved():
    parsed = FineTuningJob.model_validate(job_object(job()))
    assert parsed.method.type == "supervised"
    hyperparameters = parsed.method.supervised.hyperparameters
    assert (hyperparameters.n_epochs, hyperparameters.batch_size, hyperparameters.learning_rate_multiplier) == (
        32,
        16,
        1,
    )
    assert (hyperparameters.zo_eps, hyperparameters.max_steps, hyperparameters.max_tokens_per_batch) == (
        0.01,
        2000,
        4096,
    )
    assert not hasattr(hyperparameters, "output_dir")
    assert parsed.hyperparameters.n_epochs == 32


def test_an_event():
    wire = event_object(
        StoredEvent("ftjob-1", "Step 10/2000: training loss=0.61", "info", "metrics", {"step": 10, "train_loss": 0.61})
    )
    has_all_fields(wire, FineTuningJobEvent)
    assert wire["data"] == {"step": 10, "train_loss": 0.61}
    assert event_object(StoredEvent("ftjob-1", "Fine-tuning job started"))["data"] is None


def test_a_checkpoint_has_a_name_that_the_server_answers_to():
    checkpoint = StoredCheckpoint(
        "ftjob-1", 250, "ft-1:ckpt-step-250", "run/checkpoint-250", {"step": 250, "train_loss": 0.5}
    )
    wire = checkpoint_object(checkpoint, "tiny")
    has_all_fields(wire, FineTuningJobCheckpoint)
    assert wire["fine_tuned_model_checkpoint"] == "tiny:ft-1:ckpt-step-250"
    assert "directory" not in wire


def test_a_model():
    has_all_fields(model_object("tiny:ft-1", 1_700_000_000, "tiny", 128), Model)


def test_a_list_says_whether_it_goes_on():
    assert page_object(Page([FILE], True), file_object) == {
        "object": "list",
        "data": [file_object(FILE)],
        "has_more": True,
    }
    bounds = bounded_page_object(Page([FILE], True), file_object)
    assert (bounds["first_id"], bounds["last_id"]) == (FILE.id, FILE.id)
    checkpoints = [StoredCheckpoint("ftjob-1", step, f"ft-1:ckpt-step-{step}", "", {}) for step in (20, 10)]
    page = checkpoint_page_object(Page(checkpoints, False), "tiny")
    assert (page["first_id"], page["last_id"], page["has_more"]) == (checkpoints[0].id, checkpoints[1].id, False)
    empty = checkpoint_page_object(Page([], False), "tiny")
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


def metrics(created_at, step):
    return StoredEvent("ftjob-1", "Step", "info", "metrics", {"step": step, "max_steps": 100}, created_at=created_at)


def test_the_pace_is_that_since_the_last_start():
    """Ten hours later."""
    events = [metrics(37_020, 30), metrics(37_000, 20), StoredEvent("ftjob-1", GOES_ON), metrics(1000, 10)]
    assert estimated_finish(job(), events) == 37_020 + 70 * 2


def test_the_end_is_estimated_from_the_pace_of_the_newest_events():
    events = [metrics(1040, 30), StoredEvent("ftjob-1", "Checkpoint created"), metrics(1020, 20), metrics(1000, 10)]
    assert estimated_finish(job(), events) == 1040 + 70 * 2
    assert estimated_finish(job(status="paused"), events) is None


@pytest.mark.parametrize(
    "events",
    [
        [],
        [metrics(1000, 10)],
        [metrics(1000, 10), metrics(1000, 10)],
        [metrics(1000, 30), metrics(4600, 10)],
        [StoredEvent("ftjob-1", "started")],
    ],
)
def test_the_end_is_not_guessed(events):
    assert estimated_finish(job(), events) is None


MINIMAL = {"model": "tiny", "training_file": "file-1"}


def supervised(settings):
    return {"method": {"type": "supervised", "supervised": settings}}


def test_a_job_needs_a_model_and_a_training_file_only():
    body = CreateJob.model_validate(MINIMAL)
    assert body.model_dump(exclude_unset=True) == MINIMAL


@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(("validation_file", "suffix", "seed", "metadata", "integrations", "method", "hyperparameters")),
        {"validation_file": "file-2", "suffix": "a" * 64, "seed": 2**63 - 1, "integrations": []},
        {"metadata": {f"key {i}": "v" * 512 for i in range(16)}},
        supervised({"hyperparameters": {"zo_eps": 1, "n_epochs": "auto"}}),
        supervised(None),
    ],
)
def test_a_body_is_kept_as_it_was_sent(more):
    assert CreateJob.model_validate(MINIMAL | more).model_dump(exclude_unset=True) == MINIMAL | more


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"model": 3}, "model", "model=3 is not allowed: a valid string"),
        ({"model": None}, "model", "model=None is not allowed: a valid string"),
        ({"training_file": ["file-1"]}, "training_file", "training_file=['file-1'] is not allowed: a valid string"),
        ({"suffix": ""}, "suffix", "suffix='' is not allowed: String should have at least 1 character"),
        ({"suffix": "a" * 65}, "suffix", "String should have at most 64 characters"),
        ({"seed": "7"}, "seed", "seed='7' is not allowed: a valid integer"),
        ({"seed": True}, "seed", "seed=True is not allowed: a valid integer"),
        ({"seed": -1}, "seed", "seed=-1 is not allowed: greater than or equal to 0"),
        ({"seed": 2**63}, "seed", f"less than {2**63}"),
        ({"metadata": {"a": 1}}, "metadata.a", "metadata.a=1 is not allowed: a valid string"),
        ({"metadata": {"a": "v" * 513}}, "metadata.a", "at most 512 characters"),
        ({"metadata": {"": "v"}}, "metadata.", "at least 1 character"),
        ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}", "at most 64 characters"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "at most 16 items"),
        ({"metadata": []}, "metadata", "metadata=[] is not allowed: a valid dictionary"),
        ({"method": {"type": "dpo"}}, "method.type", "method.type='dpo' is not allowed: 'supervised'"),
        ({"method": {}}, "method.type", "method.type is missing"),
        ({"method": "supervised"}, "method", "method='supervised' is not allowed"),
        (supervised({"hyperparameters": [1]}), "method.supervised.hyperparameters", "a valid dictionary"),
        (supervised({"beta": 1}), "method.supervised.beta", "not supported here: method.supervised.beta"),
        ({"epochs": 3, "organization": "x"}, "epochs", "not supported here: epochs, organization"),
        ({"hyperparameters": 3}, "hyperparameters", "hyperparameters=3 is not allowed: a valid dictionary"),
    ],
)
def test_a_wrong_body_is_an_error_with_field_value_and_what_is_allowed(more, param, message):
    with pytest.raises(ValidationError) as caught:
        CreateJob.model_validate(MINIMAL | more)
    error = invalid(caught.value.errors(include_url=False))
    assert (error.status, error.param) == (400, param)
    assert message in error.message


@pytest.mark.parametrize("name", ["model", "training_file"])
def test_what_is_missing_is_named(name):
    with pytest.raises(ValidationError) as caught:
        CreateJob.model_validate({key: value for key, value in MINIMAL.items() if key != name})
    error = invalid(caught.value.errors(include_url=False))
    assert (error.message, error.param, error.code) == (f"{name} is missing", name, "missing_parameter")
