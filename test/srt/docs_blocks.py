"""Blocks of code in the pages: what a page says of each, that a test runs it or why none does, and how it is run."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = [
    ROOT / name
    for name in (
        "README.md",
        "docs/quickstart.md",
        "docs/concepts.md",
        "docs/training.md",
        "docs/tunings.md",
        "docs/full_parameters.md",
        "docs/prefix_tuning.md",
        "docs/rewards.md",
        "docs/long_text.md",
        "docs/masked_language_models.md",
        "docs/files.md",
        "docs/server.md",
        "docs/chat.md",
        "docs/chat_classifier.md",
        "docs/operations.md",
    )
]
"""Pages whose commands are copied, in the order in which those of one group are run."""

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>(?:run|not run): [^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)\n```", re.S
)


class Block(NamedTuple):
    """mark: "run: <name of a group>", "not run: <why>", or "" where the page says neither."""

    page: str
    line: int
    language: str
    code: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text.count("\n", 0, found.start()) + 1, found["language"], found["code"], found["mark"] or "")
        for found in _BLOCK.finditer(text)
    ]


def of_group(name: str, *pages: str) -> list[Block]:
    """The blocks of a group, on these pages or on all."""
    found = [block for page in HOW_TO if not pages or page.name in pages for block in blocks(page)]
    return [block for block in found if block.mark == f"run: {name}"]


def run(found: Iterable[Block], folder: Path, python: Path, **variables: str) -> None:
    """As somebody copies them: one after the other in a folder, with ``python`` and the programs beside it."""
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**known, "PATH": f"{python.parent}:{os.environ['PATH']}", **variables}
    for block in found:
        program = (
            ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [str(python), "-W", "ignore", "-c"]
        )
        done = subprocess.run(
            [*program, block.code], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{block.where}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def local_hub(folder: Path, **models: Path) -> dict[str, str]:
    """Variables under which a model of the hub, ``owner__name``, is a copy of a local one, and no network is asked."""
    for name, model in models.items():
        cached = folder / "hub" / f"models--{name.replace('__', '--').replace('_', '-')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(model, cached / "snapshots" / ("0" * 40))
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
