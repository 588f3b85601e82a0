"""Puts the attention, LoRA and linear layers of ``cpu/`` in the place of upstream's, where our CPU platform is
active."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode

from sglang.srt.mezo.cpu.linear import apply_linear, bound_kernels, compute_lm_head
from sglang.srt.mezo.plugin import overlay
from sglang.srt.mezo.plugin.hooks import Hook
from sglang.srt.mezo.plugin.hooks import install as install_hook

BACKEND_NAME = "torch_native"


def install() -> None:
    """Register the backends, and put the hooks in force."""
    bound_kernels()
    overlay.on_import("sglang.srt.layers.attention.attention_registry", register_attention)
    overlay.on_import("sglang.srt.lora.backend.lora_registry", register_lora)
    for hook in HOOKS:
        install_hook(hook)


def register_attention(attention_registry: ModuleType) -> None:
    """Serve the name torch_native from CpuAttentionBackend."""

    @attention_registry.register_attention_backend(BACKEND_NAME)
    def create(runner):
        from sglang.srt.mezo.cpu.attention import CpuAttentionBackend

        return CpuAttentionBackend(runner)


def register_lora(lora_registry: ModuleType) -> None:
    """Serve the name torch_native from CpuLoRABackend."""

    @lora_registry.register_lora_backend(BACKEND_NAME)
    def create():
        from sglang.srt.mezo.cpu.lora import CpuLoRABackend

        return CpuLoRABackend


class _WithoutPinnedMemory(TorchFunctionMode):
    """Drops requests for pinned memory, which PyTorch refuses where there is no accelerator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        return args[0] if func is torch.Tensor.pin_memory else func(*args, **kwargs)


def _build_unpinned(original: Callable, *args, **kwargs) -> None:
    with _WithoutPinnedMemory():
        return original(*args, **kwargs)


def _leave_threads_alone(original: Callable, **kwargs) -> None:
    pass


def _soft_cap(original: Callable, logits: torch.Tensor, cap: float) -> None:
    """cap tanh(logits / cap), in place."""
    logits.div_(cap).tanh_().mul_(cap)


HOOKS = (
    Hook(
        "sglang.srt.layers.quantization.unquant",
        "UnquantizedLinearMethod.apply",
        "around",
        apply_linear,
        "linear layers in float32 through linear.c or oneDNN",
    ),
    Hook(
        "sglang.srt.layers.logits_processor",
        "LogitsProcessor._compute_lm_head",
        "around",
        compute_lm_head,
        "the head in float32 through linear.c or oneDNN",
    ),
    Hook(
        "sglang.srt.layers.logits_processor",
        "fused_softcap",
        "around",
        _soft_cap,
        "logits are soft-capped without Triton",
    ),
    Hook(
        "sglang.srt.lora.lora_manager",
        "LoRAManager.__init__",
        "around",
        _build_unpinned,
        "LoRA layers are built with tensors in pinned memory, which a host without accelerator does not have",
    ),
    Hook(
        "sglang.srt.distributed.bootstrap",
        "_init_cpu_threads_env",
        "around",
        _leave_threads_alone,
        "binds threads with kernels that are not there: warns about it on x86, fails on ARM",
    ),
)
