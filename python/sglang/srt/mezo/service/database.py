"""Frozen dataclasses in SQLite: one table a kind, a row a record, numbered in the order in which they came."""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from sglang.srt.mezo.errors import ConfigError
from sglang.srt.mezo.service.errors import NotFound

Record = TypeVar("Record")


@dataclass(frozen=True)
class Page(Generic[Record]):
    """One page of a list; ``has_more`` where records follow the last one."""

    data: list[Record]
    has_more: bool


class Where(NamedTuple):
    """A condition in SQL and what its marks stand for."""

    condition: str = "TRUE"
    values: tuple[Any, ...] = ()


class Database:
    """Thread-safe: one connection behind a lock. A transaction is on disk when its block ends.

    Raises:
        ConfigError: the file is none of ours.
    """

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        try:
            self._prepare(path)
        except BaseException:
            self.close()
            raise

    def _prepare(self, path: Path) -> None:
        try:
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {setting}")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigError("--mezo-dir", str(path.parent), f"a folder whose {path.name} can be read ({error})") from error
        if version == 0:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise ConfigError("--mezo-dir", str(path.parent), f"a folder of format {_VERSION}; this one has {version}")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block, or none."""
        with self._lock, self._connection:
            yield

    def execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        with self._lock:
            self._connection.execute(statement, tuple(values))

    def insert(self, table: str, *records: Any) -> None:
        for record in records:
            columns = {item.name: getattr(record, item.name) for item in fields(record)}
            marks = ", ".join("?" * len(columns))
            self.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", _encoded(columns))

    def update(self, table: str, id: str, changes: dict[str, Any]) -> None:
        if changes:
            columns = ", ".join(f"{name} = ?" for name in changes)
            self.execute(f"UPDATE {table} SET {columns} WHERE id = ?", (*_encoded(changes), id))

    def select(self, kind: type[Record], query: str, values: Sequence[Any] = ()) -> list[Record]:
        """Records of a query that selects whole rows of their table."""
        with self._lock:
            rows = self._connection.execute(query, tuple(values)).fetchall()
        return [kind(**{item.name: _decoded(item.name, row[item.name]) for item in fields(kind)}) for row in rows]

    def one(self, kind: type[Record], table: str, what: str, id: str, param: str | None = None) -> Record:
        """The record of that id; raises NotFound of ``what``, named by the field ``param``."""
        records = self.select(kind, f"SELECT * FROM {table} WHERE id = ?", (id,))
        if not records:
            raise NotFound(what, id, param)
        return records[0]

    def page(
        self,
        kind: type[Record],
        table: str,
        what: str,
        where: Where,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page[Record]:
        """Up to ``limit`` records from beyond the one whose id is ``after``; NotFound where that is not in the list."""
        condition, values = where
        with self._lock:
            if after is not None:
                query = f"SELECT number FROM {table} WHERE id = ? AND {condition}"
                row = self._connection.execute(query, (after, *values)).fetchone()
                if row is None:
                    raise NotFound(what, after, "after")
                condition, values = f"number {'<' if order == 'desc' else '>'} ? AND {condition}", (row["number"], *values)
            query = f"SELECT * FROM {table} WHERE {condition} ORDER BY number {order} LIMIT ?"
            records = self.select(kind, query, (*values, limit + 1))
        return Page(records[:limit], len(records) > limit)


# A seed is an unsigned 64-bit number, and SQLite's are signed.
_JSON = {"seed", "metadata", "request", "hyperparameters", "config", "error", "data", "metrics"}


def _encoded(columns: dict[str, Any]) -> list[Any]:
    return [json.dumps(value) if name in _JSON else value for name, value in columns.items()]


def _decoded(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON else value


_VERSION = 1
_SCHEMA = """
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
"""
