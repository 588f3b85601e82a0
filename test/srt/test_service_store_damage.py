"""What becomes of a store that was stopped in the middle, has lost its database or a part of it, is damaged, or is
of an earlier version: it starts and says what it found, or refuses in one line, and deletes nothing that it has not
marked itself."""

import errno
import hashlib
import logging
import os
import random
import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import folder, migrations
from sglang.srt.mezo.service.store.disk import storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import StoredCheckpoint, StoredFile, StoredJob
from stored import add_file, add_job, make_file, make_job, reopened
from tiny import small_disk

VERSION_1 = (Path(__file__).parent / "store_1.sql").read_text()
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


# --- earlier versions -------------------------------------------------------------------------------------------------


@pytest.fixture
def version_1(tmp_path) -> Path:
    """A store as the first version has left it: a file, and a job with an event, a checkpoint and a served adapter."""
    with closing(sqlite3.connect(tmp_path / "mezo.sqlite")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(VERSION_1)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file-0123456789abcdef01234567").write_text('{"text": "a"}\n')
    (tmp_path / "jobs" / "ftjob-0123456789abcdef01234567" / "adapters" / "v1").mkdir(parents=True)
    return tmp_path


def test_a_store_of_the_first_version_is_taken_over_with_a_copy_of_its_database(version_1):
    store = Store(version_1)
    (file,), (job,) = store.files().data, store.jobs().data
    assert file == StoredFile("file-0123456789abcdef01234567", "rows.jsonl", "fine-tune", 14, 1700000000, "processed")
    assert (job.seed, job.status, job.metadata, job.error, job.version) == (
        2**64 - 1,
        "succeeded",
        {"team": "a"},
        None,
        1,
    )
    assert job.config == {"learning_rate": 0.001, "target_modules": ["q_proj"], "objective": None}
    assert [event.message for event in store.events(job.id).data] == ["Created fine-tuning job"]
    assert [checkpoint.metrics for checkpoint in store.checkpoints(job.id).data] == [{"step": 5}]
    assert [adapter.name for adapter in store.served()] == ["mine", "mine:ckpt-step-5"]
    assert store.content(file).read_text() == '{"text": "a"}\n'
    store.delete_file(file.id)
    assert publish(store, job) == 2
    reopened(store).close()
    with closing(sqlite3.connect(version_1 / "mezo.sqlite.v1")) as copy:
        assert copy.execute("PRAGMA user_version").fetchone() == (1,)
        assert copy.execute("SELECT id FROM files").fetchall() == [(file.id,)]


def schema(path: Path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
        columns = [connection.execute(f"PRAGMA table_info({name})").fetchall() for _, name in tables]
        return [*tables, *columns, connection.execute("PRAGMA user_version").fetchone()]


def test_every_version_ends_as_a_new_store_is(version_1, tmp_path):
    Store(version_1).close()
    Store(tmp_path / "new").close()
    assert schema(version_1 / "mezo.sqlite") == schema(tmp_path / "new" / "mezo.sqlite")
    assert schema(tmp_path / "new" / "mezo.sqlite")[-1] == (migrations.VERSION,)


def test_a_step_that_fails_leaves_the_database_at_the_version_before_it(version_1, monkeypatch):
    good = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", (*good, "CREATE TABLE new (a); INSERT INTO nowhere VALUES (1);"))
    monkeypatch.setattr(migrations, "VERSION", len(good) + 1)
    with pytest.raises(ConfigError, match="--mezo-dir.*nowhere"):
        Store(version_1)
    assert ("table", "new") not in schema(version_1 / "mezo.sqlite")
    monkeypatch.undo()
    shutil.copy(version_1 / "mezo.sqlite.v1", version_1 / "mezo.sqlite")
    store = Store(version_1)
    assert len(store.jobs().data) == 1
    store.close()
    assert sorted(path.name for path in version_1.glob("*.v*")) == ["mezo.sqlite.v1", "mezo.sqlite.v1-2"], (
        "no copy is overwritten"
    )


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (IsADirectoryError(errno.EISDIR, "", "files/file-1"), 500, "Is a directory on the server: 'files/file-1'"),
        (NotADirectoryError(errno.ENOTDIR, "", "jobs/ftjob-1"), 500, "Not a directory"),
        (PermissionError(errno.EACCES, "", "jobs"), 500, "Permission denied"),
        (OSError(errno.ENOSPC, ""), 507, "takes no more"),
        (ConnectionResetError(errno.ECONNRESET, ""), None, None),
    ],
)
def test_what_goes_wrong_with_a_file_while_it_runs_names_it(error, status, words):
    known = storage_error(error)
    assert (known and known.status) == status and (known is None or words in known.message)


def test_a_folder_of_a_later_version_is_refused_and_let_go(store):
    full_store(store)
    edit(store.directory, "PRAGMA user_version = 99")
    for _ in range(2):
        refused(store.directory, "99")
