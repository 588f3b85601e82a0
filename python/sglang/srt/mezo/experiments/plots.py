"""Plots of an experiment's results: development loss, score and memory against steps, forward passes and time; memory
of the methods, and against the size of the model."""

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.experiments.cost import PARAMETERS, parameters_of
from sglang.srt.mezo.experiments.paper import memory_by_size
from sglang.srt.mezo.experiments.readiness import memory_of
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.tables import Row, rows_of

_AXES = {"step": "step", "forward_passes": "forward passes of a batch", "seconds": "seconds of training"}

Curve = list[tuple[float, float]]


def write_plots(folder: Folder) -> str:
    """A file for each task with curves, ``memory.png``, ``memory_by_size.png``; returns what it wrote, a line a file.

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
        written += [_plot_memory(folder, rows), _plot_memory_by_size(folder, rows)]
    return "\n".join(written) or "there is no result to plot"


def _plot_curves(folder: Folder, task: str, rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    import matplotlib.pyplot as plt

    score = rows[0].score
    shown = {"loss": "eval_loss", score: f"eval_{score}", "memory": _memory_name(rows)}
    figure, axes = plt.subplots(len(shown), len(_AXES), figsize=(13, 3.2 * len(shown)), sharey="row", squeeze=False)
    for line, (name, y) in enumerate(shown.items()):
        for column, (x, title) in enumerate(_AXES.items()):
            axis = axes[line, column]
            for number, row in enumerate(rows):
                _band(axis, row.label, f"C{number}", [curve_of(one, x, y) for one in row.chosen])
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)
        axes[line, 0].set_ylabel("peak memory, GiB" if name == "memory" else f"development {name}")
    axes[-1, 0].set_ylim(0, 1.2 * axes[-1, 0].get_ylim()[1])
    for row in all_rows:  # a line without a curve, as nothing was trained
        if row not in rows and row.is_tested and score == row.score and score != "loss":
            value = statistics.mean(row.values) / row.scale
            axes[1, 0].axhline(value, linestyle=":", color="gray")
            axes[1, 0].annotate(f"{row.label} (test)", (0, value), fontsize=7)
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
    scale = 2**-30 if y.endswith("_bytes") else 1
    return [(one["step"] / whole["step"] * whole[x], one[y] * scale) for one in result["evaluations"] if y in one]


def _memory_name(rows: Sequence[Row]) -> str:
    """The device's, where there was one."""
    evaluations = [one for row in rows for result in row.chosen for one in result["evaluations"]]
    names = ("device_memory_bytes", "host_memory_bytes")
    return next((name for name in names if any(name in one for one in evaluations)), names[-1])


def _band(axis: Any, label: str, color: str, curves: Sequence[Curve]) -> None:
    """Mean over seeds, and from the least to the most of them."""
    curves = [curve for curve in curves if curve]
    points = min(map(len, curves), default=0)
    if not points:
        return
    x = [statistics.mean(curve[i][0] for curve in curves) for i in range(points)]
    values = [[curve[i][1] for curve in curves] for i in range(points)]
    axis.plot(x, [statistics.mean(own) for own in values], marker=".", label=label, color=color)
    if len(curves) > 1:
        axis.fill_between(x, list(map(min, values)), list(map(max, values)), alpha=0.2, color=color)


def _plot_memory(folder: Folder, rows: Sequence[Row]) -> str:
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row.label for row in rows))
    peaks = [max(_peak(row) for row in rows if row.label == label) for label in labels]
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(labels) + 1.2))
    axis.barh(labels, [peak / 2**30 for peak in peaks])
    axis.invert_yaxis()
    axis.set_xlabel("peak memory, GiB")
    figure.tight_layout()
    path = folder.path / "memory.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)


def _peak(row: Row) -> int:
    """Bytes: the most of its results, on the device where there was one."""
    phases = [phase for one in row.chosen for phase in one["train_info"].get("peak_memory_bytes", {}).values()]
    device = [phase["device"] for phase in phases if "device" in phase]
    return max(device or [one["train_info"].get("peak_rss_bytes") or 0 for one in row.chosen])


def _plot_memory_by_size(folder: Folder, rows: Sequence[Row]) -> str:
    """What was measured, as points at the model's size, beside the model of ``readiness`` and the paper's table 22."""
    import matplotlib.pyplot as plt

    model = folder.experiment.model
    dtype, here = str(model.get("dtype", "auto")), parameters_of(str(model["model"]))
    sizes = sorted(size for size in {*PARAMETERS.values(), here} if size is not None)
    figure, axis = plt.subplots(figsize=(8, 5))
    alike: dict[tuple[float, ...], list[str]] = {}
    for number, (label, row) in enumerate({row.label: row for row in rows}.items()):
        alike.setdefault(tuple(memory_of(row.method, size, dtype) / 1e9 for size in sizes), []).append(label)
        if here is not None:
            peak = max(_peak(one) for one in rows if one.label == label) / 1e9
            axis.plot([here], [peak], "o", color=f"C{number}", label=f"{label}: measured here")
    for modelled, labels in alike.items():
        axis.plot(sizes, modelled, linestyle="--", label=f"cost model: {', '.join(labels)}")
    for name, points in memory_by_size().items():
        axis.plot(*zip(*points), marker="x", linewidth=0.7, color="gray", label=f"the paper: {name}")
        axis.annotate(name, points[-1], fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="peak memory, GB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)
    figure.tight_layout()
    path = folder.path / "memory_by_size.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)
