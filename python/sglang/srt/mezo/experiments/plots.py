"""Plots of an experiment's results: development loss and score against steps, forward passes and time; memory."""

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.tables import Row, rows_of

_AXES = {"step": "step", "forward_passes": "forward passes of a batch", "seconds": "seconds of training"}

Curve = list[tuple[float, float]]


def write_plots(folder: Folder) -> str:
    """A file for each task with curves, and ``memory.png``; returns what it wrote, a line a file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots", True, "nothing without matplotlib (pip install 'sglang-mezo[experiments]')")
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in rows_of(folder) if row.chosen]
    written = []
    for task in dict.fromkeys(row.task for row in rows):
        curved = [row for row in rows if row.task == task and any(one["evaluations"] for one in row.chosen)]
        if curved:
            written.append(_plot_curves(folder, task, curved, [row for row in rows if row.task == task]))
    if rows:
        written.append(_plot_memory(folder, rows))
    return "\n".join(written) or "there is no result to plot"


def _plot_curves(folder: Folder, task: str, rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    import matplotlib.pyplot as plt

    score = rows[0].score
    names = ("loss", score) if score != "loss" else ("loss",)
    figure, axes = plt.subplots(len(names), len(_AXES), figsize=(13, 3.5 * len(names)), sharey="row", squeeze=False)
    for line, name in enumerate(names):
        for column, (x, title) in enumerate(_AXES.items()):
            axis = axes[line, column]
            for row in rows:
                _band(axis, row.label, [curve_of(one, x, f"eval_{name}") for one in row.chosen])
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)
        axes[line, 0].set_ylabel(f"development {name}")
    for row in all_rows:  # a line without a curve, as nothing was trained
        if row not in rows and score == row.score and score != "loss":
            value = statistics.mean(row.values) / 100
            axes[-1, 0].axhline(value, linestyle=":", color="gray")
            axes[-1, 0].annotate(f"{row.label} (test)", (0, value), fontsize=7)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    path = folder.path / f"{task}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)


def curve_of(result: dict[str, Any], x: str, y: str) -> Curve:
    """The evaluations of a run against its steps, its forward passes or its time, which run alike."""
    info = result["train_info"]
    whole = {"step": info.get("steps"), "forward_passes": info.get("forward_passes"), "seconds": info["train_seconds"]}
    if not whole["step"] or whole[x] is None:
        return []
    return [(one["step"] / whole["step"] * whole[x], one[y]) for one in result["evaluations"] if y in one]


def _band(axis: Any, label: str, curves: Sequence[Curve]) -> None:
    """Mean over seeds, and from the least to the most of them."""
    curves = [curve for curve in curves if curve]
    points = min(map(len, curves), default=0)
    if not points:
        return
    x = [statistics.mean(curve[i][0] for curve in curves) for i in range(points)]
    values = [[curve[i][1] for curve in curves] for i in range(points)]
    [line] = axis.plot(x, [statistics.mean(own) for own in values], marker=".", label=label)
    if len(curves) > 1:
        axis.fill_between(x, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())


def _plot_memory(folder: Folder, rows: Sequence[Row]) -> str:
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row.label for row in rows))
    peaks = [
        max(one["train_info"].get("peak_rss_bytes") or 0 for row in rows if row.label == label for one in row.chosen)
        for label in labels
    ]
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(labels) + 1.2))
    axis.barh(labels, [peak / 2**30 for peak in peaks])
    axis.invert_yaxis()
    axis.set_xlabel("peak resident memory, GiB")
    figure.tight_layout()
    path = folder.path / "memory.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)
