"""One adapter's numbers stay with it: a request whose outputs are not finite ends with an error and leaves nothing
behind.

Weights are finite where they are loaded, and still can overflow. Attention kernels multiply what a token does not see
by 0, and 0 times what is no number is none: so the tokens before an invocation, which are the base model's, may be
spoiled by those after it. What is spoiled shows in a token's own last hidden state. So every token that ran beside an
adapter is looked at, on the device, before its KV may enter the radix tree; what does not enter it is overwritten
before other requests get its place.

Not with speculative decoding and pipeline parallelism, which have no aLoRA adapters.
"""

from collections.abc import Callable
from http import HTTPStatus

import torch

from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.plugin.hooks import Hook
from sglang.srt.mezo.plugin.served_prefixes import public_name

# --- forward ----------------------------------------------------------------------------------------------------------


def _before_logits(processor, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs) -> None:
    """Look at every token of a prefill; of a decode, and of what runs in a CUDA graph, the logits say it."""
    batch = logits_metadata
    lengths = getattr(batch, "extend_seq_lens", None)
    if lengths is None or not _has_adapter(batch) or not batch.forward_mode.is_extend():
        return
    tokens = batch.extend_num_tokens
    lost = ~hidden_states[:tokens].isfinite().all(-1)
    sequence = torch.arange(len(lengths), device=lost.device).repeat_interleave(lengths, output_size=tokens)
    batch.mezo_finite = torch.zeros_like(lengths).index_add_(0, sequence, lost.to(lengths.dtype)) == 0


def _after_forward(output, runner, forward_batch, *args, **kwargs) -> None:
    """Note which sequences are finite, and let those that are not be sampled like others: the sampler takes numbers
    only."""
    runner.mezo_finite = None
    if not _has_adapter(forward_batch) or not forward_batch.spec_algorithm.is_none() or runner.pp_group.world_size > 1:
        return
    finite = getattr(forward_batch, "mezo_finite", None)
    logits = getattr(output.logits_output, "next_token_logits", None)
    if (
        logits is not None and len(logits) == forward_batch.batch_size
    ):  # there may be none, or of several places in a sequence
        of_logits = logits.amax(-1).isfinite()
        finite = of_logits if finite is None else finite & of_logits
        if logits.device.type != "cpu" or not finite.all():
            logits.masked_fill_(~finite[:, None], 0.0)
    runner.mezo_finite = finite


def _has_adapter(batch) -> bool:
    lora_ids = getattr(batch, "lora_ids", None) or ()
    return any(lora_id is not None for lora_id in lora_ids) or getattr(batch, "mezo_under_prefix", False)


def _around_generation(original: Callable, worker, *args, **kwargs):
    """The result of a batch says which of its sequences are finite."""
    result = original(worker, *args, **kwargs)
    result.mezo_finite, worker.model_runner.mezo_finite = getattr(worker.model_runner, "mezo_finite", None), None
    return result


def _before_copy(result, *args, **kwargs) -> None:
    """Copied to the host with the tokens, and waited for with them."""
    finite = getattr(result, "mezo_finite", None)
    if finite is not None:
        from sglang.srt.managers.utils import _async_d2h

        result.mezo_finite = _async_d2h(finite)


# --- scheduler --------------------------------------------------------------------------------------------------------


def _before_result(scheduler, batch, result) -> None:
    """End the requests that are not finite, before anything of theirs is kept or sent."""
    finite = getattr(result, "mezo_finite", None)
    if finite is None:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    for req, is_finite in zip(batch.reqs, finite.tolist()):
        if not is_finite and not req.finished() and not req.is_retracted:
            _end(scheduler, batch, req)


def _end(scheduler, batch, req) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    reason = FINISH_ABORT(_message(scheduler, req), HTTPStatus.BAD_REQUEST, "BadRequestError")
    req.skip_radix_cache_insert = req.mezo_not_finite = True
    if batch.forward_mode.is_decode():
        req.to_finish, req.finished_len = reason, len(req.output_ids)
    else:  # takes hold with the last chunk of the prompt
        req.discard_output_reason = reason


def _message(scheduler, req) -> str:
    lora_id = req.lora_id if req.mezo_prefix is None else req.mezo_prefix.lora_id
    ref = scheduler.tp_worker.model_runner.lora_manager.lora_refs.get(lora_id)
    if ref is None:
        return "the model's outputs for this request are not finite numbers"
    name = public_name(ref.lora_name, ref.lora_id)
    return (
        f"adapter {name!r} does not give finite numbers for this request: its weights have diverged, or are too large"
    )


def _around_chunk(original: Callable, scheduler, req) -> None:
    """A chunk of a prompt is kept before its result is known. Where it ran under an adapter it is kept with the
    whole prompt."""
    skips, known = req.skip_radix_cache_insert, not _acts_before(req, req.extend_end)
    req.skip_radix_cache_insert = skips or not known
    try:
        original(scheduler, req)
    finally:
        req.skip_radix_cache_insert = skips


def _acts_before(req, end: int) -> bool:
    """Whether an adapter acts on any of the first ``end`` tokens."""
    if req.mezo_prefix is not None:
        return True
    start = req.mezo_binding.start if req.mezo_binding is not None else None
    return req.lora_id is not None and (start is None or start < end)


_streams: list[torch.Stream] = []


def _after_overlap(result: None, scheduler) -> None:
    """On an accelerator the KV pool is written on this stream; without overlap on the scheduler's own."""
    overlaps = scheduler.enable_overlap and scheduler.device != "cpu"
    _streams[:] = [scheduler.forward_stream] if overlaps else []


def _before_release(req, tree_cache, *, checkpoint: bool) -> None:
    """Overwrite what a request that is not finite gives back, behind the batch in flight, which may write more of
    it."""
    if not getattr(req, "mezo_not_finite", False) or req.session is not None or not req.kv.holds_kv:
        return  # a session keeps its KV, and is told the same each time
    row = tree_cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    places = row[req.kv.cache_protected_len : req.kv.kv_allocated_len].to(
        torch.int64
    )  # a copy: the row gets another owner
    pool = tree_cache.token_to_kv_pool_allocator.get_kvcache()
    if not _streams:
        erase(pool, places)
        return
    device = torch.get_device_module(places.device)
    _streams[0].wait_stream(device.current_stream())
    with device.stream(_streams[0]):
        places.record_stream(_streams[0])
        erase(pool, places)


_SCHEDULER = "sglang.srt.managers.scheduler"

HOOKS = (
    Hook(
        "sglang.srt.layers.logits_processor",
        "LogitsProcessor.forward",
        "before",
        _before_logits,
        "looks whether a prefill beside an adapter is finite",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner",
        "ModelRunner.forward",
        "after",
        _after_forward,
        "looks whether logits beside an adapter are finite",
    ),
    Hook(
        "sglang.srt.managers.tp_worker",
        "TpModelWorker.forward_batch_generation",
        "around",
        _around_generation,
        "hands on what is finite with the batch's result",
    ),
    Hook(
        "sglang.srt.managers.utils",
        "GenerationBatchResult.copy_to_cpu",
        "before",
        _before_copy,
        "copies it to the host with the tokens",
    ),
    Hook(
        _SCHEDULER,
        "Scheduler.process_batch_result",
        "before",
        _before_result,
        "ends requests whose outputs are not finite",
    ),
    Hook(
        _SCHEDULER,
        "Scheduler.stash_chunked_request",
        "around",
        _around_chunk,
        "keeps a chunk under an adapter once the whole prompt is finite",
    ),
    Hook(_SCHEDULER, "Scheduler.init_overlap", "after", _after_overlap, "learns on which stream KV is written"),
    Hook(
        "sglang.srt.mem_cache.common",
        "release_kv_cache",
        "before",
        _before_release,
        "overwrites the KV of requests that are not finite",
    ),
)
