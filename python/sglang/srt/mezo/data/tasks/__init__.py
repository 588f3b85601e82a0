"""Tasks: how a row of a data set becomes a prompt, its options and the right one."""

import inspect
from typing import Any

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.core.user_code import user_object
from sglang.srt.mezo.data.tasks.answers import DROP, SQuAD
from sglang.srt.mezo.data.tasks.base import MaskedText, Piece, Task, TextExample, final
from sglang.srt.mezo.data.tasks.choices import COPA, WSC, BoolQ, MultiRC, ReCoRD, WiC
from sglang.srt.mezo.data.tasks.pairs import CB, MNLI, MRPC, RTE, SNLI
from sglang.srt.mezo.data.tasks.sentiment import SST2, SST5, TREC

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(SST2(), SST5(), TREC(), MNLI(), SNLI(), RTE(), MRPC(), CB()),
        *(COPA(), BoolQ(), WiC(), WSC(), MultiRC(), ReCoRD(), SQuAD(), DROP()),
    )
}

__all__ = ["TASKS", "MaskedText", "Piece", "Task", "TextExample", "final", "get_task"]


def get_task(name: str) -> Task:
    """The task of that name, as SST2, sst-2 and sst2 are one, or a ``module:Class`` of the user's.

    Raises:
        ConfigError: there is no such class, or it is none of a task.
        DataError: there is no task of that name.
    """
    if ":" in name:
        return user_object("task", name, "module:Class, a Task of sglang.srt.mezo.data.tasks", _own)
    task = TASKS.get(name.lower().replace("-", "").replace("_", ""))
    if task is None:
        raise DataError(f"unknown task {name!r}; known tasks: {', '.join(sorted(TASKS))}, and module:Class")
    return task


def _own(kind: Any) -> Task:
    if not (inspect.isclass(kind) and issubclass(kind, Task)):
        raise TypeError(f"{kind} is no such class")
    return kind()
