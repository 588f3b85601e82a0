"""Writes the tables of docs/reproducing.md from the named experiments and from what is in benchmarks/results:
``python scripts/reproducing_page.py``."""

from collections.abc import Iterator
from pathlib import Path

from sglang.srt.mezo.experiments.cost import cost_of, parameters_of
from sglang.srt.mezo.experiments.readiness import memory_of
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.spec import FILE, PRESETS, Experiment, arguments_of
from sglang.srt.mezo.experiments.tables import write_tables

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "reproducing.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by scripts/reproducing_page.py: {} -->\n", "<!-- made until here -->\n"


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, lines in {"experiments": experiments(), "results": results()}.items():
        before, rest = text.split(BEGIN.format(name))
        text = before + BEGIN.format(name) + "\n".join(["", *lines, "", ""]) + END + rest.split(END, 1)[1]
    return text


def experiments() -> Iterator[str]:
    yield "| name | what | cells | forward passes | hours on an H100 | memory | measured |"
    yield "|---" * 7 + "|"
    for path in sorted(PRESETS.glob("*.yaml")):
        experiment = Experiment.read(path)
        cells = experiment.cells()
        costs = [cost_of(cell) for cell in cells]
        size, dtype = parameters_of(str(experiment.model["model"])), str(experiment.model.get("dtype", "auto"))
        hours, memory = sum(cost.hours or 0 for cost in costs), "known at its folder"
        if size is not None:
            most = max(
                (memory_of(cell.method, size, dtype, tp_size), cell.method, tp_size)
                for cell in cells
                for tp_size in [arguments_of(cell)[0].tp_size]
            )
            memory = told_memory(*most)
        passes = sum(cost.forward_passes for cost in costs)
        told = [experiment.description, str(len(cells)), f"{passes:,}", told_hours(hours), memory, measured(path.stem)]
        yield f"| `{path.stem}` | {' | '.join(told)} |"


def told_memory(needed: float, method: str, tp_size: int) -> str:
    """Of the method that needs most."""
    each = f" on each of {tp_size}" if tp_size > 1 else ""
    return f"{needed / 1e9:.1f} GB{each} ({method})"


def told_hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2f}" if hours >= 0.01 else "under 0.01"


def measured(name: str) -> str:
    if not (RESULTS / name / FILE).is_file():
        return "no"
    folder = opened(name)
    done = sum(folder.state(cell) == "done" for cell in folder.experiment.cells())
    return f"{done} cells, below"


def results() -> Iterator[str]:
    for path in sorted(RESULTS.glob(f"*/{FILE}")):
        yield "##" + write_tables(opened(path.parent.name)).rstrip()


def opened(name: str) -> Folder:
    return Folder(RESULTS / name, Experiment.read(RESULTS / name / FILE))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
