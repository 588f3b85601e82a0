"""The engine on plain PyTorch, for hosts without an accelerator.

Upstream's CPU path needs kernels that its PyPI package does not carry. This platform runs without them, on an
attention and a LoRA backend of our own (`cpu/`), and fills in what a small machine needs, so that
`sgl.Engine(model_path=..., lora_paths=[...])` works as it is. A value that the user gives is never changed.
"""

import os
from collections.abc import Sequence

import torch

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

# The KV pool gets this share of the memory that is free at start, and no more than these bytes and tokens:
# the pool's pages are only touched when they are used, but its bookkeeping is per token.
KV_MEMORY_SHARE = 0.25
KV_MEMORY_LIMIT_BYTES = 8 << 30
KV_TOKENS_LIMIT = 1 << 18

# Rows of one packed batch are requests to the engine: room for a wide step, and for serving beside it.
MAX_RUNNING_REQUESTS = 512

# SGLang checks weights and KV pool against this share of free memory; the pool has its own limit above.
MEM_FRACTION_STATIC = 0.85

THREADS_BIND_ENV = "SGLANG_CPU_OMP_THREADS_BIND"

# Environment variables that an earlier engine of this process has been given by us; the next one may need others.
_DEFAULTS_SET: dict[str, str] = {}


def activate() -> str | None:
    """Entry point of the platform group: the class to use, or None where there is an accelerator."""
    return None if has_accelerator() else f"{__name__}.MezoCpuPlatform"


def has_accelerator() -> bool:
    """Whether PyTorch sees a device other than the CPU, or the user asked for upstream's CPU engine."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return True
    return torch.accelerator.is_available()


def is_active() -> bool:
    """Whether this process runs on our platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, MezoCpuPlatform)


class MezoCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU without custom kernels."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        # A name, not a torch.device: it becomes the default of the server argument `device`.
        return self.device_type

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        # What upstream marks for compilation are small functions, and a compiler is not to be counted on.
        return "eager"

    def apply_server_args_defaults(self, server_args) -> None:
        """Fill the fields that the user left open. SGLang lets exceptions of this method through."""
        from sglang.srt.mezo.plugin.hooks import require_registered
        from sglang.srt.server_args import _declared_default

        require_registered()
        asked = server_args._raw_input
        if asked["attention_backend"] is None:
            # Resolved to intel_amx by now, which needs the missing kernels.
            server_args.attention_backend = self.get_default_attention_backend()
        if asked["lora_backend"] == _declared_default("lora_backend"):
            server_args.lora_backend = "torch_native"
        if asked["dtype"] == "auto":
            server_args.dtype = model_dtype(server_args)
        if asked["mem_fraction_static"] is None:
            server_args.mem_fraction_static = MEM_FRACTION_STATIC
        if asked["max_running_requests"] is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if asked["max_total_tokens"] is None:
            server_args.max_total_tokens = kv_pool_tokens(server_args)
        server_args.disable_custom_all_reduce = True
        # A polling scheduler takes a core from the ranks and from training.
        server_args.sleep_on_idle = True
        _share_cores(server_args.tp_size * server_args.pp_size * server_args.dp_size)


def model_dtype(server_args) -> str:
    """What dtype "auto" means here: bfloat16 for checkpoints in bfloat16, float32 for all others.

    SGLang's own choice for the others is float16, which CPUs multiply slowly and a small step drowns in.
    """
    from sglang.srt.arg_groups.overrides import model_config_of

    stored = getattr(model_config_of(server_args).hf_text_config, "dtype", None)
    return "bfloat16" if stored in (torch.bfloat16, "bfloat16") else "float32"


def kv_pool_tokens(server_args) -> int:
    """Tokens of the KV pool on this machine, for the model and the number of replicas in `server_args`."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    itemsize = 2 if server_args.dtype in ("bfloat16", "float16", "half") else 4
    token_bytes = 2 * model.num_hidden_layers * model.get_total_num_kv_heads() * model.head_dim * itemsize
    free = CpuDeviceMixin().get_available_memory()[0] // server_args.dp_size
    budget = min(int(free * KV_MEMORY_SHARE), KV_MEMORY_LIMIT_BYTES)
    return max(min(budget // token_bytes, KV_TOKENS_LIMIT), model.context_len)


def _share_cores(ranks: int) -> None:
    """Give every rank its cores: SGLang refuses more ranks than NUMA nodes unless it is told which."""
    if ranks == 1:
        _forget_defaults()
        return
    cores = sorted(os.sched_getaffinity(0))
    _set_default(THREADS_BIND_ENV, threads_bind(ranks, cores))
    _set_default("OMP_NUM_THREADS", str(max(1, len(cores) // ranks)))


def threads_bind(ranks: int, cores: Sequence[int]) -> str:
    """SGLang's notation "0,1|2,3": a group of `cores` for each rank, shared where there are fewer cores than ranks."""
    share = max(1, len(cores) // ranks)
    starts = [(rank * share) % len(cores) for rank in range(ranks)]
    return "|".join(",".join(map(str, cores[start : start + share])) for start in starts)


def _forget_defaults() -> None:
    """Take back what an engine of several ranks, started earlier from this process, has left in the environment."""
    for name, value in _DEFAULTS_SET.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _DEFAULTS_SET.clear()


def _set_default(name: str, value: str) -> None:
    """Set an environment variable, for the ranks that are started from here, unless it is the user's."""
    if os.environ.get(name) in (None, _DEFAULTS_SET.get(name)):
        os.environ[name] = _DEFAULTS_SET[name] = value
