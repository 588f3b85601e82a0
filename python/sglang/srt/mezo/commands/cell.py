"""The process of one cell, as ``sglang-mezo experiment`` starts it: its arguments are the folder and the cell's id."""

import sys
from pathlib import Path

from sglang.srt.mezo.commands.train import end
from sglang.srt.mezo.experiments.cell import run_cell
from sglang.srt.mezo.experiments.runner import Folder


def main() -> None:
    """Run the cell; its result is in the folder then."""
    path, name = sys.argv[1:]
    folder = Folder.read(Path(path))
    end(lambda: run_cell(folder.cell(name), folder.experiment.name, folder.path))


if __name__ == "__main__":
    main()
