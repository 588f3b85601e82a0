"""Where the service works: beside SGLang's event loop, in which tokens are streamed and nothing may block.

What changes the store runs in an event loop of its own, in one thread, and so in the order in which it comes. It may
wait there for the disk, or for another process that has locked the database. What only reads runs in threads beside it.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_READERS = 4
_CLOSE_SECONDS = 3.0


async def run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Await what runs in an event loop, from another or from the same. It is cancelled with who waits for it."""
    if loop is asyncio.get_running_loop():
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


class ServiceThreads:
    """To be started once, and used from the event loop of the server."""

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._readers = ThreadPoolExecutor(_READERS, "mezo-reader")
        self._thread = threading.Thread(target=self._loop.run_forever, name="mezo-service", daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await what belongs into the service's loop."""
        return await run_in(self._loop, work)

    async def call(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call a function in the service's thread, after what came before."""

        async def called() -> Result:
            return function(*args, **kwargs)

        return await self.run(called())

    async def read(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call a function that changes nothing, and waits for nothing that does."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: function(*args, **kwargs))

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a function called in the service's thread, after what came before; nobody waits for it."""
        self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Cancel whatever is still at work. Blocks, for some seconds at most: a thread that hangs ends with the
        process."""
        self._readers.shutdown(wait=False)
        cancelled = asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)
        cancelled.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
