"""Imports go down the floors only; a file that grows too long is asking to be two."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "sglang.srt.mezo"
ROOT = Path(__file__).resolve().parents[2] / "python" / "sglang" / "srt" / "mezo"
MAX_LINES = 400

FLOORS = {
    0: ("", "allocator", "errors", "kinds", "config", "noise", "losses", "invocation", "estimator", "optimizer", "seed_log", "integrity", "passes", "fingerprint"),  # "" is the package itself
    1: ("tasks", "rows", "conversation", "chat", "chat_templates", "texts", "data", "batches", "sharing", "plan", "readout", "adapter", "peft_config", "peft_adapter", "families", "differences"),
    2: ("accelerator", "base_model", "engine", "forward", "head", "kv_pool", "prefix", "slot_room", "layers", "peft_layers", "slots", "scorer"),
    3: ("evaluate", "run_directory", "start", "pass_sizes", "tracking", "run", "trainer", "arguments", "checkpoint", "splits", "finetune", "plots"),
    4: ("service",),
    5: ("plugin", "hooks", "overlay", "platform", "cpu", "alora_serving", "isolation", "adapter_loading", "upstream_models", "online", "cli"),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
KNOWS_SGLANG = {2, 4, 5}
SEAMS = {"chat_templates"}  # what a prompt is, SGLang decides
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name below the package; empty for the package itself."""
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def floor_of(module: str) -> int | None:
    """Floor of a module below the package, by its first name."""
    return FLOOR_OF.get(module.partition(".")[0])


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a file imports, in functions too, except where only a type checker looks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # "from package import module" names modules, "from module import name" does not: keep what exists.
            yield from (f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}") else source for alias in node.names)
        else:
            yield from imports(node, package)


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
    floor = floor_of(module)
    if floor is None:
        return [f"{module} is on no floor: add it to FLOORS"]
    wrong = []
    for name in sorted(imported):
        own = name == PACKAGE or name.startswith(f"{PACKAGE}.")
        target = floor_of(name.removeprefix(PACKAGE).removeprefix("."))
        if own and target is None:
            wrong.append(f"{module} imports {name}, which is on no floor")
        elif own and target > floor:
            wrong.append(f"{module} (floor {floor}) imports {name} (floor {target}), which is above it")
        elif not own and name.partition(".")[0] == "sglang" and floor not in KNOWS_SGLANG and module not in SEAMS:
            wrong.append(f"{module} (floor {floor}) imports {name}: this floor does not know SGLang")
        elif not own and floor == 0 and name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "torch"}:
            wrong.append(f"{module} imports {name}: floor 0 has torch, NumPy and the standard library only")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    assert violations(module_of(path), imports_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_walk_sees_the_package():
    assert {"", "noise", "tasks.sst2", "cpu.attention", "trainer"} <= {module_of(path) for path in FILES}


def test_no_module_is_on_two_floors():
    assert len(FLOOR_OF) == sum(map(len, FLOORS.values()))


@pytest.mark.parametrize(
    ("module", "code", "problem"),
    [
        ("noise", "from sglang.srt.mezo.data import Example", "above it"),
        ("noise", "def f():\n    from sglang.srt.mezo import trainer", "above it"),
        ("noise", "from .plan import Row", "above it"),
        ("noise", "from . import errors, scorer", "above it"),
        ("tasks.sst2", "from ..trainer import MezoTrainer", "above it"),
        ("losses", "import pandas as pd", "torch, NumPy and the standard library only"),
        ("plan", "import sglang.srt.lora.lora_manager", "does not know SGLang"),
        ("brand_new", "import math", "on no floor"),
        ("data", "from sglang.srt.mezo.engine import EngineHandle", "above it"),
    ],
)
def test_the_walk_finds_what_it_looks_for(module, code, problem):
    package = f"{PACKAGE}.{module}".rpartition(".")[0]
    found = violations(module, set(imports(ast.parse(code), package)))
    assert len(found) == 1 and problem in found[0]


def test_imports_for_the_type_checker_may_go_up():
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sglang.srt.mezo.trainer import MezoTrainer"
    assert violations("noise", set(imports(ast.parse(code), PACKAGE))) == []
