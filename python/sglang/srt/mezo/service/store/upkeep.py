"""What a store does when it is opened: what an earlier server was in the midst of is ended, what is damaged is told."""

import json
import logging
import os
from pathlib import Path

from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.store.database import Database
from sglang.srt.mezo.service.store.deletions import Deletions
from sglang.srt.mezo.service.wire.records import StoredJob

logger = logging.getLogger(__name__)


def put_in_order(database: Database, deletions: Deletions, directory: Path) -> None:
    """End what a server that was stopped in the middle had begun, and say what does not agree."""
    deletions.carry_out()
    files = directory / folder.FILES
    for partial in files.glob(f".{folder.FILE_PREFIX}*.partial"):
        path = files / partial.name[1:].removesuffix(".partial")
        if database.execute("SELECT 1 FROM files WHERE id = ?", (path.name,)) and not path.exists():
            os.rename(partial, path)
        elif partial.is_file():
            partial.unlink()
    _fail_damaged(database)
    _report_strays(database, directory)


def _fail_damaged(database: Database) -> None:
    """A job whose row cannot be read is not going on; what of the row can be read stays."""
    for number, reason in database.damaged(StoredJob, "jobs").items():
        message = f"the job's record is damaged: {reason}"
        logger.error("job number %d has failed: %s", number, message)
        with database.transaction():
            live = "status NOT IN ('succeeded', 'failed', 'cancelled')"
            error = json.dumps({"code": "damaged_record", "message": message, "param": None})
            database.execute(
                f"UPDATE jobs SET status = 'failed', error = ? WHERE number = ? AND {live}", (error, number)
            )


def _report_strays(database: Database, directory: Path) -> None:
    """Content without a row, and rows without content."""
    rows = {kind: {id.decode() for (id,) in database.execute(f"SELECT id FROM {kind}")} for kind in ("files", "jobs")}
    for what, there, known in (
        ("files", folder.uploads(directory), rows["files"]),
        ("jobs", folder.jobs(directory), rows["jobs"]),
    ):
        if unknown := sorted(there - known):
            logger.warning(
                "%d %s in %s are not in the database, such as %s: they stay as they are",
                len(unknown),
                what,
                directory,
                unknown[0],
            )
    if lost := sorted(rows["files"] - folder.uploads(directory)):
        logger.error(
            "the content of %d uploaded files is gone from %s, such as %s", len(lost), directory / folder.FILES, lost[0]
        )
