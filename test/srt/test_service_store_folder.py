"""A store's folder that is not as it should be, is locked, or cannot be written."""

import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.disk import storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from store_folder import contents, edit, full_store, refused, store  # noqa: F401
from stored import add_file, add_job, reopened
from tiny import small_disk

# --- what else may be wrong with the folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["INSERT INTO deletions VALUES (x'ff')", "DROP TABLE deletions"])
def test_a_store_that_cannot_be_put_in_order_is_refused_or_starts(store, statement):
    full_store(store)
    edit(store.directory, statement)
    before = contents(store.directory)
    if statement.startswith("DROP"):
        refused(store.directory, "deletions")
    else:
        Store(store.directory).close()
    assert contents(store.directory) == before


@pytest.mark.parametrize("name", ["files", "jobs"])
def test_a_file_where_a_folder_should_be_is_refused(tmp_path, name):
    (tmp_path / name).write_text("a file")
    refused(tmp_path, f"{tmp_path}/{name} is a file")


@pytest.mark.parametrize("name", ["mezo.sqlite", "mezo.lock"])
def test_a_folder_where_a_file_should_be_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(tmp_path, f"{name} is a file, not a folder")


@pytest.mark.parametrize("name", ["mezo", "mezo/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "mezo").write_text("a file")
    reason = "a folder that can be made .Not a directory" if "below" in name else "mezo is a file"
    with pytest.raises(ConfigError, match=f"--mezo-dir.*{reason}"):
        folder.make(tmp_path / name)
    with pytest.raises(ConfigError, match=f"--mezo-dir.*{reason}"):
        Store(tmp_path / name)
    assert (tmp_path / "mezo").read_text() == "a file"


def test_folders_where_contents_should_be_are_not_touched(store):
    file = add_file(store)
    store.file_path(file.id).unlink()
    for name in (file.id, "file-folder", ".file-folder.partial"):
        (store.directory / "files" / name / "inside").mkdir(parents=True)
    (store.directory / "jobs" / "ftjob-file").write_text("a file")
    store = reopened(store)
    with pytest.raises(RequestError, match="is gone"):
        store.content(file)
    assert (
        len(list((store.directory / "files").glob("*/inside"))) == 3
        and (store.directory / "jobs" / "ftjob-file").is_file()
    )
    store.close()


@pytest.mark.parametrize("content", [b"hello " * 1000, b"x", b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_no_database_is_refused(tmp_path, content):
    (tmp_path / "mezo.sqlite").write_bytes(content)
    refused(tmp_path, "mezo.sqlite")
    assert (tmp_path / "mezo.sqlite").read_bytes() == content


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_database_of_another_program_is_refused(tmp_path, version):
    edit(tmp_path, "CREATE TABLE users (name TEXT)")
    edit(tmp_path, f"PRAGMA user_version = {version}")
    before = (tmp_path / "mezo.sqlite").read_bytes()[100:]
    refused(tmp_path, "another program's")
    assert (tmp_path / "mezo.sqlite").read_bytes()[100:] == before


def test_a_database_that_another_process_has_locked_is_refused_in_one_line(store):
    full_store(store)
    with closing(sqlite3.connect(store.directory / "mezo.sqlite")) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match="--mezo-dir.*locked"):
            Store(store.directory)
    Store(store.directory).close()


def test_a_lock_while_it_runs_delays_what_changes_the_store_and_loses_nothing(store):
    job = add_job(store)
    store._database._connection.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(store.directory / "mezo.sqlite")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError) as caught:
            store.require_unlocked()
        known = storage_error(caught.value)
        assert (known.status, known.code) == (503, "store_busy") and "locked by another process" in known.message
        change = threading.Thread(target=store.update_job, args=(job.id,), kwargs={"step": 7})
        change.start()
        change.join(0.3)
        assert change.is_alive() and store.job(job.id) == job
    change.join()
    assert store.job(job.id).step == 7


def test_a_store_that_is_closed_while_it_waits_for_another_process_does_not_hang(store):
    job = add_job(store)
    store._database._connection.execute("PRAGMA busy_timeout = 50")
    errors = []

    def change() -> None:
        with pytest.raises(sqlite3.OperationalError) as caught:
            store.update_job(job.id, step=7)
        errors.append(caught.value)

    with closing(sqlite3.connect(store.directory / "mezo.sqlite")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=change)
        waiting.start()
        waiting.join(0.2)
        store.close()
        waiting.join()
    assert storage_error(errors[0]).code == "store_busy"


def read_only(directory: Path) -> str:
    """What is said of a folder on a disk that can only be read."""
    import ctypes

    Store(directory).close()
    assert (
        ctypes.CDLL(None).mount(b"none", str(directory).encode(), b"tmpfs", 1 | 32, None) == 0
    )  # MS_RDONLY, MS_REMOUNT
    try:
        Store(directory)
    except ConfigError as error:
        return str(error)
    return "it opened"


def test_a_disk_that_can_only_be_read_is_named(tmp_path):
    with small_disk(tmp_path, "2m") as child:
        if child is None:
            pytest.skip("the kernel does not let a process mount a file system of its own")
        result = child.submit(read_only, tmp_path).result()
    assert "--mezo-dir" in result and "Read-only file system" in result


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "files", "jobs", "mezo.sqlite", "mezo.lock"])
def test_what_must_not_be_written_is_named(store, name):
    full_store(store)
    path = store.directory / name
    mode = path.stat().st_mode
    path.chmod(0o444)
    try:
        refused(store.directory, "Permission denied")
    finally:
        path.chmod(mode)
