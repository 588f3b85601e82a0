"""A store with something in it, and what may become of its folder."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.records import StoredFile, StoredJob
from stored import add_file, make_job

OF_SQLITE = ("mezo.sqlite", "mezo.sqlite-wal", "mezo.sqlite-shm", "mezo.lock")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "service")
    yield store
    store.close()


def contents(directory: Path) -> dict[str, bytes]:
    """Everything but what SQLite and locks are made of."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in OF_SQLITE)
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def full_store(store: Store) -> tuple[list[StoredFile], StoredJob]:
    """Three files, and a job with a run and a published version; the store is closed then."""
    files = [add_file(store, content=f"{i}\n".encode()) for i in range(3)]
    job = store.add_job(make_job(files[0].id, status="succeeded", adapter_name="mine"))
    publish(store, job)
    (store.job_directory(job.id) / "run" / "checkpoint-5").mkdir(parents=True)
    (store.job_directory(job.id) / "run" / "seed_log").write_text("log")
    store.close()
    return files, job


def publish(store: Store, job: StoredJob) -> int:
    version = store.new_version(job.id)
    folder = store.version_directory(job.id, version)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(f"version {version}")
    earlier = store.job(job.id).version
    store.update_job(job.id, version=version)
    store.delete_version(job.id, earlier)
    return version


def refused(directory: Path, *words: str) -> None:
    """A store does not open there, says why in one line, and leaves everything as it is."""
    before = contents(directory)
    for open_store in (Store, folder.make):
        try:
            open_store(directory)
        except ConfigError as error:
            assert "\n" not in str(error) and all(
                word in str(error) for word in ("--mezo-dir", str(directory), *words)
            ), error
        else:
            assert open_store is not Store
    assert contents(directory) == before


def edit(directory: Path, statement: str, *values) -> None:
    with closing(sqlite3.connect(directory / "mezo.sqlite")) as connection, connection:
        connection.execute(statement, values)
