"""How many tokens the forward passes of each step were allowed, where a server has changed it: a step's last bits
depend on it.

``passes.jsonl`` of a run has a line wherever that differs from the step before:
``{"step": 12, "max_tokens": [[4096, 9], [32, 17]]}`` says that 9 pieces of step 12 ran with ``max_tokens_per_batch`` of
4,096 and the others, 17, with 32. A line holds until the next one, its last size for as many pieces as there are.
Before the first line all passes are of the configuration's ``max_tokens_per_batch``.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sglang.srt.mezo.core.errors import DamagedError
from sglang.srt.mezo.core.integrity import drop_half_line

Sizes = list[list[int]]
"""[most tokens of a forward pass, pieces of work with it], in the order in which a step went through them."""


class PassSizes:
    """Writes the sizes of a step's passes down where they change.

    Args:
        path: of ``passes.jsonl``.
        usual: ``max_tokens_per_batch`` of the configuration.
        resumes: what held for the step before is not known.
    """

    def __init__(self, path: Path, usual: int, resumes: bool):
        drop_half_line(path)
        self._path = path
        self._before: list[int | list[int]] | None = None if resumes else [usual]

    def record(self, step: int, pieces: Sequence[int]) -> None:
        """Step ``step`` went through pieces of work with these ``max_tokens_per_batch``."""
        sizes = [[tokens, len(list(run))] for tokens, run in groupby(pieces)]
        now = [*sizes[:-1], sizes[-1][0]]  # how long the last size holds follows from the step's work
        if now != self._before:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "max_tokens": sizes}) + "\n")
            self._before = now


def read_pass_sizes(path: Path) -> dict[int, Sizes]:
    """Sizes from each step on where they change; none of a run whose passes were all of one size.

    Raises:
        DamagedError: a line cannot be read, so that nobody knows which sizes held from its step on.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    try:
        return {record["step"]: record["max_tokens"] for record in map(json.loads, lines)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(path, str(error)) from error
