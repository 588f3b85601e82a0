"""Records in a store, for tests."""

from dataclasses import replace

from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.records import StoredFile, StoredJob, new_id, now


def make_file(content: bytes, filename: str = "train.jsonl", purpose: str = "fine-tune") -> StoredFile:
    return StoredFile(new_id("file-"), filename, purpose, len(content), now(), "processed")


def add_file(
    store: Store, filename: str = "train.jsonl", content: bytes = b"{}\n", purpose: str = "fine-tune"
) -> StoredFile:
    file = make_file(content, filename, purpose)
    store.partial_path(file.id).write_bytes(content)
    return store.add_file(file)


def make_job(training_file: str, **changes) -> StoredJob:
    job_id = new_id("ftjob-")
    job = StoredJob(
        id=job_id,
        created_at=now(),
        finished_at=None,
        status="queued",
        model="opt",
        training_file=training_file,
        validation_file=None,
        seed=2**64 - 1,
        suffix=None,
        adapter_name=f"ft-{job_id[-8:]}",
        metadata={},
        request={"model": "opt", "method": {"type": "supervised"}},
        hyperparameters={"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 0.5},
        config={"learning_rate": 1e-3, "target_modules": ["q_proj"], "objective": None},
        fine_tuned_model=None,
        trained_tokens=None,
        error=None,
        step=0,
        version=0,
    )
    return replace(job, **changes)


def add_job(store: Store, **changes) -> StoredJob:
    return store.add_job(make_job(**{"training_file": add_file(store).id, **changes}))


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.directory)
