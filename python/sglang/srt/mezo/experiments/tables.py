"""Tables of an experiment's results: in the paper's shape with its figures beside ours, and what each cost."""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mezo.experiments.cell import SCORES, result_path
from sglang.srt.mezo.experiments.paper import COLUMNS, Figure, figure
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.spec import Cell, task_name

Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method on one task.

    Attributes:
        chosen: of each seed the result whose point of the grid is best on development rows.
        states: of its cells.
    """

    task: str
    label: str
    method: str
    chosen: list[Result]
    states: list[str]
    paper: Figure | None

    @property
    def score(self) -> str:
        """What it is told by: the task's metric, or a loss where there is none."""
        return next((name for name in SCORES if name in self.chosen[0]["test"]), "loss")

    @property
    def values(self) -> list[float]:
        """Of the test rows, seed by seed; shares as percent."""
        return [result["test"][self.score] * self.scale for result in self.chosen]

    @property
    def is_share(self) -> bool:
        """Whether what it is told by is a share of the rows, or a mean of such."""
        return self.score not in ("loss", "reward")

    @property
    def scale(self) -> int:
        """By which what it is told by is multiplied."""
        return 100 if self.is_share else 1

    @property
    def is_tested(self) -> bool:
        """Whether there are results, and they are of test rows."""
        return bool(self.chosen) and all(result["test"] for result in self.chosen)

    def mean_of(self, *path: str) -> float | None:
        """Of a number that all seeds have."""
        found = [_at(result, path) for result in self.chosen]
        known = [value for value in found if value is not None]
        return statistics.mean(known) if len(known) == len(found) and known else None


def rows_of(folder: Folder) -> list[Row]:
    """In the order of the experiment's file."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in folder.experiment.cells():
        found.setdefault((cell.task, cell.label), []).append(cell)
    return [_row(folder, task, label, cells) for (task, label), cells in found.items()]


def _row(folder: Folder, task: str, label: str, cells: Sequence[Cell]) -> Row:
    by_seed: dict[int, list[Result]] = {}
    for cell in cells:
        path = result_path(folder.path, cell)
        if path.is_file():
            by_seed.setdefault(cell.seed, []).append(json.loads(path.read_text(encoding="utf-8")))
    row = folder.experiment.methods[label].get("paper")
    table = folder.experiment.paper
    paper = figure(table, row, task_name(task)) if table and row else None
    chosen = [max(own, key=_merit) for own in by_seed.values()]
    return Row(task, label, cells[0].method, chosen, list(map(folder.state, cells)), paper)


def _merit(result: Result) -> float:
    """On development rows: the task's score, or the loss with its sign changed; without any, all are alike."""
    dev = result["dev"]
    return next((dev[name] for name in SCORES if name in dev), -dev["loss"] if "loss" in dev else 0.0)


def write_tables(folder: Folder) -> str:
    """``tables.md`` and ``tables.csv`` in the folder; returns the first."""
    rows = rows_of(folder)
    parts = [*_scores(folder, rows), "", *_gains(rows), *_costs(rows), ""]
    text = "\n".join([f"# {folder.experiment.name}", "", *parts])
    (folder.path / "tables.md").write_text(text, encoding="utf-8")
    with open(folder.path / "tables.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV)
        writer.writerows(_csv(row) for row in rows if row.is_tested)
    return text


def _scores(folder: Folder, rows: Sequence[Row]) -> list[str]:
    experiment = folder.experiment
    cells = {(row.task, row.label): row for row in rows}
    told = "mean ± standard deviation over seeds (how many)"
    beside = f", [the paper's table {experiment.paper}, our difference]" if experiment.paper else ""
    lines = [
        f"{experiment.description} Test rows, {told}{beside}; of a grid the point that is best on development rows.",
        "",
        "| method | " + " | ".join(COLUMNS.get(task_name(task), task) for task in experiment.tasks) + " |",
        "|---" * (1 + len(experiment.tasks)) + "|",
    ]
    for label in experiment.methods:
        told = [_told(cells.get((task, label))) or experiment.skipped(task, label) for task in experiment.tasks]
        lines.append(f"| {label} | " + " | ".join(told) + " |")
    return lines


def _told(row: Row | None) -> str:
    if row is None:
        return ""
    if not row.chosen:
        return "failed" if "failed" in row.states else "not run"
    if not row.is_tested:
        return "no test rows"
    mean, digits = statistics.mean(row.values), 1 if row.is_share else 4
    spread = f" ± {statistics.pstdev(row.values):.{digits}f} ({len(row.values)})" if len(row.values) > 1 else ""
    failed = row.states.count("failed")
    missing = len(row.states) - row.states.count("done") - failed
    others = ", ".join(f"{count} {what}" for count, what in ((missing, "not run"), (failed, "failed")) if count)
    beside = f" [{row.paper.value:.1f}, {mean - row.paper.value:+.1f}]" if row.paper else ""
    return f"{mean:.{digits}f}{spread}{beside}" + (f" ({others})" if others else "")


def _gains(rows: Sequence[Row]) -> list[str]:
    """What MeZO gains over the zero-shot model, in points and as a share of what fine-tuning with gradients gains."""
    told = []
    beside = [method for method in _BY_GRADIENTS if any(row.method == method and row.is_tested for row in rows)]
    for row in rows:
        own = {other.method: other for other in reversed(rows) if other.task == row.task and other.is_tested}
        zero = own.get("zero-shot")
        if not row.method.startswith("mezo-") or not row.is_tested or zero is None or not row.is_share:
            continue
        gains = [value - statistics.mean(zero.values) for value in row.values]
        cells = [row.task, row.label, f"{statistics.mean(gains):+.1f}", f"{min(gains):+.1f} to {max(gains):+.1f}"]
        for method in beside:
            best = statistics.mean(own[method].values) - statistics.mean(zero.values) if method in own else 0.0
            cells.append(f"{statistics.mean(gains) / best:.0%} of {best:+.1f}" if best > 0 else "")
        told.append(f"| {' | '.join(cells)} |")
    if not told:
        return []
    head = ["task", "method", "gain", "of seeds", *(f"share of {method}'s" for method in beside)]
    title = "Gain over zero-shot in points, and as a share of what fine-tuning with gradients gains there."
    return [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *told, ""]


_BY_GRADIENTS = ("ft-lora", "ft-prefix", "ft-full")

_COSTS = {
    "wall time": ("run_info", "total_time"),
    "training": ("train_info", "train_seconds"),
    "forward passes": ("train_info", "forward_passes"),
    "backward passes": ("train_info", "backward_passes"),
    "tokens computed": ("train_info", "tokens_computed"),
    "prompt tokens reused": ("train_info", "prefix_tokens_reused"),
    "peak memory": ("train_info", "peak_rss_bytes"),
}


def _costs(rows: Sequence[Row]) -> list[str]:
    lines = [
        "What a run costs, mean over seeds, on the machine of its result; forward passes are those of training "
        "batches, tokens those of training and evaluation.",
        "",
        "| task | method | chosen | " + " | ".join(_COSTS) + " |",
        "|---" * (3 + len(_COSTS)) + "|",
    ]
    for row in rows:
        if row.chosen:
            told = [_cost(name, row.mean_of(*path)) for name, path in _COSTS.items()]
            lines.append(f"| {row.task} | {row.label} | {_points(row)} | " + " | ".join(told) + " |")
    return lines


def _points(row: Row) -> str:
    points = {", ".join(f"{name} {value}" for name, value in one["run_info"]["point"].items()) for one in row.chosen}
    return "; ".join(sorted(filter(None, points)))


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("wall time", "training"):
        return f"{value:.0f} s"
    return f"{value / 2**20:.0f} MiB" if name == "peak memory" else f"{value:,.0f}"


_CSV = (
    *("task", "method", "metric", "seeds", "mean", "deviation", "min", "max", "paper", "difference", "zero_shot"),
    *(name.replace(" ", "_") for name in _COSTS),
)


def _csv(row: Row) -> list[Any]:
    mean = statistics.mean(row.values)
    paper = row.paper.value if row.paper else None
    told = [row.score, len(row.values), mean, statistics.pstdev(row.values), min(row.values), max(row.values)]
    zero = row.mean_of("zero_shot", row.score)
    beside = [paper, None if paper is None else mean - paper, None if zero is None else zero * row.scale]
    return [row.task, row.label, *told, *beside, *(row.mean_of(*path) for path in _COSTS.values())]


def _at(result: Result, path: Sequence[str]) -> Any:
    value: Any = result
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
