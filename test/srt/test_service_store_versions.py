"""Stores of other versions."""

import errno
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import migrations
from sglang.srt.mezo.service.store.disk import storage_error
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.records import StoredFile
from store_folder import edit, full_store, publish, refused, store  # noqa: F401
from stored import reopened

VERSION_1 = (Path(__file__).parent / "store_1.sql").read_text()


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
