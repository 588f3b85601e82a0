"""``sglang-mezo experiment``: many runs from one file, and their tables and plots.

sglang-mezo experiment list                                # what there is
sglang-mezo experiment run quick                           # five minutes on two cores, with the repository's model
sglang-mezo experiment run experiments/mine                # a folder with an experiment.yaml of your own
sglang-mezo experiment run smollm2 --model models/smollm2-135m --data data --output_dir experiments/smollm2
sglang-mezo experiment run table18-k16 --dry_run true      # commands, forward passes, hours on an H100
sglang-mezo experiment run table1 --slurm table1.sbatch --partition gpu --gpus 1 --time 24:00:00
sglang-mezo experiment status | resume | tables | plots experiments/mine
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Optional

from sglang.srt.mezo.commands.train import end
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.experiments.cost import dry_run, told_of
from sglang.srt.mezo.experiments.plots import write_plots
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.spec import FILE, PRESETS, Experiment
from sglang.srt.mezo.experiments.tables import write_tables
from sglang.srt.mezo.training.arguments import build, read

_RUNS = ("run", "resume", "cell")
VERBS = ("list", *_RUNS, "status", "tables", "plots")


@dataclass(frozen=True)
class ExperimentArguments:
    """How an experiment is run; ConfigError names the field at fault."""

    output_dir: Optional[str] = setting(None, "Folder of a named experiment; experiments/NAME by default.")
    model: Optional[str] = setting(None, "In the place of the experiment's.")
    dtype: Optional[str] = setting(None, "In the place of the experiment's.")
    tp_size: Optional[int] = setting(
        None, "In the place of the experiment's, of cells that an engine runs; Transformers has one device.", at_least=1
    )
    data: Optional[str] = setting(None, "Folder with a folder of files for each task, in the place of the hub.")
    dry_run: bool = setting(False, "Print commands, forward passes and the hours that they would take on an H100.")
    slurm: Optional[str] = setting(None, "File to write: an sbatch script of a job array, a task for each open cell.")
    partition: Optional[str] = setting(None, "Of the sbatch script.")
    gpus: int = setting(1, "GPUs of a cell, of the sbatch script and of Ray.", at_least=0)
    time: str = setting("24:00:00", "Of the sbatch script: most time of a cell.")
    ray: bool = setting(False, "Ray runs the cells, side by side.")
    cell: Optional[str] = setting(None, "Of the verb cell: its number or its id.")

    def __post_init__(self):
        require_settings(self)


_OF_RUNS = {"dry_run", "slurm", "partition", "gpus", "time", "ray"}
_NOT_OF = {"run": {"cell"}, "resume": {"cell"}, "cell": _OF_RUNS - {"dry_run"}}
"""Flags that say nothing to a verb; the others take none of these."""


def main(arguments: Sequence[str]) -> None:
    verb, *rest = arguments or ["--help"]
    if not {"-h", "--help"}.isdisjoint(arguments or ["--help"]):
        read(["--help"], (ExperimentArguments,), __doc__)
    end(lambda: do(verb, rest))


def do(verb: str, rest: list[str]) -> None:
    """What ``main`` does, with errors as they are."""
    if verb not in VERBS:
        raise UsageError(f"{verb!r} is none of {', '.join(VERBS)}")
    if verb == "list":
        if rest:
            raise UsageError(f"experiment list takes nothing, and not {rest[0]}")
        print("\n".join(_listed()))
        return
    if not rest or rest[0].startswith("-"):
        raise UsageError(f"experiment {verb} needs the name of an experiment or its folder")
    name, *flags = rest
    (wanted,) = build((ExperimentArguments,), read(flags, (ExperimentArguments,), __doc__))
    _require_meaning(verb, wanted)
    folder = opened(name, wanted, verb in _RUNS and not wanted.dry_run)
    if verb == "cell":
        _run_cell(folder, wanted)
    elif verb in _RUNS:
        _run(folder, wanted)
    elif verb != "status" and not (folder.path / FILE).is_file():
        raise UsageError(f"there is no {folder.path}: nothing of {name} has been run")
    else:
        print({"status": _status, "tables": write_tables, "plots": write_plots}[verb](folder))


def _require_meaning(verb: str, wanted: ExperimentArguments) -> None:
    """Raise ConfigError for a flag that would change nothing."""
    given = {one.name: value for one in fields(wanted) if (value := getattr(wanted, one.name)) != one.default}
    for name in given:
        if name in _NOT_OF.get(verb, _OF_RUNS | {"cell"}):
            raise ConfigError(name, given[name], f"nothing with experiment {verb}")
    for name, owners in (("partition", {"slurm"}), ("time", {"slurm"}), ("gpus", {"slurm", "ray"})):
        if name in given and not owners & given.keys():
            raise ConfigError(name, given[name], f"nothing without {' or '.join(sorted(owners))}")
    if len(ways := given.keys() & {"dry_run", "slurm", "ray"}) > 1:
        first, second = sorted(ways)[:2]
        raise ConfigError(second, given[second], f"nothing beside {first}")


def _listed() -> list[str]:
    found = [Experiment.read(path) for path in sorted(PRESETS.glob("*.yaml"))]
    width = max(len(one.name) for one in found)
    return [f"{one.name:<{width}} {len(one.cells()):>5} cells  {one.description}" for one in found]


def opened(name: str, wanted: ExperimentArguments, make: bool) -> Folder:
    """The experiment in a folder, or a named one.

    Args:
        make: whether the folder of a named one is made, where it is not there.

    Raises:
        ConfigError: there is none, or its folder holds another experiment.
    """
    if (Path(name) / FILE).is_file():
        if wanted.output_dir is not None:
            raise ConfigError("output_dir", wanted.output_dir, f"nothing beside {name}, which is a folder already")
        path, experiment = Path(name), Experiment.read(Path(name) / FILE)
    elif (PRESETS / f"{name}.yaml").is_file():
        path, experiment = Path(wanted.output_dir or f"experiments/{name}"), Experiment.read(PRESETS / f"{name}.yaml")
    else:
        known = ", ".join(sorted(one.stem for one in PRESETS.glob("*.yaml")))
        raise ConfigError("experiment", name, f"a folder with an {FILE}, or one of {known}")
    given = {field: value for field in ("model", "dtype", "tp_size") if (value := getattr(wanted, field)) is not None}
    experiment = experiment.with_model(**given)
    if wanted.data is not None:
        experiment = experiment.with_data(wanted.data)
    file = path / FILE
    if not file.is_file():
        if not make:
            return Folder(path, experiment)
        path.mkdir(parents=True, exist_ok=True)
        experiment.write(file)
    elif Experiment.read(file).to_dict() != experiment.to_dict():
        raise ConfigError("output_dir", str(path), f"a folder without an {FILE} that says something else")
    return Folder(path, experiment)


def _run_cell(folder: Folder, wanted: ExperimentArguments) -> None:
    if wanted.cell is None:
        raise ConfigError("cell", None, "a cell's number or id")
    cell = folder.cell(wanted.cell)
    if wanted.dry_run:
        print(told_of(folder.experiment.cells().index(cell), cell))
    elif folder.run([cell]):
        sys.exit(1)


def _run(folder: Folder, wanted: ExperimentArguments) -> None:
    cells = folder.open_cells()
    if wanted.dry_run:
        print("\n".join(dry_run(folder.experiment)))
    elif wanted.slurm is not None:
        if not cells:
            raise UsageError(f"no cell of {folder.experiment.name} is open: {folder.path} has all results")
        (folder.path / "logs").mkdir(exist_ok=True)
        Path(wanted.slurm).write_text(folder.sbatch(cells, wanted.partition, wanted.gpus, wanted.time))
        print(f"{wanted.slurm}: {len(cells)} cells; sbatch {wanted.slurm}")
    else:
        failed = folder.run_by_ray(cells, wanted.gpus) if wanted.ray else folder.run(cells)
        print(_status(folder))
        if failed:
            sys.exit(1)


def _status(folder: Folder) -> str:
    cells = folder.experiment.cells()
    states = {cell.id: folder.state(cell) for cell in cells}
    counts = Counter(states.values())
    lines = [f"{folder.experiment.name}: {counts['done']} of {len(cells)} cells done, {counts['failed']} failed"]
    for number, cell in enumerate(cells):
        why = f": {folder.files(cell).failure.read_text().strip()}" if states[cell.id] == "failed" else ""
        lines.append(f"  {number:>4} {states[cell.id]:<6} {cell.id}{why}")
    return "\n".join(lines)
