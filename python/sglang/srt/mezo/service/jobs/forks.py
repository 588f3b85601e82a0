"""Tasks in processes of their own, which can be killed at any moment and take no time from the event loops of this
one."""

import asyncio
import hashlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from sglang.srt.mezo.service.wire.errors import RequestError

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
"""One thread, as the other cores are for requests, and no accelerator."""


class TaskEnded(RequestError):
    """The process of a task has ended without an answer, each time that it was tried."""

    def __init__(self, how: str):
        message = f"the process that tokenises the files has ended without an answer, {_ATTEMPTS} times: {how}"
        super().__init__(500, message, None, "tokenising_ended")


class Shared:
    """An object that many tasks use, as it goes to other processes: it is pickled, once."""

    def __init__(self, content: Any):
        pickled = pickle.dumps(content)
        self.digest = hashlib.sha256(pickled).digest()
        self._file = os.memfd_create("shared")
        with open(os.dup(self._file), "wb") as file:
            file.write(pickled)

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)


class Forks:
    """Starts a process that forks one for every task, at the first of them; it is niced, and ends with this process.

    Thread-safe; ``run`` is awaited in any event loop.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen, socket.socket] | None = None  # the process, and the way to it

    async def run(self, shared: Shared, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(<the shared object>, *arguments)`` returns, as JSON gives it back.

        The function and its arguments are pickled. Who is cancelled while it waits here has the process killed.

        Raises:
            TaskEnded: the process ended without an answer, twice.
            OSError: the function raised it.
            RequestError: the function raised another error; the log says what.
        """
        how = ""
        for _ in range(_ATTEMPTS):
            answer = await self._attempt(shared, pickle.dumps((function, arguments)))
            if "result" in answer:
                return answer["result"]
            if "os_error" in answer:
                raise OSError(*answer["os_error"])
            if "error" in answer:
                raise RequestError(
                    500,
                    f"{answer['error']} in the process that tokenises, and the server's log has more",
                    None,
                    "internal_error",
                )
            how = answer["ended"]
            logger.error("a process that tokenises has ended: %s", how)
        raise TaskEnded(how)

    async def _attempt(self, shared: Shared, task: bytes) -> dict[str, Any]:
        ours = await asyncio.to_thread(self._connection, shared)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            writer.write(task)
            await writer.drain()
            lines = (await reader.read()).splitlines()
        except ConnectionError:
            lines = []
        finally:
            writer.close()
        return json.loads(lines[-1]) if lines else {"ended": "the process that starts it was gone"}

    def _connection(self, shared: Shared) -> socket.socket:
        """This side of a new task's connection."""
        with self._lock:
            if self._running is None or self._running[0].poll() is not None:
                self._stop()
                self._running = _start()
            _, control = self._running
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(control, [shared.digest], [shared.fileno(), theirs.fileno()])
                except OSError:  # it is ending: the task has no other side, and is tried again
                    pass
            return ours

    def close(self) -> None:
        """End the process, and all tasks. A task that comes after it starts another one."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            process, control = self._running
            control.close()
            process.send_signal(signal.SIGKILL)
            process.wait()
            self._running = None


def _start() -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "sglang.srt.mezo.service.jobs.forks_main", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env={**os.environ, **_ENVIRONMENT}, pass_fds=[theirs.fileno()]
        )
    return process, ours
