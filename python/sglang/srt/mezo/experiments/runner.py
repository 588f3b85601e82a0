"""The cells of an experiment, one after the other, or where SLURM or Ray has them run."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.experiments.cell import result_path
from sglang.srt.mezo.experiments.spec import Cell, Experiment

State = Literal["done", "failed", "begun", "open"]


@dataclass(frozen=True)
class Folder:
    """An experiment on disk: ``experiment.yaml``, ``results/``, ``logs/``, ``runs/``.

    Attributes:
        path: of the folder.
    """

    path: Path
    experiment: Experiment

    def state(self, cell: Cell) -> State:
        """What has become of a cell."""
        if result_path(self.path, cell).is_file():
            return "done"
        if self.failure(cell).is_file():
            return "failed"
        return "begun" if self.log(cell).is_file() else "open"

    def log(self, cell: Cell) -> Path:
        """What its last process has printed."""
        return self.path / "logs" / f"{cell.id}.log"

    def failure(self, cell: Cell) -> Path:
        """The last line of a process that failed."""
        return self.path / "logs" / f"{cell.id}.failed"

    def cell(self, name: str) -> Cell:
        """By its place in the order of the file, from 0, or by its id; raises ConfigError where there is none."""
        cells = self.experiment.cells()
        if name.isdecimal() and int(name) < len(cells):
            return cells[int(name)]
        for cell in cells:
            if cell.id == name:
                return cell
        raise ConfigError("cell", name, f"a number from 0 to {len(cells) - 1}, or a cell's id (experiment status)")

    def open_cells(self) -> list[Cell]:
        """Those without a result; what has failed is tried again."""
        return [cell for cell in self.experiment.cells() if self.state(cell) != "done"]

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """Each in a process of its own; returns those that failed. What one of them does wrong is no other's loss."""
        failed = []
        for number, cell in enumerate(cells, 1):
            started = time.monotonic()
            print(f"[{number}/{len(cells)}] {cell.id} ... ", end="", flush=True)
            status = self.run_one(cell)
            seconds = time.monotonic() - started
            print(f"{'done' if status == 0 else f'failed, see {self.log(cell)}'} ({seconds:.0f} s)", flush=True)
            if status:
                failed.append(cell)
        return failed

    def run_one(self, cell: Cell) -> int:
        """Exit status of the process of a cell."""
        return run_process(self.command(cell), self.log(cell), self.failure(cell))

    def command(self, cell: Cell) -> list[str]:
        """That of a process that runs a cell."""
        return [*self._program(), cell.id]

    def run_by_ray(self, cells: Iterable[Cell], gpus: float) -> list[Cell]:
        """Side by side, where Ray finds room; returns those that failed.

        Raises:
            ConfigError: Ray is not installed.
        """
        try:
            ray = import_module("ray")
        except ImportError as error:
            raise ConfigError("ray", True, "false without Ray (pip install ray)") from error
        ray.init(ignore_reinit_error=True)
        run = ray.remote(num_gpus=gpus)(run_process)
        cells = list(cells)
        outcomes = [
            run.remote(self.command(cell), self.log(cell).resolve(), self.failure(cell).resolve(), os.getcwd())
            for cell in cells
        ]
        return [cell for cell, status in zip(cells, ray.get(outcomes)) if status]

    def sbatch(self, cells: Sequence[Cell], partition: str | None, gpus: int, hours: str) -> str:
        """A job array of SLURM, a task for each cell."""
        names = {cell.id: place for place, cell in enumerate(self.experiment.cells())}
        places = ",".join(str(names[cell.id]) for cell in cells)
        options = {
            "job-name": self.experiment.name,
            "array": places,
            "partition": partition,
            "gpus-per-task": gpus or None,
            "ntasks": 1,
            "time": hours,
            "output": f"{self.path.resolve()}/logs/slurm-%A_%a.out",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
        commands = [shlex.join(["cd", os.getcwd()]), f'{shlex.join(self._program())} "$SLURM_ARRAY_TASK_ID"']
        return "\n".join(["#!/bin/bash", *lines, *commands, ""])

    def _program(self) -> list[str]:
        """All but the name of a cell."""
        program = [sys.executable, "-m", "sglang.srt.mezo.commands.main", "experiment", "cell"]
        return [*program, str(self.path.resolve()), "--cell"]


def run_process(command: list[str], log: Path, failure: Path, folder: str | None = None) -> int:
    """Exit status of a process; what it prints is in ``log``, and of one that fails the last line in ``failure``.

    Args:
        folder: in which it runs; where this process is by default.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    with open(log, "wb") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder).returncode
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()
        failure.write_text((lines[-1] if lines else f"ended with status {status}") + "\n")
    return status
