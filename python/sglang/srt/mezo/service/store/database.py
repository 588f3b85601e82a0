"""Frozen dataclasses in SQLite: one table a kind, a row a record, numbered in the order in which they came.

A row that is damaged, in its JSON or its types, takes no other down: lists leave it out with a logged line, and who
asks for it gets an error that names it.
"""

import itertools
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.migrations import migrate
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 3.0  # that another process may hold the database before a request hears of it

Record = TypeVar("Record", bound="DataclassInstance")


@dataclass(frozen=True)
class Page(Generic[Record]):
    """One page of a list; ``has_more`` where records follow the last one."""

    data: list[Record]
    has_more: bool


class Where(NamedTuple):
    """A condition in SQL and what its marks stand for."""

    condition: str = "TRUE"
    values: tuple[Any, ...] = ()


class _Reader:
    """A thread's connection; ``in_use`` is held while it reads."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection
        self.in_use = threading.Lock()

    def close(self) -> None:
        with self.in_use:
            self.connection.close()


class Database:
    """Thread-safe. A transaction is on disk when its block ends; it waits for one of another thread, or of another
    process.

    What reads outside of a transaction waits for neither: each thread has a connection of its own for that.

    Raises:
        ConfigError: the file is none of ours, is damaged or locked, or is new beside what belongs to another one.
        sqlite3.Error: by its methods, where SQLite cannot read or write; what was to change is as it was.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.RLock()
        self._told: set[str] = set()  # damaged rows that have been logged
        self._closed = False
        self._writer: int | None = None  # the thread that is in a transaction
        self._of_thread = threading.local()
        self._readers: list[_Reader] = []
        self._of_readers = threading.Lock()  # its own: who holds the other one may wait for another process
        try:
            _require_journal(path)
            self._connection = self._connected()
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise
        except sqlite3.Error as error:
            raise _unusable(path, " ".join(str(error).split())) from error

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, _LOCK_SECONDS, check_same_thread=False, isolation_level=None
        )  # ours to begin transactions
        connection.row_factory = sqlite3.Row
        # Text comes as bytes: what is not UTF-8 is then an error of its row, not of the whole query.
        connection.text_factory = bytes
        return connection

    def _prepare(self) -> None:
        (problem,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != b"ok":
            raise _unusable(self._path, f"it is damaged: {' '.join(problem.decode(errors='replace').split())}")
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {setting}")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        tables = {
            name.decode() for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if version == 0 and not tables:
            folder.require_database(self._path.parent, missing=True)
        elif version == 0 or not {"files", "jobs", "events", "checkpoints"} <= tables:
            raise _unusable(self._path, "it is another program's, or damaged")
        migrate(self._connection, self._path)

    def stop_waiting(self) -> None:
        """A transaction that waits for another process ends with its error, within seconds, and later ones do not
        wait."""
        self._closed = True

    def close(self) -> None:
        """What threads are at now is done first: to close a connection under a statement of another thread ends the
        process."""
        self.stop_waiting()
        with self._lock:
            self._connection.close()
        with self._of_readers:
            for reader in self._readers:
                reader.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block, or none. Where another process has locked the database, it begins when that has
        let go."""
        with self._lock:
            assert self._writer is None, "a transaction in a transaction"
            self._begin()
            self._writer = threading.get_ident()
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk, for one, has ended it already
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._writer = None

    def _begin(self) -> None:
        said = False
        while True:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if self._closed or not is_locked(error):
                    raise
                if not said:
                    logger.warning("%s is locked by another process: what changes it has to wait", self._path)
                said = True

    def require_unlocked(self) -> None:
        """Raises sqlite3.OperationalError where another process has locked the database, after some seconds."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("ROLLBACK")

    def execute(self, statement: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Rows as SQLite has them: text is bytes. What changes something is part of a transaction."""
        with self._current() as connection:
            return connection.execute(statement, tuple(values)).fetchall()

    @contextmanager
    def _current(self) -> Iterator[sqlite3.Connection]:
        """Sees what a transaction of this thread has done, or else what has been committed. Stays open until the end
        of the block."""
        if self._writer == threading.get_ident():
            yield self._connection
        else:
            reader = self._reader()
            with reader.in_use:
                yield reader.connection

    def _reader(self) -> "_Reader":
        if not hasattr(self._of_thread, "reader"):
            reader = _Reader(self._connected())
            reader.connection.execute("PRAGMA query_only = ON")
            with self._of_readers:
                if self._closed:
                    reader.close()
                self._readers.append(reader)
            self._of_thread.reader = reader
        return self._of_thread.reader

    def insert(self, table: str, *records: Any) -> None:
        for record in records:
            columns = {item.name: getattr(record, item.name) for item in fields(record)}
            marks = ", ".join("?" * len(columns))
            self.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", _encoded(columns))

    def update(self, table: str, id: str, changes: dict[str, Any]) -> None:
        if changes:
            columns = ", ".join(f"{name} = ?" for name in changes)
            self.execute(f"UPDATE {table} SET {columns} WHERE id = ?", (*_encoded(changes), id))

    def select(
        self, kind: type[Record], query: str, values: Sequence[Any] = (), limit: int | None = None
    ) -> list[Record]:
        """Records of a query that selects whole rows of their table, up to ``limit`` of them."""
        with self._current() as connection:
            return list(itertools.islice(self._records(kind, connection.execute(query, tuple(values))), limit))

    def _records(self, kind: type[Record], rows: Iterable[sqlite3.Row]) -> Iterator[Record]:
        for row in rows:
            try:
                yield _record(kind, row)
            except _Damaged as error:
                self._tell(f"a {kind.__name__} is left out, as its record in {self._path} is damaged: {error}")

    def damaged(self, kind: type[Record], table: str) -> dict[int, str]:
        """Numbers of the rows of a table that cannot be read, and why."""
        reasons = {}
        for row in self.execute(f"SELECT * FROM {table}"):
            try:
                _record(kind, row)
            except _Damaged as error:
                reasons[row["number"]] = str(error)
        return reasons

    def _tell(self, line: str) -> None:
        """Once, however often it is asked for."""
        if line not in self._told:
            self._told.add(line)
            logger.error(line)

    def one(self, kind: type[Record], table: str, what: str, id: str, param: str | None = None) -> Record:
        """The record of that id.

        Raises:
            NotFound: of ``what``, named by the field ``param``.
            RequestError: the record is damaged.
        """
        rows = self.execute(f"SELECT * FROM {table} WHERE id = ?", (id,))
        if not rows:
            raise NotFound(what, id, param)
        try:
            return _record(kind, rows[0])
        except _Damaged as error:
            raise RequestError(
                500, f"the record of {what} {id!r} in the server's store is damaged: {error}", param, "damaged_record"
            ) from error

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
        if after is not None:
            rows = self.execute(f"SELECT number FROM {table} WHERE id = ? AND {condition}", (after, *values))
            if not rows:
                raise NotFound(what, after, "after")
            condition, values = (
                f"number {'<' if order == 'desc' else '>'} ? AND {condition}",
                (rows[0]["number"], *values),
            )
        records = self.select(
            kind, f"SELECT * FROM {table} WHERE {condition} ORDER BY number {order}", values, limit + 1
        )
        return Page(records[:limit], len(records) > limit)


def is_locked(error: sqlite3.Error) -> bool:
    """By another process."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _require_journal(path: Path) -> None:
    """Of a database whose first page says that it has no write-ahead log SQLite would ignore one, and lose what is
    in it."""
    journal = path.with_name(f"{path.name}-wal")
    if not journal.is_file() or not journal.stat().st_size:
        return
    with open(path, "rb") as file:
        header = file.read(20)
    if header[18:] != b"\2\2":
        raise _unusable(path, f"its first bytes are damaged, and what is in {journal.name} would be lost")


def _unusable(path: Path, reason: str) -> ConfigError:
    return folder.unusable(
        path.parent, f"a folder whose {path.name} can be read and written ({reason}); nothing has been changed"
    )


# A seed is an unsigned 64-bit number, and SQLite's are signed.
_JSON = {
    "seed",
    "metadata",
    "request",
    "hyperparameters",
    "config",
    "error",
    "engine",
    "result_files",
    "data",
    "metrics",
}


def _encoded(columns: dict[str, Any]) -> list[Any]:
    return [json.dumps(value) if name in _JSON else value for name, value in columns.items()]


class _Damaged(Exception):
    """A row that is not what a record of its kind can be."""


def _record(kind: type[Record], row: sqlite3.Row) -> Record:
    name = ""
    try:
        values = {}
        for name in (item.name for item in fields(kind)):
            values[name] = _decoded(name, row[name])
        name = ""
        return msgspec.convert(values, kind)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _Damaged(f"row {row[0]}, {f'column {name}: ' if name else ''}{error}") from error


def _decoded(name: str, value: Any) -> Any:
    text = value.decode() if isinstance(value, bytes) else value
    return json.loads(text) if name in _JSON else text
