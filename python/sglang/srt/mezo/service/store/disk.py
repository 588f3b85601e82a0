"""A disk that does not take what is written to it, being full, over a quota, failing, or read-only by now; and what
else goes wrong with the files of the store."""

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.store.database import is_locked
from sglang.srt.mezo.service.wire.errors import DiskFull, RequestError, StoreBusy

_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_SQLITE_ERRORS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_ROOM = 1 << 20


def disk_full(error: BaseException) -> DiskFull | None:
    """What an error says of the disk; None where it is about something else."""
    match error:
        case DiskFull():
            return error
        case OSError() if error.errno in _ERRORS:
            where = f" ({shown(error.filename)})" if error.filename else ""
            return DiskFull(f"the server's disk takes no more: {os.strerror(error.errno)}{where}")
        case sqlite3.Error() if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_ERRORS:
            return DiskFull(f"the server's disk takes no more: {error} (mezo.sqlite)")
        case _:
            return None


def storage_error(error: BaseException) -> RequestError | None:
    """What an error says of the disk or of the store's files; None where it is about something else."""
    match error:
        case _ if (full := disk_full(error)) is not None:
            return full
        case sqlite3.Error() if is_locked(error):
            return StoreBusy()
        case sqlite3.DatabaseError() if getattr(error, "sqlite_errorcode", 0) & 0xFF in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ):
            return RequestError(500, f"the server's store (mezo.sqlite) is damaged: {error}", None, "store_damaged")
        case OSError() if error.errno and error.filename:
            return RequestError(
                500, f"{os.strerror(error.errno)} on the server: {shown(error.filename)}", None, "storage_failed"
            )
        case _:
            return None


def has_room(directory: Path) -> bool:
    """Whether a megabyte can be written into a folder."""
    path = directory / ".room"
    try:
        with open(path, "wb") as file:
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
        return True
    except OSError:
        return False
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
