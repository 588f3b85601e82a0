"""Requests under a prefix (PEFT's PrefixTuning), answered exactly as PEFT answers them.

A request has a placeholder before its prompt for each virtual token, finds what stands for them in the radix tree, and
runs as the base model behind it: without a LoRA slot, in batches with all others. No placeholder is ever computed:
where the tree does not have them all, the request ends with an error. To its user they do not count.
"""

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.engine import held_places
from sglang.srt.mezo.plugin import served_prefixes
from sglang.srt.mezo.plugin.hooks import Hook
from sglang.srt.mezo.plugin.served_prefixes import ServedPrefix

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_NOT_UNDER_A_PREFIX = (
    "session",
    "positional_embed_overrides",
    "return_routed_experts",
    "return_indexer_topk",
    "multi_item_delimiter_indices",
    "token_indices_to_pool",
)
"""What a request may have that counts its tokens, or changes what is computed for them."""


def bind(req: Any, prefix: ServedPrefix) -> None:
    """Make a request, as SGLang's constructor leaves it, one for the base model behind the prefix."""
    req.mezo_prefix = prefix
    # What a user keeps apart by a key of its own meets the prefix, and leaves nothing that others would meet.
    req.mezo_alone = req.extra_key != req.lora_id or req.cache_salt is not None
    req.skip_radix_cache_insert = req.skip_radix_cache_insert or req.mezo_alone
    req.lora_id, req.extra_key, req.cache_salt = None, prefix.namespace, None
    req.origin_input_ids_unpadded = req.origin_input_ids  # text is made of it
    req.origin_input_ids = held_places.key_of(prefix.tokens) + req.origin_input_ids
    req.already_computed = prefix.tokens  # is not counted as found in the cache


def shared(req: Any, token_ids: array) -> array:
    """The tokens of a request that it may find in the cache."""
    return token_ids[: req.mezo_prefix.tokens] if req.mezo_prefix is not None and req.mezo_alone else token_ids


def _around_creation(original: Callable, scheduler, received, *args, **kwargs) -> "Req":
    """Refuse what would be answered wrongly, and count from the first token of the prompt."""
    req = original(scheduler, received, *args, **kwargs)
    if req.mezo_prefix is None:
        return req
    if (reason := _reason_against(scheduler, received, req)) is not None:
        req.set_finish_with_abort(reason)
        received.return_logprob, received.logprob_start_len, received.mm_inputs = False, -1, None
    elif received.return_logprob and received.logprob_start_len >= 0:
        received.logprob_start_len += req.mezo_prefix.tokens
    return req


def _reason_against(scheduler, received, req: Any) -> str | None:
    """In the way of an answer under its prefix."""
    prefix = req.mezo_prefix
    under = f"under adapter {prefix.name!r}, a prefix"
    for name in _NOT_UNDER_A_PREFIX:
        if getattr(req, name) not in (None, False):
            return f"{name} is not allowed {under}"
    if received.mm_inputs is not None:
        return f"images, audio and video are not allowed {under}"
    prompt, longest = len(req.origin_input_ids_unpadded), scheduler.max_req_input_len - prefix.tokens
    if prompt >= longest:
        return f"the prompt has {prompt} tokens, and {under} of {prefix.tokens} tokens it may have {longest - 1}"
    asked, room = req.sampling_params.max_new_tokens, scheduler.model_config.context_len - prefix.tokens - prompt
    if asked is not None and asked > room:
        return (
            f"max_new_tokens={asked} is not allowed: {room} are left of the context {under} of {prefix.tokens} tokens"
        )
    return None


def _around_matching(original: Callable, req, tree_cache=None, *args, **kwargs) -> None:
    """What the tree does not have of a prefix would be computed as if it were words."""
    original(req, tree_cache, *args, **kwargs)
    prefix = req.mezo_prefix
    if prefix is not None and tree_cache is not None and req.prefix_len < prefix.tokens:
        req.set_finish_with_abort(f"adapter {prefix.name!r} is not in the KV cache: load it again")
        original(req, tree_cache, *args, **kwargs)


def _after_abort(result: None, req, *args, **kwargs) -> None:
    """What is left of the request is one token, which the base model is given."""
    if req.mezo_prefix is not None:
        req.mezo_prefix, req.extra_key, req.skip_radix_cache_insert = None, None, True


def _around_output(original: Callable, output, *, req) -> None:
    """Placeholders are neither tokens of the prompt nor found in the cache."""
    before = len(output.prompt_tokens)
    original(output, req=req)
    if req.mezo_prefix is None or len(output.prompt_tokens) == before:
        return
    tokens = req.mezo_prefix.tokens
    output.prompt_tokens[-1] -= tokens
    details = output.cached_tokens_details[-1] if output.cached_tokens_details else None
    if details is not None:
        details["device"] -= tokens
        if not any(details.get(tier) for tier in ("device", "host", "storage")):
            output.cached_tokens_details[-1] = None


def _after_start(result: None, scheduler) -> None:
    served_prefixes.attach(scheduler)


def _after_memory(result, updater, *args, **kwargs):
    """The KV pool has memory again, and nothing in it."""
    served_prefixes.place_all()


_SCHEDULER = "sglang.srt.managers.scheduler"
_REQUESTS = "sglang.srt.managers.schedule_batch"

HOOKS = (
    Hook(
        _SCHEDULER,
        "Scheduler.init_lora_overlap_loader",
        "after",
        _after_start,
        "prefixes of --lora-paths go into the KV pool",
    ),
    Hook(
        _SCHEDULER,
        "Scheduler._create_generation_req",
        "around",
        _around_creation,
        "refuses what a prefix would answer wrongly",
    ),
    Hook(
        _REQUESTS,
        "Req.init_next_round_input",
        "around",
        _around_matching,
        "ends a request whose prefix is not in the cache",
    ),
    Hook(
        _REQUESTS,
        "Req.set_finish_with_abort",
        "after",
        _after_abort,
        "takes a request that is refused out of its prefix's namespace",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.output_streamer",
        "_GenerationStreamAccumulator.accept",
        "around",
        _around_output,
        "counts a request's tokens without its prefix",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater",
        "SchedulerWeightUpdaterManager.resume_memory_occupation",
        "after",
        _after_memory,
        "places prefixes once the KV pool has its memory back",
    ),
)
