"""The process that `Forks` starts: it imports what tokenising takes, once, and then forks a process for every task.

    python -m sglang.srt.mezo.service.jobs.forks_main <file descriptor of a Unix socket>

Over the socket come tasks: the digest of an object that many tasks share, a file with that object pickled, and a
connection. The forked process reads (function, arguments) from the connection and answers with a line of JSON, what
function(object, *arguments) has returned. It is killed when the other end of the connection is closed; where it ends
without an answer, a line says how.
"""

import ctypes
import json
import logging
import os
import pickle
import resource
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from sglang.srt.mezo.service.jobs import tokenising  # noqa: F401  what tasks need is imported once

logger = logging.getLogger(__name__)

DIGEST_BYTES = 32
_NICENESS = 19
_PR_SET_PDEATHSIG = 1
_MEMORY = max(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)  # bytes that a task may take


@dataclass(frozen=True)
class _Task:
    """A forked process, the descriptor that tells of its end, and this side's copy of its connection."""

    process: int
    end: int
    connection: socket.socket


class Forker:
    """Runs in one thread, as a fork has no other."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._by_descriptor: dict[int, _Task] = {}
        self._digest, self._shared = b"", None

    def serve(self) -> None:
        """Until the other end of the socket is closed."""
        while True:
            for descriptor, _ in self._poll.poll():
                task = self._by_descriptor.get(descriptor)
                if descriptor == self._control.fileno():
                    if not self._accept():
                        return
                elif task is not None and descriptor == task.end:
                    self._reap(task)
                elif task is not None:  # nobody waits for the answer
                    os.kill(task.process, signal.SIGKILL)
                    self._poll.unregister(descriptor)

    def _accept(self) -> bool:
        digest, descriptors, _, _ = socket.recv_fds(self._control, DIGEST_BYTES, 2)
        if not digest:
            return False
        file, connection = descriptors[0], socket.socket(fileno=descriptors[1])
        if digest != self._digest:
            self._shared = _unpickled(os.pread(file, os.fstat(file).st_size, 0))
            self._digest = digest
        os.close(file)
        process = os.fork()
        if process == 0:
            self._control.close()
            for task in set(self._by_descriptor.values()):
                task.connection.close()
            _run(self._shared, connection)
        task = _Task(process, os.pidfd_open(process), connection)
        self._by_descriptor |= {task.end: task, connection.fileno(): task}
        self._poll.register(task.end, select.POLLIN)
        self._poll.register(connection, 0)  # which tells of its other end alone
        return True

    def _reap(self, task: _Task) -> None:
        _, status = os.waitpid(task.process, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            _answer(task.connection, {"ended": how})
        for descriptor in (task.end, task.connection.fileno()):
            del self._by_descriptor[descriptor]
            try:
                self._poll.unregister(descriptor)
            except KeyError:  # it was killed
                pass
        os.close(task.end)
        task.connection.close()


def _unpickled(pickled: bytes) -> Any:
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()  # where the classes of tokenizers lie that come with their code
    return pickle.loads(pickled)


def _run(shared: Any, connection: socket.socket) -> NoReturn:
    """Of the forked process: the task, and its end."""
    status = 1
    try:
        _end_with_parent()
        _bound_memory()
        with connection.makefile("rb") as stream:
            function, arguments = pickle.load(stream)
        _answer(connection, {"result": function(shared, *arguments)})
        status = 0
    except MemoryError:
        _answer(connection, {"ended": f"more than {_MEMORY >> 30} GiB of memory"})
        status = 0
    except OSError as error:  # of the disk, about which something can be done
        _answer(connection, {"os_error": [error.errno, error.strerror, error.filename]})
        status = 0
    except Exception as error:
        logger.exception("a task failed")
        _answer(connection, {"error": type(error).__name__})
        status = 0
    finally:
        logging.shutdown()
        os._exit(status)  # nothing that this process has inherited is to be ended by it


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it had ended before that
        os._exit(1)


def _bound_memory() -> None:
    """Of a machine that runs out of memory, this process is the first to go."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[5])  # of data
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _answer(connection: socket.socket, content: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(content).encode() + b"\n")
    except OSError:  # nobody waits for it any more
        pass


if __name__ == "__main__":
    os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the server, which ends this process
    logging.basicConfig(format="[%(asctime)s tokenising] %(message)s")
    Forker(socket.socket(fileno=int(sys.argv[1]))).serve()
