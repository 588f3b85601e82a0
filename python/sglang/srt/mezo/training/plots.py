"""The plot of a run: loss and accuracy against steps and against forward passes."""

import importlib.util
from pathlib import Path
from typing import Any

from sglang.srt.mezo.training.tracking import parse_metrics


def plot_run(directory: Path) -> str | None:
    """Draw ``metrics.jsonl`` of a run directory to ``curves.png``; None where matplotlib (extra ``plots``) is
    missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = parse_metrics((directory / "metrics.jsonl").read_bytes().splitlines())
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharey="row", constrained_layout=True)
    for column, x in enumerate(("step", "forward_passes")):
        _curve(axes[0, column], records, x, "loss", "training loss", alpha=0.6)
        _curve(axes[0, column], records, x, "eval_loss", "development loss", marker="o")
        _curve(axes[1, column], records, x, "eval_accuracy", "development accuracy", marker="o")
        axes[1, column].set_xlabel("step" if x == "step" else "forward passes of a batch")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("accuracy")
    axes[0, 0].legend()
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return str(path)


def _curve(axis: Any, records: list[dict[str, Any]], x: str, y: str, label: str, **style: Any) -> None:
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    if points:
        axis.plot(*zip(*points), label=label, **style)
    axis.grid(alpha=0.3)
