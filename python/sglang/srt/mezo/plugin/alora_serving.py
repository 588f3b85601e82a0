"""Adapters in the prefix cache: activated LoRA (aLoRA) exactly as PEFT has it, and every version's KV apart.

An aLoRA adapter acts from the start of the last occurrence of its invocation tokens in the prompt. The tokens before
that are the base model's, so their KV is shared with all other traffic: the request lives in the base namespace of the
radix tree, and from the invocation on its keys are *tagged* token ids that no tokenizer produces. One path of the tree
then holds base prefix and adapter suffix, and locks, eviction and splitting work as for any other request.

An ordinary adapter keeps a namespace of its own. Tag and namespace are new with every load of an adapter: a version of
it never meets the KV of another.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.invocation import find_invocation
from sglang.srt.mezo.engine import lora_capacity
from sglang.srt.mezo.engine.accelerator import why_no_alora
from sglang.srt.mezo.engine.held_places import OURS, keeps_keys
from sglang.srt.mezo.plugin import prefix_serving, served_prefixes
from sglang.srt.mezo.plugin.hooks import Hook

# Tags start above every token id; radix keys are 64 bits wide.
_TAG_SHIFT = 40


@dataclass
class ServedAdapter:
    """invocation: the tokens that activate it, empty for ordinary LoRA. tag: unique to this load of it."""

    invocation: Sequence[int]
    tag: int


@dataclass
class CacheBinding:
    """What a request's KV is computed with.

    start: first token under an aLoRA adapter, None under ordinary LoRA. tag: added to the tokens from there on.
    """

    start: int | None
    namespace: str
    tag: int


_SERVED: dict[str, ServedAdapter] = {}
_TAGS = count(1)


# --- loading -----------------------------------------------------------------------------------------------------


def register(lora_id: str, invocation: Sequence[int]) -> None:
    """Take note of an adapter that has been loaded."""
    _SERVED[lora_id] = ServedAdapter(invocation, next(_TAGS) << _TAG_SHIFT)


def require_servable(manager, invocation: Sequence[int]) -> None:
    """Raise ConfigError where this configuration would serve an adapter with that invocation wrongly."""
    if invocation and (reason := why_no_alora(manager)):
        raise ConfigError("alora_invocation_tokens", list(invocation), f"null: {reason}")


def _after_unloading(result, manager, lora_ref) -> None:
    """Forget an adapter; SGLang unloads it only when no request uses it any more."""
    if result.success:
        _SERVED.pop(lora_ref.lora_id, None)
        served_prefixes.unload(lora_ref.lora_id)


async def _around_resolving(original: Callable, manager, request) -> None:
    """What the scheduler would end with: an id of the request's own, as it is SGLang's to say, and a list of names
    beside one text."""
    if not request.lora_path and request.lora_id is not None:
        raise ValueError(f"lora_id={request.lora_id!r} is not allowed: an adapter is named by lora_path")
    if request.is_single and isinstance(request.lora_path, list):
        raise ValueError(f"lora_path={request.lora_path!r} is not allowed: a string, as there is one text")
    await original(manager, request)


# --- requests and the radix tree ---------------------------------------------------------------------------------


def _after_request_created(result: None, req, *args, **kwargs) -> None:
    """Name the request's place in the cache; one whose prompt lacks the invocation is the base model's altogether."""
    req.mezo_binding = req.mezo_prefix = None
    if req.lora_id is None:
        req.extra_key = _user_key(req.extra_key)
        return
    if (prefix := served_prefixes.find(req.lora_id)) is not None:
        prefix_serving.bind(req, prefix)
        return
    adapter = _SERVED[req.lora_id]
    user_key = _user_key(req.extra_key[: -len(req.lora_id)] or None)
    start = find_invocation(req.origin_input_ids, adapter.invocation) if adapter.invocation else None
    if adapter.invocation and start is None:
        req.lora_id, req.extra_key = None, user_key
        return
    namespace = _namespace(adapter.tag, start)
    req.mezo_binding = CacheBinding(start, namespace, adapter.tag)
    req.extra_key = user_key if start is not None else namespace + (user_key or "")
    if start is not None and req.session is not None and req.session.streaming:
        # A session keeps KV outside of the tree, where a later invocation cannot take it back.
        req.set_finish_with_abort("an aLoRA adapter cannot be used in a streaming session")


def _user_key(extra_key: str | None) -> str | None:
    """A namespace that the user chose, kept out of ours."""
    return f"{OURS}user{extra_key}" if extra_key and extra_key.startswith(OURS) else extra_key


def _namespace(tag: int, start: int | None) -> str:
    version = tag >> _TAG_SHIFT
    return f"{OURS}{version}{OURS}" if start is None else f"{OURS}{version}@{start}{OURS}"


def _around_radix_key(original: Callable, tree_cache, req, token_ids: array, *args, **kwargs):
    """Look a request up where its KV lies."""
    if req.mezo_binding is None:
        return original(tree_cache, req, prefix_serving.shared(req, token_ids), *args, **kwargs)
    _settle(req, tree_cache)
    return original(tree_cache, req, _tagged(req.mezo_binding, token_ids), *args, **kwargs)


def _settle(req, tree_cache) -> None:
    """Where a tree takes no tags, version and start in the namespace say what they would say."""
    binding = req.mezo_binding
    if binding.start is not None and binding.tag and not keeps_keys(tree_cache):
        binding.tag, req.extra_key = 0, binding.namespace + (req.extra_key or "")


def _before_event_name(scheduler, req, *args, **kwargs) -> None:
    """Events name the adapter by the namespace that its KV will have."""
    if req.mezo_binding is not None:
        _settle(req, scheduler.tree_cache)


def _around_length(original: Callable, req, longest: int, may_cut: bool) -> str | None:
    """A prompt that is too long is cut at its end, where the invocation is."""
    activated = req.mezo_binding is not None and req.mezo_binding.start is not None
    return original(req, longest, may_cut and not activated)


def _tagged(binding: CacheBinding, token_ids: array) -> array:
    """`token_ids` with the adapter's tag on everything from the invocation on."""
    start = binding.start
    if start is None or binding.tag == 0 or len(token_ids) <= start:
        return token_ids
    return token_ids[:start] + array("q", (token + binding.tag for token in token_ids[start:]))


def _around_checkpoint(original: Callable, tree_cache, req, *args, **kwargs) -> None:
    """Insert a request's KV under the keys that it is looked up by."""
    binding = req.mezo_binding
    if binding is None or binding.start is None or binding.tag == 0:
        return original(tree_cache, req, *args, **kwargs)
    fill_ids, prompt = req.full_untruncated_fill_ids, req.origin_input_ids
    req.full_untruncated_fill_ids, req.origin_input_ids = _tagged(binding, fill_ids), _tagged(binding, prompt)
    try:
        return original(tree_cache, req, *args, **kwargs)
    finally:
        req.full_untruncated_fill_ids, req.origin_input_ids = fill_ids, prompt


# --- forward -----------------------------------------------------------------------------------------------------


def _after_batch_created(forward_batch, cls, batch, model_runner, *args, **kwargs) -> None:
    """Route the tokens before an invocation to the base model.

    Only a prefill has such tokens. In decode every request is under its adapter as a whole, as SGLang has it.
    """
    forward_batch.mezo_under_prefix = any(req.mezo_prefix is not None for req in batch.reqs)
    if model_runner.lora_manager is None or not forward_batch.forward_mode.is_extend():
        return
    starts = [req.mezo_binding.start if req.mezo_binding else None for req in batch.reqs]
    if all(start is None for start in starts):  # and what speculative decoding verifies says no lengths
        return
    lora_ids: list[str | None] = []
    lengths: list[int] = []
    for lora_id, start, prefix, fresh in zip(
        forward_batch.lora_ids,
        starts,
        forward_batch.extend_prefix_lens_cpu,
        forward_batch.extend_seq_lens_cpu,
        strict=True,
    ):
        base = 0 if start is None else max(0, min(fresh, start - prefix))
        lora_ids += [None, lora_id]
        lengths += [base, fresh - base]
    if any(lengths[::2]):
        _route_segments(model_runner.lora_manager, lora_ids, lengths)


def _route_segments(manager, lora_ids: Sequence[str | None], lengths: Sequence[int]) -> None:
    """Run `lengths[i]` tokens under `lora_ids[i]`; None may stand without a slot of its own, which SGLang's
    prepare_lora_token_segments asks for: any slot that this batch leaves alone applies nothing."""
    segments = [(lora_id, length) for lora_id, length in zip(lora_ids, lengths, strict=True) if length]
    slots = {lora_id: manager.memory_pool.get_buffer_id(lora_id) for lora_id, _ in segments if lora_id is not None}
    unused = next(slot for slot in range(manager.max_loras_per_batch) if slot not in slots.values())
    ranks, scalings = [0] * manager.max_loras_per_batch, [0.0] * manager.max_loras_per_batch
    for lora_id, slot in slots.items():
        ranks[slot] = manager.loras[lora_id].config.r
        scalings[slot] = manager.loras[lora_id].scaling
    manager.lora_backend.prepare_lora_token_segments(
        segment_lens=[length for _, length in segments],
        weight_indices=[unused if lora_id is None else slots[lora_id] for lora_id, _ in segments],
        lora_ranks=ranks,
        scalings=scalings,
    )
    manager.lora_backend.batch_info.has_active_lora = bool(slots)


def _around_admission(original: Callable, manager, lora_ids: set[str | None]) -> bool:
    """A batch with an aLoRA request needs a slot that applies nothing beside those of its adapters; a job may need
    some too."""
    if not lora_capacity.admits(manager, lora_ids):
        return False
    activated = any(lora_id in _SERVED and _SERVED[lora_id].invocation for lora_id in lora_ids if lora_id is not None)
    if activated and len(lora_ids | {None}) > manager.max_loras_per_batch:
        return False
    return original(manager, lora_ids)


_MANAGER = "sglang.srt.lora.lora_manager"

HOOKS = (
    Hook(
        _MANAGER, "LoRAManager.unload_lora_adapter", "after", _after_unloading, "forgets what was known of the adapter"
    ),
    Hook(
        _MANAGER,
        "LoRAManager.validate_lora_batch",
        "around",
        _around_admission,
        "keeps a slot free for the tokens before an invocation",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager",
        "TokenizerManager._validate_and_resolve_lora",
        "around",
        _around_resolving,
        "refuses an adapter's id that SGLang has not given",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch",
        "Req.__init__",
        "after",
        _after_request_created,
        "finds the invocation and names the request's namespace in the cache",
    ),
    Hook(
        "sglang.srt.managers.scheduler",
        "Scheduler._record_kv_event_lora_name",
        "before",
        _before_event_name,
        "events name an adapter by the namespace of its KV",
    ),
    Hook(
        "sglang.srt.managers.utils",
        "validate_input_length",
        "around",
        _around_length,
        "cuts no invocation off a prompt",
    ),
    Hook("sglang.srt.mem_cache.common", "_req_radix_key", "around", _around_radix_key, "looks KV up by tagged tokens"),
    Hook(
        "sglang.srt.mem_cache.unified_radix_cache",
        "UnifiedRadixCache.checkpoint_into_tree",
        "around",
        _around_checkpoint,
        "stores KV by the keys that it is looked up by",
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info",
        "ForwardBatch.init_new",
        "after",
        _after_batch_created,
        "routes the tokens before an invocation to the base model",
    ),
)
