"""What training needs of an engine on an accelerator where SGLang's own defaults would not do, and what such an engine
cannot do.

A value that the user gives is never changed. A platform that brings defaults of its own, as ours does on the CPU, is
left alone.
"""

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager

_FLOAT32 = ("float32", "float")


def fill_open_fields(server_args: Any, given: Collection[str] = ()) -> None:
    """Called before SGLang resolves the record, its ``ServerArgs``.

    Args:
        given: names of fields that the user has set, though to what is the default of SGLang's as well.
    """
    from sglang.srt.platforms import current_platform
    from sglang.srt.runtime_context import get_platform
    from sglang.srt.server_args import _declared_default

    if current_platform.is_out_of_tree():
        return
    if "lora_backend" not in given and server_args.lora_backend == _declared_default("lora_backend"):
        server_args.lora_backend = "triton"  # of SGLang's backends the one that routes single tokens, as aLoRA needs it
    if server_args.cuda_graph_backend_prefill is None:
        server_args.cuda_graph_backend_prefill = "disabled"  # a captured prefill routes whole requests
    in_float32 = server_args.dtype in _FLOAT32
    chosen = (
        server_args.attention_backend,
        server_args.prefill_attention_backend,
        server_args.decode_attention_backend,
    )
    # FlashAttention and FlashInfer take half precision only; what Blackwell gets by itself needs pages of 64 tokens;
    # Hopper's is not in every build of SGLang's kernels.
    others = in_float32 or get_platform().is_sm100 or (get_platform().is_sm90 and not has_flash_attention())
    if chosen == (None, None, None) and others:
        server_args.attention_backend = "triton"
    if in_float32:
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # its kernels would multiply in TF32, which keeps ten bits


def has_flash_attention() -> bool:
    """Whether SGLang's build of FlashAttention 3 can be loaded."""
    try:
        import sgl_kernel.flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def serving_flags(alora: bool, dtype: str) -> list[str]:
    """What a server of SGLang's that does not train needs here, beside --enable-lora, to serve an adapter as it was
    trained."""
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree():
        return []
    flags = ["--lora-backend", "triton", "--cuda-graph-backend-prefill", "disabled"] if alora else []
    return flags + (["--attention-backend", "triton"] if dtype in _FLOAT32 else [])


def why_no_alora(manager: "LoRAManager") -> str | None:
    """Why this engine cannot apply activated LoRA adapters, and what to start it with; None where it can."""
    from sglang.srt.lora.backend.base_backend import BaseLoRABackend
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.runtime_context import get_disagg, get_parallel

    backend: Any = manager.lora_backend
    if type(backend).prepare_lora_token_segments is BaseLoRABackend.prepare_lora_token_segments:
        return f"LoRA backend {backend.name!r} cannot route single tokens, start with --lora-backend triton"
    if backend.supports_prefill_cuda_graph and not check_cuda_graph_backend(Phase.PREFILL, Backend.DISABLED):
        return "the prefill CUDA graph routes whole requests, start with --cuda-graph-backend-prefill disabled"
    if manager.max_loras_per_batch < 2:
        return "max_loras_per_batch=1 leaves no slot for the base model, allowed: 2 or more"
    for mode, active in (
        ("LoRA on experts", backend.is_moe_lora),
        # Not yet there while the adapters of --lora-paths are loaded; for those the flags tell.
        ("LoRA on the embeddings", getattr(manager, "embed_tokens_module", None) is not None),
        ("LoRA on the head", getattr(manager, "lm_head_module", None) is not None),
        ("--enable-lora-overlap-loading", manager.enable_lora_overlap_loading),
        ("data-parallel attention", manager.attn_dp_enabled),
        ("speculative decoding", manager.speculative_algorithm is not None),
        ("pipeline parallelism", get_parallel().pp_size > 1),
        ("prefill-decode disaggregation", get_disagg().disaggregation_mode != "null"),
    ):
        if active:
            return f"not together with {mode}"
    return None
