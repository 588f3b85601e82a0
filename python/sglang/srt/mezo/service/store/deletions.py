"""What the store may delete: paths that it has marked in its database, and nothing else."""

import logging
import os
import re
import shutil
import sqlite3
from pathlib import Path

from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.database import Database

logger = logging.getLogger(__name__)

VERSION = re.compile(r"v([1-9][0-9]*)")
"""Name of the folder of one version of a job's adapter."""


class Deletions:
    """Marks on paths of uploaded files and of versions of adapters. A mark outlives the process, and goes with what
    it marks."""

    def __init__(self, database: Database, directory: Path):
        self._database = database
        self._directory = directory

    def mark(self, path: Path) -> None:
        """To be called in a transaction."""
        self._database.execute("INSERT OR IGNORE INTO deletions VALUES (?)", (str(path.relative_to(self._directory)),))

    def unmark(self, path: Path) -> None:
        """To be called in a transaction."""
        self._database.execute("DELETE FROM deletions WHERE path = ?", (str(path.relative_to(self._directory)),))

    def carry_out(self, *paths: Path) -> None:
        """Delete what is marked of these paths; of all, which is for a start alone, as what is in the making is
        marked too."""
        marked = {
            self._directory / os.fsdecode(path) for (path,) in self._database.execute("SELECT path FROM deletions")
        }
        for path in marked & set(paths) if paths else marked:
            if self._in_use(path):
                logger.error(
                    "%r is marked to be deleted, and in use: it stays", str(path)
                )  # a damaged path may be no text
                continue
            try:
                _remove(path)
                with self._database.transaction():
                    self.unmark(path)
            except (OSError, sqlite3.Error) as error:
                logger.error("%r could not be deleted, which the next start tries again: %s", str(path), error)

    def _in_use(self, path: Path) -> bool:
        """Whether a row says that a marked path is needed, or it is none that is ever marked: the mark is damaged
        then."""
        if path.parent == self._directory / folder.FILES and path.name.startswith(folder.FILE_PREFIX):
            return bool(self._database.execute("SELECT 1 FROM files WHERE id = ?", (path.name,)))
        job, version = path.parent.parent, VERSION.fullmatch(path.name)
        if version is None or path.parent.name != "adapters" or job.parent != self._directory / folder.JOBS:
            return True
        for (current,) in self._database.execute("SELECT version FROM jobs WHERE id = ? AND version > 0", (job.name,)):
            # Where the one on record is gone, the database is older than the folder: this one may have been the next on
            # record.
            return int(version[1]) == current or not path.with_name(f"v{current}").is_dir()
        return False


def _remove(path: Path) -> None:
    """A file, or a folder and what was to become it."""
    for part in (path, *path.parent.glob(f".{path.name}.*")):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
