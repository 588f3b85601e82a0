"""The plot of a run: loss, scores and memory against steps and against forward passes."""

import importlib.util
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.objective import SCORES
from sglang.srt.mezo.training.tracking import parse_metrics

_MEMORY = {"host_memory_bytes": "host", "device_memory_bytes": "device"}


def plot_run(directory: Path) -> str | None:
    """Draw ``metrics.jsonl`` of a run directory to ``curves.png``; None where matplotlib (extra ``plots``) is
    missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = parse_metrics((directory / "metrics.jsonl").read_bytes().splitlines())
    for record in records:
        record |= {name: value / 2**30 for name, value in record.items() if name in _MEMORY}
    figure, axes = plt.subplots(3, 2, figsize=(10, 8), sharey="row", constrained_layout=True)
    for column, x in enumerate(("step", "forward_passes")):
        _curve(axes[0, column], records, x, "loss", "training loss", alpha=0.6)
        _curve(axes[0, column], records, x, "eval_loss", "development loss", marker="o")
        for score in sorted({score for scores in SCORES.values() for score in scores}):
            _curve(axes[1, column], records, x, f"eval_{score}", f"development {score}", marker="o")
        for name, label in _MEMORY.items():
            _curve(axes[2, column], records, x, name, label)
        axes[2, column].set_ylim(bottom=0)
        axes[2, column].set_xlabel("step" if x == "step" else "forward passes of a batch")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("score")
    axes[2, 0].set_ylabel("peak memory, GiB")
    for axis in axes[:, 0]:
        if axis.lines:
            axis.legend()
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)


def _curve(axis: Any, records: list[dict[str, Any]], x: str, y: str, label: str, **style: Any) -> None:
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    if points:
        axis.plot(*zip(*points), label=label, **style)
    axis.grid(alpha=0.3)
