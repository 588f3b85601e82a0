"""Tensor-parallel ranks of an engine in the calling process: this process is the first, the others are started here.

All of them do the same work. Whichever dies, the others end: what they share would wait for it for ever.
"""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from sglang.srt.mezo.core.errors import MezoError, RankError

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0  # in which a rank that hears of another's end by itself may say so
_MET_BY_ALL = 2  # exit code of a rank that a user's mistake or a full disk ends, which the first meets and tells itself
_GRACE_TO_MEET_SECONDS = 60.0


class Rank(NamedTuple):
    """tp_rank: of this process. nccl_port: at which the ranks find each other; None where there is one."""

    tp_rank: int = 0
    nccl_port: int | None = None

    @property
    def is_first(self) -> bool:
        return self.tp_rank == 0


FIRST = Rank()


@contextmanager
def other_ranks(tp_size: int, work: Callable[..., object], *arguments: object) -> Iterator[Rank]:
    """Start the ranks beside this one, each of which does ``work(rank, *arguments)``, and end them with the block.

    Args:
        work: of a module, so that a new process can import it.

    Raises:
        RankError: one of them has died.
    """
    if tp_size == 1:
        yield FIRST
        return
    from sglang.srt.utils.network import get_free_port_below_ephemeral

    port, context = get_free_port_below_ephemeral(), multiprocessing.get_context("spawn")
    given = [(os.getpid(), work, Rank(number, port), arguments) for number in range(1, tp_size)]
    others = [context.Process(target=_work, args=one, daemon=True) for one in given]
    over = threading.Event()
    for process in others:
        process.start()
    threading.Thread(target=_watch, args=(others, over), daemon=True).start()
    try:
        yield Rank(0, port)
    except (MezoError, OSError):
        raise
    except Exception as error:
        if (dead := _dead(others)) is not None:
            raise RankError(*dead) from error
        raise
    finally:
        over.set()
        for process in others:
            process.kill()
            process.join()


def _dead(others: Sequence[BaseProcess]) -> tuple[int, int] | None:
    """Rank and exit code of one that has died, after a moment in which it may; one that is done has not."""
    wait([one.sentinel for one in others if one.exitcode is None], _POLL_SECONDS)
    return next(((rank, one.exitcode) for rank, one in enumerate(others, 1) if one.exitcode), None)


def _watch(others: Sequence[BaseProcess], over: threading.Event) -> None:
    """End this process where another rank has died and this one waits for it all the same."""
    while not over.wait(_POLL_SECONDS):
        if (dead := _dead(others)) is not None:
            if over.wait(_GRACE_TO_MEET_SECONDS if dead[1] == _MET_BY_ALL else _GRACE_SECONDS):
                return
            print(f"error: {RankError(*dead)}", file=sys.stderr, flush=True)
            for process in others:
                process.kill()
            os._exit(1)


def _work(first: int, work: Callable[..., object], rank: Rank, arguments: Sequence[object]) -> None:
    """What another rank does, quietly: the first says what there is to say."""
    threading.Thread(target=_follow, args=(first,), daemon=True).start()
    logging.disable(logging.WARNING)
    try:
        work(rank, *arguments)
    except (MezoError, OSError):
        os._exit(_MET_BY_ALL)
    os._exit(0)  # an engine's threads are of no further use


def _follow(first: int) -> None:
    """End with the first rank."""
    waiting = threading.Event()
    while os.getppid() == first:
        waiting.wait(_POLL_SECONDS)
    os._exit(1)
