"""A disk that does not take what is written to it: full, over a quota, failing, or read-only by now."""

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from sglang.srt.mezo.errors import shown
from sglang.srt.mezo.service.errors import DiskFull

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
