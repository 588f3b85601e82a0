"""Adapters under names that requests use: the seam with the LoRA registry of SGLang's TokenizerManager.

A name stands for one adapter at any time. To publish is to load the new adapter beside the old one and then to move the
name: a request keeps the adapter that its name stood for when it came.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.service.wire.errors import PublishError
from sglang.srt.mezo.service.wire.upstream import LoadLoRAAdapterReqInput, LoRARef, UnloadLoRAAdapterReqInput

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import TokenizerManager

logger = logging.getLogger(__name__)

# SGLang looks an adapter up and counts the request as its user in two steps; nothing is unloaded between them.
_GRACE_SECONDS = 1.0

_unloading: set[asyncio.Task] = set()


def names(tokenizer_manager: "TokenizerManager") -> set[str]:
    """Every name that the server answers to, whether the adapter is loaded or will be when it is first asked for.

    Of two dictionaries of strings, each in one step of the interpreter: any thread may ask.
    """
    return {*tokenizer_manager.lora_ref_cache, *tokenizer_manager.lora_registry._registry}


def is_loaded(tokenizer_manager: "TokenizerManager", name: str) -> bool:
    return name in tokenizer_manager.lora_registry._registry


def folder_of(tokenizer_manager: "TokenizerManager", name: str) -> str | None:
    """Where the adapter lies that a name stands for; None where there is none, or it came as tensors."""
    known = {**tokenizer_manager.lora_ref_cache, **tokenizer_manager.lora_registry.get_all_adapters()}
    return known[name].lora_path if name in known and known[name].lora_path != "__tensor__" else None


def announce(tokenizer_manager: "TokenizerManager", name: str, directory: Path) -> None:
    """Answer to a name that is new; SGLang loads the adapter for the first request."""
    tokenizer_manager.lora_ref_cache[name] = LoRARef(lora_name=name, lora_path=str(directory), pinned=False)


async def publish(
    tokenizer_manager: "TokenizerManager",
    name: str,
    directory: Path,
    record: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Load an adapter and let ``name`` stand for it.

    Args:
        record: puts on record that it does; awaited once the adapter is loaded. Whoever reads the record can ask for
            the name at once, so one that is new answers before that.

    Raises:
        PublishError: it cannot be loaded; the name stands for what it stood for before, as it does where ``record``
            raises.
    """
    # Where this were cancelled halfway, the next command would get the scheduler's answer.
    await asyncio.shield(_publish(tokenizer_manager, name, directory, record))


async def withdraw(tokenizer_manager: "TokenizerManager", name: str) -> None:
    """Answer to a name no more. Requests that are under way are answered."""
    await asyncio.shield(_withdraw(tokenizer_manager, name))


async def _publish(
    tokenizer_manager: "TokenizerManager", name: str, directory: Path, record: Callable[[], Awaitable[None]] | None
) -> None:
    tokenizer_manager.auto_create_handle_loop()
    async with tokenizer_manager.lora_update_lock:
        # SGLang unloads the adapter used least under --max-loaded-loras by the name that the scheduler knows, which is
        # another one here: pinned in the registry, though not in the scheduler's pool, it is spared.
        new = LoRARef(lora_name=name, lora_path=str(directory), pinned=True)
        load = LoadLoRAAdapterReqInput(lora_name=f"{name}@{new.lora_id}", lora_path=str(directory), lora_id=new.lora_id)
        replies = await _communicator(tokenizer_manager)(load)
        failures = {reply.error_message for reply in replies if not reply.success}
        if failures:
            if len(failures) < len(replies):
                await _unload(tokenizer_manager, new)
            raise PublishError(f"the adapter {name!r} cannot be loaded: {' | '.join(map(str, failures))}")
        is_new = not is_loaded(tokenizer_manager, name)
        old = await _point(tokenizer_manager, name, new) if is_new else None
        try:
            if record is not None:
                await record()
        except Exception:
            if is_new:
                await _point(tokenizer_manager, name, None)
                _unload_when_idle(tokenizer_manager, new)
            else:
                await _unload(tokenizer_manager, new)
            raise
        if not is_new:
            old = await _point(tokenizer_manager, name, new)
        announce(tokenizer_manager, name, directory)
    if old is not None:
        _unload_when_idle(tokenizer_manager, old)


async def _withdraw(tokenizer_manager: "TokenizerManager", name: str) -> None:
    tokenizer_manager.auto_create_handle_loop()
    async with tokenizer_manager.lora_update_lock:
        tokenizer_manager.lora_ref_cache.pop(name, None)
        old = await _point(tokenizer_manager, name, None)
    if old is not None:
        _unload_when_idle(tokenizer_manager, old)


async def _point(tokenizer_manager: "TokenizerManager", name: str, new: LoRARef | None) -> LoRARef | None:
    """Let a name stand for another adapter, or for none, in one step; returns the one before."""
    registry = tokenizer_manager.lora_registry
    async with registry._registry_lock.writer_lock:
        old = registry._registry.pop(name, None)
        if new is not None:
            registry._register_adapter(new)
    return old


def _unload_when_idle(tokenizer_manager: "TokenizerManager", ref: LoRARef) -> None:
    task = asyncio.create_task(_wait_and_unload(tokenizer_manager, ref))
    _unloading.add(task)
    task.add_done_callback(_unloading.discard)


async def _wait_and_unload(tokenizer_manager: "TokenizerManager", ref: LoRARef) -> None:
    await asyncio.sleep(_GRACE_SECONDS)
    await tokenizer_manager.lora_registry.wait_for_unload(ref.lora_id)
    async with tokenizer_manager.lora_update_lock:
        await _unload(tokenizer_manager, ref)


def _communicator(tokenizer_manager: Any) -> Callable[[Any], Awaitable[list[Any]]]:
    """SGLang gives its managers their communicators while it runs."""
    return tokenizer_manager.update_lora_adapter_communicator


async def _unload(tokenizer_manager: "TokenizerManager", ref: LoRARef) -> None:
    assert ref.lora_name is not None, "published under a name"
    unload = UnloadLoRAAdapterReqInput(lora_name=ref.lora_name, lora_id=ref.lora_id)
    for reply in await _communicator(tokenizer_manager)(unload):
        if not reply.success:
            logger.error("an earlier version of adapter %r stays loaded: %s", ref.lora_name, reply.error_message)
