"""Commands to the scheduler, from the HTTP process."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.service.jobs.threads import run_in
from sglang.srt.mezo.service.wire.errors import DiskFull, EngineRefused
from sglang.srt.mezo.service.wire.messages import Command, MezoReqInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sglang.srt.mezo.service.wire.upstream import TokenizerManager


Result = TypeVar("Result")


class EngineClient:
    """The engine as the service sees it, from whatever thread. To be made in SGLang's event loop, where it is spoken
    to."""

    def __init__(self, tokenizer_manager: "TokenizerManager"):
        self.tokenizer_manager = tokenizer_manager
        self._loop = asyncio.get_running_loop()

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        tokenizer: Any = self.tokenizer_manager.tokenizer
        return tokenizer

    @property
    def chat_settings(self) -> ChatSettings:
        """How the server renders chat requests."""
        return ChatSettings(
            **{name: self.tokenizer_manager.config_value(name) for name in ChatSettings.__dataclass_fields__}
        )

    @property
    def served_model_name(self) -> str:
        return self.tokenizer_manager.served_model_name

    @property
    def context_length(self) -> int:
        return self.tokenizer_manager.context_len

    async def call(self, command: Command) -> dict[str, Any]:
        """Send a command to every rank and return the result of the first.

        Raises:
            EngineRefused: with the scheduler's message and the field at fault.
            DiskFull: a file of the run could not be written.
        """
        # SGLang's communicator hands the answer of a call that was cancelled to the next one: ours are waited for.
        return await asyncio.shield(self.run(self._exchange(command)))

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await what belongs into SGLang's event loop."""
        return await run_in(self._loop, work)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a function called in SGLang's event loop; at once where this is it."""
        if asyncio.get_running_loop() is self._loop:
            function(*args)
        else:
            self._loop.call_soon_threadsafe(function, *args)

    async def _exchange(self, command: Command) -> dict[str, Any]:
        self.tokenizer_manager.auto_create_handle_loop()
        manager: Any = self.tokenizer_manager  # the communicator is ours
        replies = await manager.mezo_control_communicator(MezoReqInput(command=command))
        for reply in replies:
            if not reply.success and reply.code == "disk_full":
                raise DiskFull(reply.message)
            if not reply.success:
                raise EngineRefused(reply.message, reply.param)
        return replies[0].result
