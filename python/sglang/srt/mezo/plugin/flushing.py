"""What is to be done once SGLang has emptied its KV pool."""

from collections.abc import Callable

from sglang.srt.mezo.plugin import served_prefixes
from sglang.srt.mezo.plugin.hooks import Hook


def _around_flush(original: Callable, scheduler, *args, **kwargs) -> bool:
    """Prefixes are placed anew, before anything else takes the room, and training gives up what it held."""
    flushed = original(scheduler, *args, **kwargs)
    if flushed:
        served_prefixes.place_all()
        runner = getattr(scheduler, "mezo_runner", None)  # of a server that trains, once it has had a command
        if runner is not None:
            runner.on_flush()
    return flushed


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler",
        "Scheduler.flush_cache",
        "around",
        _around_flush,
        "places prefixes anew; training gives up its locks with the cache",
    ),
)
