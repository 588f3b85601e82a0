"""What the tests are held to: which of them are quick, and that none hangs on how fast a machine is."""

import ast
import multiprocessing
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

from quick import HERE, nothing_starts, reaches_a_starter

CLOCKS = {
    "time",
    "monotonic",
    "perf_counter",
    "process_time",
    "thread_time",
    "monotonic_ns",
    "perf_counter_ns",
    "time_ns",
}
ABOUT_DURATIONS = {"test_service_latency.py"}  # which compares those that SGLang reports, in their order


# --- quick tests ------------------------------------------------------------------------------------------------------


def at_hand():
    from engine_process import EngineProcess

    return EngineProcess()


def by_a_program():
    return subprocess.run(["true"])


def by_a_helper():
    return by_a_program()


def by_an_inner_function():
    def inner():
        return at_hand()

    return inner


def by_a_new_interpreter():
    return multiprocessing.get_context("spawn").Process(target=print)


class Holder:
    @cached_property
    def engine(self):
        return by_a_helper()


def by_a_property():
    return Holder().engine


def nothing():
    return sorted(HERE.iterdir()) and Path.cwd()


@pytest.mark.parametrize(
    "function", [at_hand, by_a_program, by_a_helper, by_an_inner_function, by_a_new_interpreter, by_a_property]
)
def test_what_starts_something_is_not_quick(function):
    assert reaches_a_starter(nothing, function)


def test_what_starts_nothing_is_quick():
    assert not reaches_a_starter(nothing)


def test_a_quick_test_that_starts_something_fails():
    run = subprocess.run  # not seen as one that starts something
    as_they_are = subprocess.Popen.__init__, multiprocessing.context.SpawnProcess.start
    with nothing_starts():
        with pytest.raises(AssertionError, match="a quick test starts python"):
            run([sys.executable, "-c", "pass"])
        assert run(["true"]).returncode == 0
        process = multiprocessing.get_context("".join(["sp", "awn"])).Process(target=print)
        with pytest.raises(AssertionError, match="a quick test starts an engine"):
            process.start()
    assert (subprocess.Popen.__init__, multiprocessing.context.SpawnProcess.start) == as_they_are


# --- clocks -----------------------------------------------------------------------------------------------------------


def durations(tree: ast.AST) -> list[int]:
    """Lines in which the reading of a clock is compared with another: one less the other."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and reads_a_clock(node.left)
        and not isinstance(node.right, ast.Constant)
    ]


def reads_a_clock(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CLOCKS
        and ast.unparse(node.func.value) == "time"
    )


@pytest.mark.parametrize("path", sorted(HERE.glob("*.py")), ids=lambda path: path.name)
def test_no_test_measures_a_time(path):
    """On a busy machine everything takes as long as it likes: what must be quick is shown by what is not done, or in
    a benchmark."""
    assert path.name in ABOUT_DURATIONS or durations(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_a_measured_time():
    code = (
        "began = time.monotonic()\nwork()\nassert time.monotonic() - began < 0.5\n"
        "deadline = time.monotonic() + 20\nearlier = time.time() - 1795"
    )
    assert durations(ast.parse(code)) == [3]
