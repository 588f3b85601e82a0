"""``--quick``: the tests that start no engine and no server. What each of them reaches decides, and it is held to
that as it runs."""

import multiprocessing.context
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STARTERS = {
    "LiveServer",
    "EngineProcess",
    "ServingEngine",
    "MezoEngine",
    "Engine",
    "subprocess",
    "spawn",
    "other_ranks",
    "fork_tasks",
    "gpu_run",
    "selenium.webdriver",
}
"""Names in code that starts an engine, a server, a browser, or a fresh interpreter, which takes seconds to import
SGLang; with ``fork_tasks``, of tests that have tasks done in forks of one."""


def is_quick(item: pytest.Function) -> bool:
    """Whether the test is not marked as slow, and neither it nor a fixture of its reaches a starter."""
    fixtures = [
        definition.func for definitions in item._fixtureinfo.name2fixturedefs.values() for definition in definitions
    ]
    return item.get_closest_marker("slow") is None and not reaches_a_starter(item.function, *fixtures)


def reaches_a_starter(*functions: Any) -> bool:
    """Walk from functions on to those functions and classes of the tests' own modules that their code names."""
    seen: set[int] = set()
    ahead = list(functions)
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for code, names in _codes(value):
            for name in _words(code):
                if name in STARTERS:
                    return True
                ahead.append(names.get(name))
    return False


def _codes(value: Any) -> Iterator[tuple[types.CodeType, dict[str, Any]]]:
    """Code of a function, or of a class's methods, with the globals that it sees; nothing where it is not the tests'
    own."""
    if isinstance(value, type):
        for member in (
            [*vars(value).values(), *value.__bases__] if hasattr(sys.modules.get(value.__module__), "__file__") else []
        ):
            for part in ("fget", "func", "__func__"):  # properties, cached properties, class methods
                member = getattr(member, part, member)
            if value.__module__ == getattr(member, "__module__", None):
                yield from _codes(member)
    else:
        function = getattr(value, "__wrapped__", value)
        code = getattr(function, "__code__", None)
        if code is not None and HERE in Path(code.co_filename).parents:
            yield code, function.__globals__


def _words(code: types.CodeType) -> Iterator[str]:
    """Globals, attributes and imports that code names, and its strings; also those of functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _words(constant)


@contextmanager
def nothing_starts() -> Iterator[None]:
    """While it holds, starting one of the ``STARTERS`` is an error that says so."""
    from sglang.srt.mezo.engine.handle import MezoEngine

    popen = subprocess.Popen.__init__

    def only_small_programs(self, command, *arguments, **settings):
        program = Path(command if isinstance(command, str | Path) else command[0]).name
        if program.startswith(("python", "sglang", "bash", "chrome")):
            raise AssertionError(f"a quick test starts {program}")
        popen(self, command, *arguments, **settings)

    def refuse(*arguments, **settings):
        raise AssertionError("a quick test starts an engine, or a process that imports everything anew")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", only_small_programs)
        patch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
        patch.setattr(multiprocessing.context.ForkServerProcess, "start", refuse)
        patch.setattr(MezoEngine, "__init__", refuse)
        yield
