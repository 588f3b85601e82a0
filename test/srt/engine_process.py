"""An engine in a process of its own, for tests: SGLang keeps one engine's parallel state in a process.

Imports take ten times as long as a small engine. On CPU processes are forked from one that has done them.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

from sglang.srt.mezo.plugin.platform import has_accelerator


def require_devices(count: int) -> None:
    """Skip a test of so many tensor-parallel ranks where there are fewer GPUs; on the CPU ranks are processes."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() < count:
        pytest.skip(f"{count} GPUs are needed, and there are {torch.accelerator.device_count()}")


class EngineProcess:
    """Starts a MezoEngine in a new process and runs functions on it.

    Args:
        engine_arguments: keyword arguments of MezoEngine.
    """

    _has_children = False

    def __init__(self, **engine_arguments: Any):
        context = multiprocessing.get_context("spawn" if has_accelerator() else "forkserver")
        self._pipe, theirs = context.Pipe()
        arguments = theirs, dict(os.environ), self._make, engine_arguments
        self._process = context.Process(target=_serve, args=arguments, daemon=not self._has_children)
        context.set_forkserver_preload(["engine_imports"])
        with patch.dict(
            os.environ, PYTHONPATH=str(Path(__file__).parent)
        ):  # where the fork server, if it is to start, finds that
            self._process.start()
        theirs.close()
        self._receive()

    @staticmethod
    def _make(**arguments: Any) -> Any:
        from sglang.srt.mezo.engine.handle import MezoEngine

        return MezoEngine(**arguments)

    def call(self, function: Callable, *arguments: Any) -> Any:
        """``function(engine, *arguments)`` in the engine's process; both must be picklable."""
        self._pipe.send((function, arguments))
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(30)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError as error:
            self._process.join(10)
            raise RuntimeError(f"the engine's process ended with {self._process.exitcode}") from error
        if not ok:
            raise value[0] if value[0] is not None else RuntimeError(value[1])
        return value


class ServingEngine(EngineProcess):
    """Starts an ``sglang.Engine`` in a new process, whose methods can be called here.

    SGLang ends the whole process that an engine lives in when one of its schedulers fails, so that of the tests must
    not be it.

    Args:
        engine_arguments: keyword arguments of ``sglang.Engine``.
    """

    _has_children = True

    @staticmethod
    def _make(**arguments: Any) -> Any:
        import sglang

        return sglang.Engine(**arguments)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: self.call(_call_method, name, arguments, keywords)


def _call_method(engine, name: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
    return getattr(engine, name)(*arguments, **keywords)


def _serve(pipe, environment: dict[str, str], make: Callable, engine_arguments: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the fork server's is that of its start
    try:
        engine = make(**engine_arguments)
        pipe.send((True, None))
        while True:
            function, arguments = pipe.recv()
            pipe.send(_outcome(function, engine, arguments))
    except EOFError:
        pass
    except BaseException as error:
        pipe.send((False, (None, f"{error}\n{traceback.format_exc()}")))
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)  # the engine's threads are of no further use


def _outcome(function: Callable, engine, arguments: tuple) -> tuple[bool, Any]:
    from sglang.srt.mezo.core.errors import MezoError

    try:
        return True, function(engine, *arguments)
    except MezoError as error:
        return False, (error, None)
    except Exception:
        return False, (None, traceback.format_exc())
