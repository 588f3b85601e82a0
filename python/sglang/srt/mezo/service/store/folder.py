"""What must hold of a store's folder before anything in it is opened. Nothing here changes what lies there."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from sglang.srt.mezo.core.errors import ConfigError

DATABASE = "mezo.sqlite"
LOCK = "mezo.lock"
FILES, JOBS = "files", "jobs"
FILE_PREFIX, JOB_PREFIX = "file-", "ftjob-"

_MAGIC, _SMALLEST = b"SQLite format 3\0", 512  # how a database begins; a shorter one SQLite would overwrite


def unusable(directory: Path, allowed: str) -> ConfigError:
    return ConfigError("--mezo-dir", str(directory), allowed)


def make(directory: Path) -> None:
    """Make the folder with its parts; raises ConfigError where a store cannot work in it."""
    parts = (directory, directory / FILES, directory / JOBS)
    try:
        for part in parts:
            if part.exists() and not part.is_dir():
                raise unusable(directory, f"a folder with folders in it, and {part} is a file")
            _make(directory, part)
        for name in (DATABASE, LOCK):
            if (directory / name).is_dir():
                raise unusable(directory, f"a folder whose {name} is a file, not a folder")
        _require_access(directory, parts)
    except OSError as error:
        raise unusable(
            directory, f"a folder that can be read and written ({error.strerror}: {error.filename})"
        ) from error
    require_database(directory, missing=False)


def _make(directory: Path, part: Path) -> None:
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(directory, f"a folder that can be made ({error.strerror})") from error


def _require_access(directory: Path, parts: tuple[Path, ...]) -> None:
    for part in parts:
        os.listdir(part)
        with tempfile.TemporaryFile(dir=part):
            pass
    for name in (DATABASE, f"{DATABASE}-wal", LOCK):
        if (directory / name).exists():
            with open(directory / name, "r+b"):
                pass


def require_database(directory: Path, missing: bool) -> None:
    """Raise ConfigError where there is no database, but what belongs to one: a new one would know nothing of it.

    missing: the file is there, and has turned out to hold nothing.
    """
    path, journal = directory / DATABASE, directory / f"{DATABASE}-wal"
    if not missing and path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if not file.read(_SMALLEST).startswith(_MAGIC) or path.stat().st_size < _SMALLEST:
                raise unusable(
                    directory,
                    f"a folder whose {DATABASE} is a database; this one is damaged, or another program's file",
                )
        return
    left = [
        f"{what} ({len(names)})"
        for what, names in (("uploaded files", uploads(directory)), ("folders of jobs", jobs(directory)))
        if names
    ]
    if journal.is_file() and journal.stat().st_size and not missing:
        left.append(journal.name)
    if left:
        copies = [copy.name for copy in sorted(directory.glob(f"{DATABASE}.*"))]
        known = f" ({', '.join(copies)} is one)" if copies else ""
        raise unusable(
            directory,
            f"a folder whose {DATABASE} is whole; it is {'empty' if path.is_file() else 'gone'}, and beside it lie "
            f"{' and '.join(left)}. "
            f"Put it back from a copy{known}, or move what lies beside it elsewhere to begin anew; nothing has been "
            "deleted",
        )


def uploads(directory: Path) -> set[str]:
    """Names of uploaded files; what else lies among them is not ours."""
    return {path.name for path in (directory / FILES).glob(f"{FILE_PREFIX}*")}


def jobs(directory: Path) -> set[str]:
    """Names of folders of jobs."""
    return {path.name for path in (directory / JOBS).glob(f"{JOB_PREFIX}*")}


def claim(directory: Path) -> IO[bytes]:
    """An open file whose lock says that the directory is in use; the system drops it with the process.

    Raises ConfigError where another server has it.
    """
    file = open(directory / LOCK, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise unusable(directory, "a folder that no other server uses") from error
    return file
