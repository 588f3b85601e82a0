"""Adapters of the operator's own, beside those of jobs: a name has one holder."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.wire.upstream import LoRAUpdateOutput

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import LoadLoRAAdapterReqInput, TokenizerManager


async def around_change(
    original: Callable[..., Awaitable[Any]], manager: "TokenizerManager", obj: "LoadLoRAAdapterReqInput", *args: Any
) -> Any:
    """TokenizerControlMixin.load_lora_adapter, .load_lora_adapter_from_tensors and .unload_lora_adapter: a job's name
    is neither given to another adapter nor taken from its own."""
    service: Any = getattr(manager, "mezo_service", None)
    if service is not None and service.ready and not _is_announced(manager, obj):
        job_id = await service.threads.read(service.manager.holder_of, obj.lora_name)
        if job_id is not None:
            model = f"{manager.served_model_name}:{obj.lora_name}"
            allowed = f"job {job_id} has that name; DELETE /v1/models/{model} frees it, once the job has ended"
            message = f"lora_name={shown(obj.lora_name)} is not allowed: {allowed}"
            return LoRAUpdateOutput(success=False, error_message=message)
    return await original(manager, obj, *args)


def _is_announced(manager: "TokenizerManager", obj: Any) -> bool:
    """Whether SGLang itself asks, for the first request under a name that was announced."""
    known, path = manager.lora_ref_cache.get(obj.lora_name), getattr(obj, "lora_path", None)
    return known is not None and path is not None and known.lora_path == path
