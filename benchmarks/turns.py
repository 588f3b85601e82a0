"""Engines that are measured side by side: each in a process of its own, as a process holds one engine; they take
turns."""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Operations = dict[str, Callable[..., Any]]


class Worker:
    """Runs ``open_operations(*arguments)`` in a new process, and then what ``call`` asks for by name."""

    def __init__(self, open_operations: Callable[..., Operations], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, open_operations, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises EOFError if the process has ended."""
        self._pipe.send((name, *arguments))
        return self._pipe.recv()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe, open_operations: Callable[..., Operations], arguments: tuple) -> None:
    operations = open_operations(*arguments)
    with suppress(EOFError):  # the benchmark has ended
        while True:
            name, *values = pipe.recv()
            pipe.send(operations[name](*values))
