"""The narrow view of an SGLang engine that training needs, and an engine in the calling process to train on."""

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from sglang.srt.mezo.adapters.architectures import architecture_of, is_masked, longest_text
from sglang.srt.mezo.adapters.differences import differences
from sglang.srt.mezo.adapters.families import family_of, require_modules
from sglang.srt.mezo.core.errors import CapacityError, ConfigError
from sglang.srt.mezo.engine.accelerator import fill_open_fields
from sglang.srt.mezo.engine.allocator import keep_freed_memory
from sglang.srt.mezo.engine.base_model import base_model, precision
from sglang.srt.mezo.engine.ranks import FIRST, Rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_POOL_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""What SGLang's LoRA pool calls layers that it knows by another name than Transformers'."""

_WRITE_KV_FIRST = {"CpuAttentionBackend", "TritonAttnBackend", "FlashAttentionBackend"}


@dataclass
class Counted:
    """What an engine has run for scoring and training: forward passes, and the tokens in them."""

    passes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class EngineHandle:
    """The parts of one tensor-parallel rank's engine that scoring touches."""

    model_runner: "ModelRunner"
    tree_cache: "BasePrefixCache"
    req_to_token_pool: "ReqToTokenPool"
    counted: Counted = field(default_factory=Counted)

    @classmethod
    def from_scheduler(cls, scheduler: "Scheduler") -> Self:
        model_runner = scheduler.tp_worker.model_runner
        tree_cache: Any = scheduler.tree_cache  # the scheduler's declarations say `object`
        requests: Any = scheduler.req_to_token_pool
        if model_runner.page_size != 1:
            raise ConfigError("page_size", model_runner.page_size, "prefixes are cut at any token, so 1 is needed")
        return cls(model_runner, tree_cache, requests)

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank that writes files and decides."""
        return _tp_group().rank_in_group == 0

    def broadcast(self, value: Value) -> Value:
        """The leader's ``value``, which must be picklable, on every tensor-parallel rank."""
        shared: Any = _tp_group().broadcast_object(value, src=0)
        return shared

    @property
    def num_ranks(self) -> int:
        return _tp_group().world_size

    def gather(self, value: Value) -> list[Value]:
        """The values of all tensor-parallel ranks, in their order, on each of them."""
        return _tp_group().all_gather_object(value)

    def on_leader(self, function: Callable[..., Value], *arguments) -> Value:
        """Call a function on the leader only; what it returns or raises, every rank returns or raises."""
        if _tp_group().world_size == 1:
            return function(*arguments)
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_leader:
            try:
                outcome = (function(*arguments), None)
            except Exception as error:
                outcome = (None, error)
        value: Any
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    def sum_of_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over the tensor-parallel ranks, on each of them."""
        return tensor if _tp_group().world_size == 1 else _tp_group().all_reduce(tensor.to(self.device))

    @property
    def lora_manager(self) -> "LoRAManager":
        """Of an engine with LoRA; raises ConfigError where it is not."""
        manager = self.model_runner.lora_manager
        if manager is None:
            raise ConfigError("enable_lora", False, "training needs an engine that was started with LoRA")
        return manager

    @property
    def kv_allocator(self):
        return self.tree_cache.token_to_kv_pool_allocator

    @property
    def device(self) -> torch.device:
        return torch.device(self.model_runner.device)

    @property
    def base_model(self) -> dict[str, str]:
        """What tells the loaded model from others: ``name`` is for people, ``fingerprint`` and ``precision`` must
        agree."""
        runner = self.model_runner
        return {
            "name": runner.model_config.model_path,
            "fingerprint": base_model(runner),
            "precision": precision(runner),
        }

    @property
    def context_length(self) -> int:
        return self.model_runner.model_config.context_len

    @property
    def kv_capacity(self) -> int:
        """KV tokens that the pool holds in all."""
        return self.model_runner.max_total_num_tokens

    @property
    def most_prefill_tokens(self) -> int:
        """Tokens of the longest prefill that the engine runs for requests."""
        args: Any = self.model_runner.server_args
        chunk = args.chunked_prefill_size
        return chunk if chunk is not None and chunk > 0 else args.max_prefill_tokens

    @property
    def free_kv_tokens(self) -> int:
        """KV tokens that can be had now, by evicting unlocked prefixes if need be."""
        return self.kv_allocator.available_size() + self.tree_cache.evictable_size()

    @property
    def writes_kv_first(self) -> bool:
        """Whether attention finds the KV of a batch's own tokens in the pool. FlashInfer's, for one, writes it
        afterwards."""
        return type(self.model_runner.attn_backend).__name__ in _WRITE_KV_FIRST

    @property
    def is_causal(self) -> bool:
        """Whether a token attends to those before it alone, so that its KV is the same whatever follows."""
        return not is_masked(self.model_config)

    @property
    def model_config(self) -> "PretrainedConfig":
        """The engine's own copy, which may hold its widths."""
        return self.model_runner.model_config.hf_config

    @property
    def free_rows(self) -> int:
        return self.req_to_token_pool.available_size()


def _tp_group():
    from sglang.srt.distributed.parallel_state import get_tp_group

    return get_tp_group()


class MezoEngine:
    """An SGLang engine in the calling process: model runner, radix tree and LoRA pool, without HTTP or subprocesses.

    Args:
        model_path: hub name or folder of the base model.
        r: largest rank of an adapter.
        target_modules: modules that adapters may act on; without any the engine has no LoRA.
        num_slots: adapters that one pass can hold, the base model not counted.
        rank: of this process, where the engine has several tensor-parallel ranks (``ranks.other_ranks``).
        server_args: any further field of SGLang's ServerArgs.

    A process holds one engine in its life, as SGLang builds its parallel groups once.

    Raises:
        ConfigError: the model or a module cannot be trained; before anything of the engine is there.
    """

    _started = False

    def __init__(
        self,
        model_path: str,
        *,
        r: int = 1,
        target_modules: Collection[str] = (),
        num_slots: int = 1,
        rank: Rank = FIRST,
        **server_args: Any,
    ):
        if MezoEngine._started:
            raise RuntimeError("this process has had its engine already: SGLang builds its parallel groups once")
        keep_freed_memory()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
        from sglang.srt.server_args import PortArgs, ServerArgs

        lora = {
            "enable_lora": True,
            "max_lora_rank": r,
            "lora_target_modules": sorted(_POOL_NAMES.get(name, name) for name in target_modules),
            "max_loras_per_batch": num_slots + 1,  # the base model takes a slot too
        }
        defaults = {"page_size": 1, "log_level": "warning", "disable_cuda_graph": True}
        fields = {
            "model_path": model_path,
            "nccl_port": rank.nccl_port,
            **defaults,
            **server_args,
            **(lora if target_modules else {}),
        }
        self.server_args: Any = ServerArgs(**fields)
        config = checkpoint_config(*config_source(self.server_args))
        require_modules(family_of(config), target_modules)
        warn_of_differences(config, self.server_args.context_length)
        if is_masked(config):
            self.server_args.is_embedding = True  # else SGLang takes it for a model that generates
            longest = longest_text(config)
            self.server_args.context_length = min(self.server_args.context_length or longest, longest)
        fill_open_fields(self.server_args, server_args)
        self.server_args.resolve_once()
        self.server_args.check_server_args()
        ports = PortArgs.init_new(self.server_args)
        world_rank = spawn_world_rank(self.server_args, tp_rank=rank.tp_rank, pp_rank=0)
        _configure_logging(self.server_args)
        MezoEngine._started = True
        publish(
            self.server_args,
            role="scheduler",
            ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=rank.tp_rank),
        )
        from sglang.srt.managers.scheduler import Scheduler

        self.scheduler = Scheduler(self.server_args, ports)
        self.handle = EngineHandle.from_scheduler(self.scheduler)
        torch.get_device_module(self.handle.device).synchronize()  # it was set up on streams of its own


def config_source(server_args) -> tuple[Any, ...]:
    """The arguments of ``checkpoint_config`` in SGLang's ServerArgs."""
    return (
        server_args.model_path,
        server_args.trust_remote_code,
        server_args.revision,
        server_args.json_model_override_args,
    )


def checkpoint_config(
    model_path: str, trust_remote_code: bool, revision: str | None, overrides: str
) -> "PretrainedConfig":
    """The configuration of a checkpoint; what SGLang makes of it for a number of ranks is another.

    Args:
        overrides: SGLang's ``json_model_override_args``.

    Raises:
        ConfigError: there is none that can be read.
    """
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(model_path, trust_remote_code, revision, json.loads(overrides))
    except (OSError, ValueError) as error:
        raise ConfigError("model_path", model_path, f"a hub name or a folder with a model ({error})") from error


def warn_of_differences(config: "PretrainedConfig", context_length: int | None) -> None:
    """What of a model SGLang computes otherwise than Transformers: adapters made for the one do something else in
    the other."""
    for difference in differences(config, context_length):
        logger.warning(f"{architecture_of(config)} in SGLang is not quite the model of its configuration: {difference}")


def _configure_logging(server_args) -> None:
    """SGLang's loggers at ``log_level``, ours never above warnings."""
    from sglang.srt.utils import configure_logger

    configure_logger(server_args)
    logging.getLogger("sglang.srt.mezo").setLevel(min(logging.WARNING, logging.getLogger().level))


def free_slots(handle: EngineHandle) -> int:
    """Adapters that the LoRA pool has room for beside the base model and those that are pinned."""
    manager = handle.lora_manager
    return manager.max_loras_per_batch - 1 - manager.num_pinned_loras


def require_pool(handle: EngineHandle, slots: int, r: int = 1) -> None:
    """Raise CapacityError where the LoRA pool cannot hold so many more adapters of rank ``r`` beside the base model."""
    manager = handle.lora_manager
    if slots > free_slots(handle):
        raise CapacityError(
            f"{slots} adapter slots are needed, but {free_slots(handle)} of the pool's {manager.max_loras_per_batch} "
            "are free: "
            "raise max_loras_per_batch"
        )
    if r > manager.max_lora_rank:
        raise CapacityError(
            f"an adapter of rank {r} does not fit the pool's rank of {manager.max_lora_rank}: lower r or raise "
            "max_lora_rank"
        )
