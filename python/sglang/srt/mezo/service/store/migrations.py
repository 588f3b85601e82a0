"""The format of the store's database, one step for each version.

To change the format, add a step at the end of ``STEPS`` and never change one before it: step n takes a database of
version n - 1 to version n. A step is SQL, and happens whole or not at all, after a copy of the database has been
written beside it (``mezo.sqlite.v<n - 1>``). A new column may be NULL or has a DEFAULT, which is what the rows of
before get, and is a field of its table's dataclass in ``records``. A new database goes through all steps; a test takes
one of each earlier version to the last.
"""

import itertools
import sqlite3
from contextlib import closing
from pathlib import Path

from sglang.srt.mezo.core.atomic import atomic_file
from sglang.srt.mezo.core.errors import ConfigError

STEPS = (
    """
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        status TEXT NOT NULL
    );
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL,
        finished_at INTEGER,
        status TEXT NOT NULL,
        model TEXT NOT NULL,
        training_file TEXT NOT NULL,
        validation_file TEXT,
        seed TEXT NOT NULL,
        suffix TEXT,
        adapter_name TEXT NOT NULL,
        metadata TEXT NOT NULL,
        request TEXT NOT NULL,
        hyperparameters TEXT NOT NULL,
        config TEXT NOT NULL,
        fine_tuned_model TEXT,
        trained_tokens INTEGER,
        error TEXT NOT NULL,
        step INTEGER NOT NULL,
        version INTEGER NOT NULL
    );
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        created_at INTEGER NOT NULL,
        level TEXT NOT NULL,
        message TEXT NOT NULL,
        type TEXT NOT NULL,
        data TEXT NOT NULL
    );
    CREATE INDEX events_by_job ON events (job_id, number);
    CREATE TABLE checkpoints (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        created_at INTEGER NOT NULL,
        step INTEGER NOT NULL,
        name TEXT NOT NULL,
        directory TEXT NOT NULL,
        metrics TEXT NOT NULL,
        UNIQUE (job_id, step)
    );
    """,
    # What may be deleted, relative to the store's folder.
    """
    CREATE TABLE deletions (path TEXT PRIMARY KEY);
    """,
    # Of an upload's content.
    """
    ALTER TABLE files ADD COLUMN sha256 TEXT;
    """,
    # The base model that a job is for, and the limits that it was taken under; empty where they are not known.
    """
    ALTER TABLE jobs ADD COLUMN engine TEXT NOT NULL DEFAULT '{}';
    """,
    # Files that a job leaves, and the end of a file.
    """
    ALTER TABLE jobs ADD COLUMN result_files TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE files ADD COLUMN expires_at INTEGER;
    """,
    # The job's step when its adapter was last published.
    """
    ALTER TABLE jobs ADD COLUMN published_step INTEGER;
    """,
)
VERSION = len(STEPS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the database at ``path`` to ``VERSION``.

    Raises:
        ConfigError: it is of a later version.
        sqlite3.Error: it cannot be written; it is as it was, or at a version in between.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(
            "--mezo-dir",
            str(path.parent),
            f"a folder of format {VERSION} or earlier; this one is of {version}, which a later sglang-mezo has made",
        )
    if 0 < version < VERSION:
        names = (f"{path.name}.v{version}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
        _copy(connection, next(copy for copy in map(path.with_name, names) if not copy.exists()))
    for number, step in enumerate(STEPS[version:], version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;")


def _copy(connection: sqlite3.Connection, path: Path) -> None:
    """A copy of the whole database, which appears whole or not at all."""
    with atomic_file(path) as partial, closing(sqlite3.connect(partial)) as copy:
        connection.backup(copy)
