"""What becomes of a store that was stopped in the middle, has lost its database or a part of it, is damaged, or is
of an earlier version: it starts and says what it found, or refuses in one line, and deletes nothing that it has not
marked itself."""

import hashlib
import logging
import os
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import StoredCheckpoint
from store_folder import OF_SQLITE, contents, edit, full_store, publish, refused, store  # noqa: F401
from stored import add_file, add_job, make_file, reopened

# --- stopped in the middle --------------------------------------------------------------------------------------------


def test_an_upload_that_nobody_was_told_of_is_gone_and_one_that_has_a_row_is_finished(store):
    file = add_file(store, content=b"whole")
    os.rename(store.file_path(file.id), store.partial_path(file.id))  # stopped between the row and the name
    store.partial_path("file-unknown").write_text("half an upload")
    store = reopened(store)
    assert contents(store.directory / "files") == {file.id: b"whole"}
    store.close()


def test_a_deletion_that_was_stopped_is_carried_out(store):
    file, kept = add_file(store), add_file(store)
    content = store.file_path(file.id).read_bytes()
    store.delete_file(file.id)
    store.close()
    store.file_path(file.id).write_bytes(content)
    edit(store.directory, "INSERT INTO deletions VALUES (?)", f"files/{file.id}")
    store = Store(store.directory)
    assert set(contents(store.directory / "files")) == {kept.id}
    store.close()


def test_of_versions_the_one_on_record_stays_and_those_that_were_in_the_making_go(store):
    job = add_job(store, status="succeeded")
    assert [publish(store, job), publish(store, job)] == [1, 2]
    assert [path.name for path in store.version_directory(job.id, 1).parent.iterdir()] == ["v2"]
    version = store.new_version(job.id)
    for name in (f"v{version}", f".v{version}.abc"):
        (store.version_directory(job.id, 0).parent / name).mkdir()
    store = reopened(store)
    assert [path.name for path in store.version_directory(job.id, 1).parent.iterdir()] == ["v2"]
    assert publish(store, job) == 3
    store.close()


@pytest.mark.parametrize(
    "path", ["files", "files/{file}", "jobs/{job}", "jobs/{job}/adapters", "jobs/{job}/adapters/v1", "../outside", ""]
)
def test_a_mark_that_is_damaged_deletes_nothing(store, path, tmp_path):
    (tmp_path / "outside").write_text("not ours")
    files, job = full_store(store)
    before = contents(tmp_path)
    edit(store.directory, "INSERT INTO deletions VALUES (?)", path.format(file=files[1].id, job=job.id))
    Store(store.directory).close()
    assert contents(tmp_path) == before


# --- a database that is lost, or is not the one of these files --------------------------------------------------------


@pytest.mark.parametrize("size", [None, 0, 1, 99, 100, 512, 4096, 8192])
@pytest.mark.parametrize("journal", [True, False], ids=["with its journal", "alone"])
def test_a_database_that_is_lost_or_cut_is_refused_and_says_how_to_recover(store, size, journal):
    full_store(store)
    path = store.directory / "mezo.sqlite"
    whole = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(whole[:size])
    if journal:
        (store.directory / "mezo.sqlite-wal").write_bytes(whole[:100])
    refused(
        store.directory,
        *(
            ["uploaded files (3) and folders of jobs (1)", "from a copy", "nothing has been deleted"]
            if not size
            else []
        ),
    )
    path.write_bytes(whole)
    (store.directory / "mezo.sqlite-wal").unlink(missing_ok=True)
    store = Store(store.directory)
    assert len(store.files().data) == 3
    store.close()


def test_a_new_database_beside_old_files_is_refused(store, tmp_path):
    full_store(store)
    Store(tmp_path / "new").close()
    for name in ("mezo.sqlite",):
        shutil.copy(tmp_path / "new" / name, store.directory / name)
    with closing(sqlite3.connect(store.directory / "mezo.sqlite")) as connection:
        tables = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            )
        ]
        for name in tables:
            connection.execute(f"DROP TABLE {name}")
        connection.execute("PRAGMA user_version = 0")
        connection.commit()
    refused(store.directory)


def test_a_folder_with_nothing_of_a_store_in_it_is_as_good_as_new(tmp_path):
    for part in ("files", "jobs"):
        (tmp_path / part / "lost+found").mkdir(parents=True)
        (tmp_path / part / ".DS_Store").write_text("not ours")
    (tmp_path / "notes.txt").write_text("not ours")
    before = contents(tmp_path)
    (tmp_path / "mezo.sqlite").touch()  # as a server leaves it that was killed in its first moment
    store = Store(tmp_path)
    add_file(store)
    reopened(store).close()
    assert contents(tmp_path).items() >= before.items()


def test_an_earlier_copy_of_the_database_leaves_what_came_after_it_alone(store, caplog):
    files, job = full_store(store)
    earlier = (store.directory / "mezo.sqlite").read_bytes()
    store = Store(store.directory)
    later, later_job = add_file(store), add_job(store)
    store.job_directory(later_job.id).mkdir()
    assert publish(store, job) == 2
    store.delete_file(files[2].id)
    store.close()
    before = contents(store.directory)
    (store.directory / "mezo.sqlite").write_bytes(earlier)

    store = Store(store.directory)
    assert contents(store.directory) == before
    assert f"{later.id}" in caplog.text or "2 files" in caplog.text
    assert (
        "1 jobs" in caplog.text
        and f"the content of 1 uploaded files is gone from {store.directory}/files, such as {files[2].id}"
        in caplog.text
    )
    with pytest.raises(RequestError, match=f"{files[2].id}.*is gone") as caught:
        store.content(files[2], "training_file")
    assert (caught.value.code, caught.value.param) == ("file_lost", "training_file")
    assert publish(store, job) == 3, "what is there without a row is neither overwritten nor deleted"
    assert {path.name for path in store.version_directory(job.id, 1).parent.iterdir()} == {"v2", "v3"}
    store.close()


def test_a_lost_journal_leaves_what_was_in_it_alone(store, tmp_path):
    add_file(store)
    first = add_job(store, status="succeeded")
    copy = tmp_path / "copy"
    edit(store.directory, "PRAGMA wal_checkpoint(TRUNCATE)")
    add_file(store)
    publish(store, first)
    shutil.copytree(store.directory, copy)
    (copy / "mezo.sqlite-wal").unlink()
    before = contents(copy)
    opened = Store(copy)
    assert len(opened.files().data) == 2 and contents(copy) == before
    opened.close()


def test_an_upload_whose_content_has_changed_is_told(store):
    file = replace(make_file(b"0123456789"), sha256=hashlib.sha256(b"0123456789").hexdigest())
    store.partial_path(file.id).write_bytes(b"0123456789")
    store.add_file(file)
    assert store.content(store.file(file.id)).read_bytes() == b"0123456789"
    store.file_path(file.id).write_bytes(b"0123456799")
    with pytest.raises(RequestError, match=f"{file.id}.*is not what was uploaded"):
        store.content(store.file(file.id))


def test_an_upload_whose_content_has_changed_its_length_is_told(store):
    file = add_file(store, content=b"0123456789")
    store.file_path(file.id).write_bytes(b"0123")
    with pytest.raises(RequestError, match="has 4 bytes left of 10"):
        store.content(file)


# --- a database that is damaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_each_of_the_first_bytes_of_the_database_may_be_damaged(store, flip):
    """It opens and has what it had, or is refused in one line."""
    files, job = full_store(store)
    path = store.directory / "mezo.sqlite"
    whole, before = path.read_bytes(), contents(store.directory)
    outcomes = set()
    for place in range(300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            opened = Store(store.directory)
        except ConfigError as error:
            outcomes.add("refused")
            assert "\n" not in str(error) and str(store.directory) in str(error)
        else:
            outcomes.add("opened")
            assert {file.id for file in opened.files().data} == {file.id for file in files} and opened.job(
                job.id
            ).version == 1, place
            opened.close()
        for name in OF_SQLITE[1:3]:
            (store.directory / name).unlink(missing_ok=True)
        for copy in store.directory.glob("mezo.sqlite.v*"):  # of what is said to be an earlier version
            copy.unlink()
        assert contents(store.directory) == before, place
    assert outcomes == {"refused", "opened"}


def test_pages_that_are_damaged_are_refused(store):
    for _ in range(200):
        add_file(store, filename="x" * 200)
    store.close()
    path = store.directory / "mezo.sqlite"
    data, moments = bytearray(path.read_bytes()), random.Random(0)
    for place in range(4096, len(data), 4096):
        data[place : place + 64] = moments.randbytes(64)
    path.write_bytes(data)
    refused(store.directory, "damaged", "nothing has been changed")


def test_a_journal_that_the_first_page_knows_nothing_of_is_not_dropped(store, tmp_path):
    add_file(store)
    copy = tmp_path / "copy"
    shutil.copytree(store.directory, copy)  # as a killed server leaves it
    journal = (copy / "mezo.sqlite-wal").read_bytes()
    data = bytearray((copy / "mezo.sqlite").read_bytes())
    data[18] = data[19] = 1
    (copy / "mezo.sqlite").write_bytes(data)
    refused(copy, "mezo.sqlite-wal")
    assert (copy / "mezo.sqlite-wal").read_bytes() == journal


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("config", '{"learning_rate": 0.0'),
        ("config", "null"),
        ("request", "[1]"),
        ("metadata", '{"a": 1}'),
        ("seed", '"x"'),
        ("error", "nul"),
        ("hyperparameters", b"\xff\xfe"),
        ("model", b"\xff\xfe"),
        ("created_at", "yesterday"),
        ("status", "qveued"),
        ("config", "[" * 100_000),
    ],
)
@pytest.mark.parametrize("status", ["queued", "succeeded"])
def test_a_job_whose_row_is_damaged_takes_nothing_else_down(store, status, column, value, caplog):
    jobs = [add_job(store, status=status, adapter_name=f"a{i}", version=1, metadata={"team": "a"}) for i in range(4)]
    store.add_event(jobs[1].id, "info", "hello")
    store.close()
    edit(store.directory, f"UPDATE jobs SET {column} = ? WHERE id = ?", value, jobs[1].id)
    before = contents(store.directory)
    store = Store(store.directory)
    assert contents(store.directory) == before
    others = [jobs[3], jobs[2], jobs[0]]
    expected = [job.id for job in others]
    if column == "status" or (column, status) == ("error", "queued"):  # what is wrong is overwritten
        expected.insert(2, jobs[1].id)
        assert store.job(jobs[1].id).status == "failed" and "damaged" in store.job(jobs[1].id).error["message"]
    else:
        with pytest.raises(RequestError, match=f"{jobs[1].id}.*damaged.*{column}") as caught:
            store.job(jobs[1].id)
        assert (caught.value.status, caught.value.code) == (500, "damaged_record") and len(str(caught.value)) < 400
    assert [job.id for job in store.jobs().data] == expected
    assert [job.id for job in store.jobs(metadata={"team": "a"}).data] == expected
    page = store.jobs(limit=2)
    assert page.has_more and [job.id for job in store.jobs(after=page.data[-1].id, limit=2).data] == expected[2:]
    assert store.with_status(status) == others[::-1] and store.oldest(status) == jobs[0]
    assert store.job_counts()[status] == (3 if status != "succeeded" or column == "status" else 4)
    assert {adapter.name for adapter in store.served()} >= {"a0", "a2", "a3"}
    assert "damaged" in caplog.text
    store.close()


def test_events_and_checkpoints_that_are_damaged_are_left_out(store, caplog):
    job = add_job(store)
    for step in range(3):
        store.add_event(job.id, "info", str(step), data={"step": step})
        store.add_checkpoint(StoredCheckpoint(job.id, step, str(step), "run", {}))
    store.close()
    edit(store.directory, "UPDATE events SET data = '{' WHERE message = '1'")
    edit(store.directory, "UPDATE checkpoints SET metrics = '{' WHERE step = 1")
    store = Store(store.directory)
    for _ in range(2):
        assert [event.message for event in store.events(job.id).data] == ["2", "0"]
        assert [checkpoint.step for checkpoint in store.checkpoints(job.id).data] == [2, 0]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2, "once each"
    store.close()
