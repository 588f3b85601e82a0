"""The cells of an experiment, one after the other, or where SLURM or Ray has them run."""

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Literal, NamedTuple

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.experiments.cell import result_path
from sglang.srt.mezo.experiments.spec import FILE, Cell, Experiment

State = Literal["done", "failed", "running", "begun", "open"]
DONE, BUSY = 0, 75  # exit statuses: one, and that of what another process has in hand


@dataclass(frozen=True)
class Folder:
    """An experiment on disk: ``experiment.yaml``, ``results/``, ``logs/``, ``runs/``.

    Attributes:
        path: of the folder.
    """

    path: Path
    experiment: Experiment

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Raises what ``Experiment.read`` does."""
        return cls(path, Experiment.read(path / FILE))

    def state(self, cell: Cell) -> State:
        """What has become of a cell."""
        files = self.files(cell)
        if files.result.is_file():
            return "done"
        if is_held(files.lock):
            return "running"
        if files.failure.is_file():
            return "failed"
        return "begun" if files.log.is_file() else "open"

    def files(self, cell: Cell) -> "Files":
        """That tell of a cell, by their whole paths."""
        logs = self.path.resolve() / "logs"
        return Files(result_path(self.path.resolve(), cell), *(logs / f"{cell.id}.{end}" for end in _ENDS))

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
        """Each in a process of its own; returns those that failed. What one of them does wrong is no other's loss; what
        is done by now, or in another process's hand, is left to it."""
        failed = []
        for number, cell in enumerate(cells, 1):
            started = time.monotonic()
            print(f"[{number}/{len(cells)}] {cell.id} ... ", end="", flush=True)
            status = self.run_one(cell)
            seconds = time.monotonic() - started
            told = {DONE: "done", BUSY: "runs in another process"}.get(status, f"failed, see {self.files(cell).log}")
            print(f"{told} ({seconds:.0f} s)", flush=True)
            if status not in (DONE, BUSY):
                failed.append(cell)
        return failed

    def run_one(self, cell: Cell) -> int:
        """What ``run_process`` returns of a cell."""
        return run_process(self.command(cell), self.files(cell))

    def command(self, cell: Cell) -> list[str]:
        """That of the process that a cell runs in."""
        return [sys.executable, "-m", "sglang.srt.mezo.commands.cell", str(self.path.resolve()), cell.id]

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
        outcomes = [run.remote(self.command(cell), self.files(cell), os.getcwd()) for cell in cells]
        return [cell for cell, status in zip(cells, ray.get(outcomes)) if status not in (DONE, BUSY)]

    def sbatch(self, cells: Sequence[Cell], partition: str | None, gpus: int, hours: str) -> str:
        """A job array of SLURM, a task for each cell, whose output goes into the folder's ``logs``."""
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
        lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
        program = [
            sys.executable,
            "-m",
            "sglang.srt.mezo.commands.main",
            "experiment",
            "cell",
            str(self.path.resolve()),
        ]
        commands = [shlex.join(["cd", os.getcwd()]), f'{shlex.join(program)} --cell "$SLURM_ARRAY_TASK_ID"']
        return "\n".join(["#!/bin/bash", *lines, *commands, ""])


class Files(NamedTuple):
    """Of a cell: its result, what its last process has printed, the last line of one that failed, and what a process
    holds that runs it."""

    result: Path
    log: Path
    failure: Path
    lock: Path


_ENDS = ("log", "failed", "lock")


def run_process(command: list[str], files: Files, folder: str | None = None) -> int:
    """Exit status of a process that makes a result, which is not run where there is one, nor beside another: the lock
    is the process's own too, so that it is held where this one is killed.

    Args:
        folder: in which it runs; where this process is by default.
    """
    files.log.parent.mkdir(parents=True, exist_ok=True)
    with open(files.lock, "wb") as lock:
        if not _hold(lock):
            return BUSY
        if files.result.is_file():
            return DONE
        files.failure.unlink(missing_ok=True)
        with open(files.log, "wb") as output:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, pass_fds=[lock.fileno()]
            ).returncode
        if status:
            lines = files.log.read_text(errors="replace").strip().splitlines()
            files.failure.write_text((lines[-1] if lines else f"ended with status {status}") + "\n")
        return status


def is_held(lock: Path) -> bool:
    """Whether a process runs what the lock is of."""
    try:
        with open(lock, "rb") as file:
            return not _hold(file)
    except FileNotFoundError:
        return False


def _hold(lock: IO[bytes]) -> bool:
    """Take a lock, until every process that has this file open has closed it; False where another one has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
