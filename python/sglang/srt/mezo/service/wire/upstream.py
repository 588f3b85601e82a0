"""The seam between the service and SGLang: what of SGLang's the service uses, but for what the plugin hooks."""

from typing import TYPE_CHECKING

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse, CompletionResponse
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    BaseReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    BatchTokenIDOutput,
    EmbeddingReqInput,
    GenerateReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
    hook_custom_types,
)
from sglang.srt.runtime_context import get_observability
from sglang.srt.utils import kill_process_tree
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.srt.utils.json_response import SGLangORJSONResponse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

__all__ = [
    "HEALTH_CHECK_RID_PREFIX",
    "AuthLevel",
    "BaseReq",
    "BatchEmbeddingOutput",
    "BatchStrOutput",
    "BatchTokenIDOutput",
    "ChatCompletionResponse",
    "CompletionResponse",
    "EmbeddingReqInput",
    "GenerateReqInput",
    "LoRARef",
    "LoRAUpdateOutput",
    "LoadLoRAAdapterReqInput",
    "Req",
    "ReqState",
    "SGLangORJSONResponse",
    "Scheduler",
    "TokenizerManager",
    "UnloadLoRAAdapterReqInput",
    "auth_level",
    "get_observability",
    "hook_custom_types",
    "kill_process_tree",
]
