"""The folders of the package are floors: imports go down only, no two modules import each other, and SGLang is known in
the seams.

What only a type checker looks at counts as well.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "sglang.srt.mezo"
REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "python" / "sglang" / "srt" / "mezo"
WRITTEN, SUFFIXES = (
    ("python", "test", "benchmarks", "examples", "scripts"),
    {".py", ".sh", ".c", ".js", ".css", ".html"},
)
MAX_LINES = 400

FLOORS = (
    ("core",),
    ("data", "adapters", "cpu"),
    ("engine", "service.wire"),
    ("scoring", "service.store"),
    ("training",),
    ("service.scheduler", "service.jobs", "experiments"),
    ("service.http",),
    ("plugin", "commands"),
)
"""From the lowest to the highest; folders of one floor do not know each other."""
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
KNOW_SGLANG = {"engine", "cpu", "plugin"}
SEAM = "service.wire.upstream"
"""What the service uses of SGLang."""
STANDARD = {*sys.stdlib_module_names, "numpy", "torch"}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name below the package; empty for the package itself."""
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def folder_of(module: str) -> str | None:
    """The folder that has a floor; None for what is in none, as the package itself and that of the service."""
    parts = module.split(".")
    return next((folder for end in (2, 1) if (folder := ".".join(parts[:end])) in FLOOR_OF), None)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # "from package import module" names modules, "from module import name" does not: keep what exists.
            yield from (
                f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}") else source for alias in node.names
            )


def is_module(name: str) -> bool:
    if not name.startswith(f"{PACKAGE}."):
        return False
    path = ROOT.joinpath(*name.removeprefix(f"{PACKAGE}.").split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(path: Path) -> set[str]:
    module = module_of(path)
    package = PACKAGE + (f".{module}" if module else "")
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), package))


def violations(module: str, imported: set[str]) -> list[str]:
    """Why a module must not import these names."""
    folder = folder_of(module)
    if folder is None:
        return [
            f"{module or 'the package'} is on no floor, and imports {name}"
            for name in sorted(imported)
            if name.startswith("sglang")
        ]
    wrong = []
    for name in sorted(imported):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            target = folder_of(name.removeprefix(PACKAGE).removeprefix("."))
            if target is None or target != folder and FLOOR_OF[target] >= FLOOR_OF[folder]:
                wrong.append(f"{module} imports {name}, which is not below {folder}")
        elif name.partition(".")[0] == "sglang" and folder not in KNOW_SGLANG and module != SEAM:
            wrong.append(f"{module} imports {name}: {folder} does not know SGLang")
        elif folder == "core" and name.partition(".")[0] not in STANDARD and module != "core.normal_triton":
            wrong.append(f"{module} imports {name}: core has torch, NumPy and the standard library only")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by whatever way."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        return seen

    reached = {module: reach(module) for module in graph}
    groups = {
        frozenset(other for other in graph if other in reached[module] and module in reached[other]) for module in graph
    }
    return sorted(sorted(group) for group in groups if group)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    assert violations(module_of(path), imports_of(path)) == []


def test_no_two_modules_import_each_other():
    names = {PACKAGE + (f".{module}" if (module := module_of(path)) else ""): imports_of(path) for path in FILES}
    assert circles({name: {other for other in imported if other in names} for name, imported in names.items()}) == []


def test_no_file_is_too_long():
    written = [path for folder in WRITTEN for path in (REPOSITORY / folder).rglob("*") if path.suffix in SUFFIXES]
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines()) for path in written
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {} and len(lengths) > 250


def test_the_walk_sees_the_package():
    modules = {module_of(path) for path in FILES}
    assert {"", "core.noise", "data.tasks.pairs", "cpu.attention", "training.trainer", "service.http.routes"} <= modules
    assert {folder_of(module) for module in modules} == {None, *FLOOR_OF}, (
        "no folder without a floor, and no floor without a folder"
    )


@pytest.mark.parametrize(
    ("module", "code", "problem"),
    [
        ("core.noise", "from sglang.srt.mezo.data.examples import Example", "not below core"),
        ("core.noise", "def f():\n    from sglang.srt.mezo.training import trainer", "not below core"),
        (
            "core.noise",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sglang.srt.mezo.scoring.plan import Row",
            "not below core",
        ),
        ("core.noise", "from ..scoring.plan import Row", "not below core"),
        ("core.noise", "from ..engine import slots", "not below core"),
        ("data.tasks.pairs", "from ...training.trainer import MezoTrainer", "not below data"),
        ("data.rows", "from sglang.srt.mezo.adapters.adapter import Adapter", "not below data"),
        ("data.rows", "from sglang.srt.mezo import __version__", "not below data"),
        ("service.jobs.manager", "from sglang.srt.mezo.service.scheduler.job import Job", "not below service.jobs"),
        ("core.kinds", "import transformers", "torch, NumPy and the standard library only"),
        ("scoring.plan", "import sglang.srt.lora.lora_manager", "does not know SGLang"),
        ("brand_new", "from sglang.srt.mezo.core import errors", "on no floor"),
    ],
)
def test_what_must_not_be_imported_is_seen(module, code, problem):
    package = f"{PACKAGE}.{module}".rpartition(".")[0]
    assert any(problem in found for found in violations(module, set(imports(ast.parse(code), package))))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (
            "engine.slots",
            "from sglang.srt.lora.lora_registry import LoRARef\nfrom sglang.srt.mezo.adapters.adapter import Adapter",
        ),
        ("training.run", "from sglang.srt.mezo.training.tracking import Tracker\nimport tqdm"),
        ("data.examples", "from .rows import SourceRow"),
    ],
)
def test_what_may_be_imported_is_not(module, code):
    package = f"{PACKAGE}.{module}".rpartition(".")[0]
    assert violations(module, set(imports(ast.parse(code), package))) == []


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_the_structures_page_names_every_module():
    page = (ROOT.parents[3] / "docs" / "structures.md").read_text(encoding="utf-8")
    for folder in FLOOR_OF:
        part = page.partition(f"## `{folder.replace('.', '/')}/`")[2].partition("\n## ")[0]
        names = {path.stem for path in (ROOT / folder.replace(".", "/")).glob("*.py")} - {"__init__"}
        assert [name for name in sorted(names) if f"`{name}`" not in part] == [], folder
