"""Every model family that can be trained, against Transformers + PEFT: runs its test and writes the table in
docs/models.md.

python benchmarks/families.py
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"

sys.path.insert(0, str(ROOT / "test" / "srt"))


def main() -> int:
    measured = Measured()
    status = pytest.main(["-q", str(ROOT / "test" / "srt" / "test_families_engine.py")], plugins=[measured])
    if status:
        return int(status)
    RESULTS.write_text(json.dumps(measured.families, indent=2) + "\n")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n".join(table(measured.families)) + "\n" + END + after, encoding="utf-8")
    return 0


class Measured:
    """Collects what the tests record: by architecture and tuning, the largest difference of each kind."""

    def __init__(self):
        self.families: dict[str, dict[str, dict[str, float]]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            for kind, (architecture, tuning, difference) in report.user_properties:
                found = self.families.setdefault(architecture, {}).setdefault(tuning, {})
                found[kind] = max(difference, found.get(kind, 0.0))


def table(families: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    from sglang.srt.mezo.adapters.families import FAMILIES

    lines = [
        "| family | architecture | `target_modules` | losses differ by (LoRA, aLoRA) | served log-probabilities "
        "differ by (LoRA, aLoRA) |",
        "|---|---|---|---|---|",
    ]
    for architecture, family in sorted(FAMILIES.items(), key=lambda item: item[1].name.lower()):
        losses, served = (
            ", ".join(_shown(families[architecture].get(tuning, {}).get(kind)) for tuning in ("lora", "alora"))
            for kind in ("losses", "served")
        )
        lines.append(f"| {family.name} | `{architecture}` | {', '.join(family.modules)} | {losses} | {served} |")
    return lines


def _shown(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.0e}"


if __name__ == "__main__":
    sys.exit(main())
