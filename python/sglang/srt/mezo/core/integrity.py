"""Files that show whether they are as they were written: JSON with a checksum in it, folders with the sums of their
files.

Earlier versions wrote neither; what has none is taken as it is.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.atomic import atomic_file
from sglang.srt.mezo.core.errors import DamagedError

SUMS = "SHA256SUMS"
"""As ``sha256sum`` writes and checks it."""

_CHECKSUM = "sha256"  # the field of a JSON file: of all others, in the order of their names
_LONGEST_LINE = 1 << 20  # bytes of a line that is appended
_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?([\w.-]+)")


def drop_half_line(path: Path) -> None:
    """Cut off what a full disk, or a process that ended, has left of the last line of a file that lines are appended
    to."""
    if path.is_file():
        with open(path, "rb+") as file:
            start = max(0, path.stat().st_size - _LONGEST_LINE)
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_checked_json(path: Path, fields: dict[str, Any]) -> None:
    """Write fields that ``read_checked_json`` gives back, or says that they have changed."""
    fields = json.loads(json.dumps(fields))
    write_json(path, {**fields, _CHECKSUM: _digest(fields)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Raises DamagedError where the file is not as it was written, OSError where it cannot be read."""
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"it is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DamagedError(path, "it is no JSON object")
    digest = fields.pop(_CHECKSUM, None)
    if digest is not None and digest != _digest(fields):
        raise DamagedError(path, f"its fields do not agree with its {_CHECKSUM}")
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_sums(folder: Path, names: Sequence[str], sums: str = SUMS) -> None:
    """Write the sums of a folder's files into the file ``sums``."""
    write_sums_of({name: folder / name for name in names}, folder / sums)


def write_sums_of(files: Mapping[str, Path], sums: Path) -> None:
    """Write the sums of files, each by the name that it has or will have."""
    with atomic_file(sums) as partial:
        partial.write_text("".join(f"{digest_of_file(path)}  {name}\n" for name, path in files.items()))


def require_sums(folder: Path, names: Sequence[str], sums: str = SUMS) -> None:
    """Raise DamagedError where one of the files is not as it was when their sums were written."""
    try:
        lines = (folder / sums).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    expected = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    for name in names:
        path = folder / name
        if name not in expected:
            raise DamagedError(folder / sums, f"it has no sum of {name}")
        if not path.is_file():
            raise DamagedError(path, "it is gone")
        if digest_of_file(path) != expected[name]:
            raise DamagedError(
                path, f"it does not agree with {sums} (which can be deleted if the file was changed on purpose)"
            )


def digest_of_file(path: Path) -> str:
    """SHA-256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
