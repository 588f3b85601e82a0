"""Tasks: how a row of a data set becomes a prompt, its options and the right one."""

from sglang.srt.mezo.data.tasks.base import MaskedText, Task, TextExample
from sglang.srt.mezo.data.tasks.sst2 import SST2

TASKS: dict[str, Task] = {task.name: task for task in (SST2(),)}

__all__ = ["SST2", "TASKS", "MaskedText", "Task", "TextExample"]
