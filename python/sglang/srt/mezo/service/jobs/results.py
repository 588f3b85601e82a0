"""What a job leaves for its user to download: the metrics of its steps, as the result files of OpenAI's jobs have
them."""

import csv
import os
from pathlib import Path

from sglang.srt.mezo.training.tracking import parse_metrics

PURPOSE = "fine-tune-results"
FILENAME = "step_metrics.csv"

_COLUMNS = {
    "train_loss": "loss",
    "train_accuracy": None,
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_accuracy",
}
"""OpenAI's names, and ours in metrics.jsonl. Accuracy is the share of the validation file's rows whose right option
is the likeliest."""


def write_results(metrics: Path, target: Path) -> None:
    """Write a CSV file of a run's metrics.jsonl: a line for each step that has any, with empty fields for what was
    not measured."""
    steps: dict[int, dict[str, float]] = {}
    if metrics.is_file():
        with open(metrics, "rb") as lines:
            for record in parse_metrics(lines):
                measured = {name: record[ours] for name, ours in _COLUMNS.items() if ours in record}
                steps.setdefault(record["step"], {}).update(measured)
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *_COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **steps[step]} for step in sorted(steps))
        file.flush()
        os.fsync(file.fileno())
