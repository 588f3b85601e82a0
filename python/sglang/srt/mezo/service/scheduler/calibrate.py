"""What this engine can train, and how many tokens make a piece of training short enough, beside requests and
without."""

import time
from typing import Any, get_args

import msgspec
import torch

from sglang.srt.mezo.adapters.families import family_of
from sglang.srt.mezo.core.config import AdapterTuning
from sglang.srt.mezo.engine.accelerator import why_no_alora
from sglang.srt.mezo.engine.forward import Sequenced, extend
from sglang.srt.mezo.engine.handle import EngineHandle, checkpoint_config, config_source
from sglang.srt.mezo.engine.layers import adaptable_modules
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.settings import ServiceSettings

_TOKENS_PER_SEQUENCE = 4
_MIN_TOKENS, _MAX_TOKENS = 8, 4096
_TRIES = 3  # a busy machine only ever adds
_PROBE = 8  # times as many tokens as a short piece has, to see what a token costs in a long one


def calibrate(handle: EngineHandle, settings: ServiceSettings, no_prefixes: str | None) -> dict[str, Any]:
    """The fields of ``EngineDescription``. Called on every rank, as it runs the model."""
    manager, runner = handle.lora_manager, handle.model_runner
    micro_step_tokens, idle_step_tokens = pass_sizes(
        handle, settings.micro_step_ms / 1000, settings.idle_step_ms / 1000
    )
    modules = adaptable_modules(handle)
    family = family_of(checkpoint_config(*config_source(runner.server_args)))
    return msgspec.to_builtins(
        EngineDescription(
            model_path=runner.model_config.model_path,
            dtype=str(runner.dtype).removeprefix("torch."),
            context_length=handle.context_length,
            kv_capacity=handle.kv_capacity,
            max_lora_rank=manager.max_lora_rank,
            max_loras_per_batch=manager.max_loras_per_batch,
            target_modules=modules,
            default_target_modules={
                tuning: list(family.default_targets(tuning, modules)) for tuning in get_args(AdapterTuning)
            },
            micro_step_tokens=micro_step_tokens,
            idle_step_tokens=idle_step_tokens,
            no_alora=why_no_alora(manager) or "",
            no_prefixes=no_prefixes or "",
            rewards=list(settings.reward_functions),
            base_model=handle.base_model["fingerprint"],
        )
    )


def pass_sizes(handle: EngineHandle, beside_requests: float, idle: float) -> tuple[int, int]:
    """Tokens of a forward pass that takes so many seconds: beside requests the largest power of two, by measuring it,
    and while none come, from what a token costs in a pass of some more.

    Where even the shortest pass takes long, as the weights are read for it, twice its time is allowed: a new request
    waits as long for a batch of others.
    """
    tokens = _MIN_TOKENS
    shortest = min(_seconds(handle, tokens) for _ in range(_TRIES))
    beside_requests = max(beside_requests, 2 * shortest)
    while tokens < _MAX_TOKENS and _fits(handle, 2 * tokens) and _within(beside_requests, handle, 2 * tokens):
        tokens *= 2
    return tokens, max(tokens, _tokens_of_long_pass(handle, idle, shortest, min(_PROBE * tokens, _MAX_TOKENS)))


def _tokens_of_long_pass(handle: EngineHandle, seconds: float, shortest: float, probe: int) -> int:
    """Never more than the engine runs for requests, and has memory for."""
    while probe > _MIN_TOKENS and not _fits(handle, probe):
        probe //= 2
    if seconds <= shortest or probe == _MIN_TOKENS:
        return 0
    probed = min(_seconds(handle, probe) for _ in range(2))  # the first of a size may compile kernels
    per_token = max(probed - shortest, 0.0) / (probe - _MIN_TOKENS)
    most = min(_MAX_TOKENS, handle.kv_capacity, handle.most_prefill_tokens)
    return most if per_token * most <= seconds - shortest else _MIN_TOKENS + round((seconds - shortest) / per_token)


def _fits(handle: EngineHandle, tokens: int) -> bool:
    return tokens // _TOKENS_PER_SEQUENCE <= handle.free_rows and tokens <= handle.free_kv_tokens


def _within(seconds: float, handle: EngineHandle, tokens: int) -> bool:
    """Whether one of a few passes is as short: a start does not wait for more of them than it takes to see it."""
    return any(_seconds(handle, tokens) <= seconds for _ in range(_TRIES))


def _seconds(handle: EngineHandle, tokens: int) -> float:
    """Of one forward pass, the same number on every rank."""
    sequence = Sequenced(torch.empty(0, dtype=torch.int64), [1] * _TOKENS_PER_SEQUENCE, ((None, _TOKENS_PER_SEQUENCE),))
    started = time.perf_counter()
    hidden, kv_indices = extend(handle, [sequence] * (tokens // _TOKENS_PER_SEQUENCE))
    hidden[-1].cpu()  # an accelerator is done with it only now
    handle.kv_allocator.free(kv_indices)
    return handle.broadcast(time.perf_counter() - started)
