"""Figures of the MeZO paper (arXiv 2305.17333), to stand beside ours."""

import json
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = {
    "sst2": "SST-2",
    "sst5": "SST-5",
    "trec": "TREC",
    "mnli": "MNLI",
    "snli": "SNLI",
    "rte": "RTE",
    "mrpc": "MRPC",
    "cb": "CB",
    "copa": "COPA",
    "boolq": "BoolQ",
    "wic": "WIC",
    "wsc": "WSC",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "squad": "SQuAD",
    "drop": "DROP",
}
"""Tasks, as its tables head them."""


TABLES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
)
"""Table, row, column: a value, a value and its standard deviation, or None."""


class Figure(NamedTuple):
    """Percent, and over how much it is spread between seeds, where the paper says so."""

    value: float
    deviation: float | None


def figure(table: str, row: str, task: str) -> Figure | None:
    """That of a table's row, None where there is none."""
    found = TABLES.get(table, {}).get(row, {}).get(COLUMNS.get(task, task))
    if found is None:
        return None
    return Figure(*found) if isinstance(found, list) else Figure(found, None)


def memory_by_size() -> dict[str, list[tuple[float, float]]]:
    """Of table 22 (MultiRC, OPT, A100): for each method (parameters, GB), the smallest model first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for size, methods in TABLES["22"].items():
        for method, value in methods.items():
            if isinstance(value, float):
                found.setdefault(method, []).append((float(size.removesuffix("B")) * 1e9, value))
    return found
