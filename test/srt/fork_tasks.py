"""What tests have a forked process do: functions of an object that the tasks share, here a list."""

import errno
import os
import signal
import time
from pathlib import Path


def add(shared: list[int], number: int) -> dict:
    return {"sum": sum(shared) + number, "process": os.getpid(), "parent": os.getppid()}


def niceness(shared) -> int:
    return os.nice(0)


def wait(shared, path: Path) -> None:
    """For ever, once its process is known."""
    path.write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def die(shared, path: Path, times: int) -> str:
    """By a signal, the first ``times`` times that it is tried."""
    tried = len(path.read_text()) if path.exists() else 0
    path.write_text("x" * (tried + 1))
    if tried < times:
        os.kill(os.getpid(), signal.SIGSEGV)
    return "alive"


def take_memory(shared) -> None:
    bytearray(1 << 50)


def fill_disk(shared) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full")


def break_down(shared) -> None:
    raise ZeroDivisionError("secret")
