"""Where a request's KV lies in the prefix cache: invocation, version, namespace; and adapters that are refused."""

from array import array
from types import SimpleNamespace

import pytest

from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.managers.utils import validate_input_length
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.invocation import find_invocation
from sglang.srt.mezo.engine.held_places import keeps_keys
from sglang.srt.mezo.plugin import alora_serving
from sglang.srt.mezo.plugin.alora_serving import ServedAdapter


@pytest.mark.parametrize(
    "prompt, invocation, start",
    [
        ([1, 2, 3], [2, 3], 1),
        ([2, 3, 1, 2, 3, 4], [2, 3], 3),
        ([1, 2], [1, 2], 0),
        ([1, 2, 4], [2, 3], None),
        ([2], [2, 3], None),
        ([], [2], None),
        ([5, 5, 5], [5, 5], 1),
    ],
)
def test_last_occurrence(prompt, invocation, start):
    assert find_invocation(array("q", prompt), invocation) == start


@pytest.fixture
def served(monkeypatch):
    adapters = {
        name: ServedAdapter(invocation, next(alora_serving._TAGS) << 40)
        for name, invocation in (("plain", ()), ("active", (7, 8)))
    }
    monkeypatch.setattr(alora_serving, "_SERVED", adapters)
    monkeypatch.setattr("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache", Tree)
    return adapters


def request(prompt, lora_id, extra_key=None) -> SimpleNamespace:
    """A request as SGLang's constructor leaves it, and as the hook then does."""
    req = SimpleNamespace(
        origin_input_ids=array("q", prompt),
        lora_id=lora_id,
        extra_key=(extra_key or "") + lora_id if lora_id else extra_key,
        session=None,
        kv=SimpleNamespace(req_pool_idx=None),
    )
    alora_serving._after_request_created(None, req)
    return req


def look_up(req, shared=True) -> tuple[str | None, list[int]]:
    """Namespace and keys under which the tree is asked."""
    tree = Tree()
    tree.enable_storage = not shared
    return alora_serving._around_radix_key(
        lambda tree, req, token_ids: (req.extra_key, list(token_ids)), tree, req, req.origin_input_ids
    )


class Tree:
    """Stands in for UnifiedRadixCache, of which `keeps_keys` asks this much."""

    linker = None
    tree_core = SimpleNamespace(enable_kv_cache_events=False)


def test_a_batch_without_an_invocation_is_left_as_it_is():
    """What speculative decoding verifies counts as a prefill, and has no lengths."""
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: True), lora_ids=["plain", None])
    reqs = [SimpleNamespace(mezo_binding=None, mezo_prefix=None)] * 2
    runner = SimpleNamespace(lora_manager=object())
    alora_serving._after_batch_created(batch, None, SimpleNamespace(reqs=reqs), runner)


def test_another_load_of_an_adapter_is_another_place_in_the_cache(served):
    for adapter in ("plain", "active"):
        old = look_up(request([1, 7, 8, 3], adapter))
        assert look_up(request([1, 7, 8, 3], adapter)) == old
        served[adapter] = ServedAdapter(served[adapter].invocation, next(alora_serving._TAGS) << 40)
        assert look_up(request([1, 7, 8, 3], adapter)) != old


def test_a_request_keeps_its_place_whatever_becomes_of_the_adapter(served):
    for adapter in ("plain", "active"):
        running = request([1, 7, 8, 3], adapter, extra_key="mine")
        for shared in (True, False, False):
            before = look_up(running, shared)
        alora_serving._after_unloading(SimpleNamespace(success=True), None, SimpleNamespace(lora_id=adapter))
        assert adapter not in served
        assert look_up(running, shared=False) == before


def test_tokens_before_the_invocation_are_the_base_models(served):
    namespace, keys = look_up(request([1, 7, 8, 3], "active"))
    base_namespace, base_keys = look_up(request([1, 7, 8, 3], None))
    assert (namespace, keys[:1]) == (base_namespace, base_keys[:1]) == (None, [1])
    assert all(key >> 40 for key in keys[1:])
    assert [key & ((1 << 40) - 1) for key in keys] == base_keys


def test_tree_that_takes_no_tags_gets_a_namespace_of_its_own(served):
    """There the start of the activation is part of the namespace: it changes the KV of equal tokens."""
    first, keys = look_up(request([1, 7, 8, 3], "active"), shared=False)
    second, _ = look_up(request([1, 7, 8, 7, 8], "active"), shared=False)
    assert keys == [1, 7, 8, 3]
    assert first is not None and second is not None and first != second


def test_tagged_keys_are_told_to_nobody(served):
    """With KV events the tokens of the tree leave the process."""
    tree = Tree()
    tree.enable_storage = False
    assert keeps_keys(tree)
    tree.tree_core = SimpleNamespace(enable_kv_cache_events=True)
    assert not keeps_keys(tree)


def test_events_name_the_adapter_where_its_kv_is(served):
    """Those that are named before the first look into the tree."""
    tree = Tree()
    tree.enable_storage, names = True, KvEventLoraNames()
    for prompt in ([1, 7, 8, 3], [1, 2]):
        req = request(prompt, "active")
        alora_serving._before_event_name(SimpleNamespace(tree_cache=tree), req, "my-alora")
        names.register(req, "my-alora")
        expected = "my-alora" if req.lora_id else None
        assert names.get(look_up(req, shared=False)[0]) == expected
    assert names.get(None) is None


@pytest.mark.parametrize("adapter, cut", [("active", False), ("plain", True), (None, True)])
def test_an_invocation_is_not_cut_off(served, adapter, cut):
    req = request([1] * 20 + [7, 8], adapter)
    message = alora_serving._around_length(validate_input_length, req, 16, True)
    assert len(req.origin_input_ids) == (16 if cut else 22) and (message is None) == cut


def test_prompt_without_invocation_is_the_base_models(served):
    req = request([1, 2, 3], "active", extra_key="mine")
    assert (req.lora_id, req.extra_key, req.mezo_binding) == (None, "mine", None)


def test_users_namespace_never_meets_an_adapters(served):
    adapter_key, _ = look_up(request([1, 2], "plain"))
    assert look_up(request([1, 2], None, extra_key="plain"))[0] == "plain" != adapter_key
    assert look_up(request([1, 2], None, extra_key=adapter_key))[0] != adapter_key
    one, other = look_up(request([1], "plain", extra_key="a"))[0], look_up(request([1], "plain", extra_key="b"))[0]
    assert len({one, other, adapter_key}) == 3


class Backend(SimpleNamespace):
    """A LoRA backend, as far as loading looks at it."""

    def prepare_lora_token_segments(self): ...


class WholeRequests(SimpleNamespace):
    """One that routes requests as a whole, as it leaves SGLang's own function as it is."""

    prepare_lora_token_segments = BaseLoRABackend.prepare_lora_token_segments


def manager(kind=Backend, **changes) -> SimpleNamespace:
    """As much of a LoRAManager as loading looks at."""
    of_backend = {name: changes.pop(name) for name in list(changes) if name.startswith("backend_")}
    fields = {"name": "triton", "supports_prefill_cuda_graph": False, "is_moe_lora": False}
    backend = kind(**{**fields, **{name.removeprefix("backend_"): value for name, value in of_backend.items()}})
    return SimpleNamespace(
        **{
            "lora_backend": backend,
            "max_loras_per_batch": 8,
            "enable_lora_overlap_loading": False,
            "embed_tokens_module": None,
            "lm_head_module": None,
            "attn_dp_enabled": False,
            "speculative_algorithm": None,
            **changes,
        }
    )


@pytest.fixture
def running(monkeypatch):
    """Configuration of a server, as far as loading looks at it."""
    monkeypatch.setattr("sglang.srt.runtime_context.get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: SimpleNamespace(pp_size=1))
    monkeypatch.setattr("sglang.srt.model_executor.cuda_graph_config.check_cuda_graph_backend", lambda *args: False)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kind": WholeRequests, "backend_name": "csgmv"}, "'csgmv' cannot route single tokens"),
        ({"backend_supports_prefill_cuda_graph": True}, "--cuda-graph-backend-prefill disabled"),
        ({"max_loras_per_batch": 1}, "allowed: 2 or more"),
        ({"backend_is_moe_lora": True}, "LoRA on experts"),
        ({"embed_tokens_module": object()}, "LoRA on the embeddings"),
        ({"lm_head_module": object()}, "LoRA on the head"),
        ({"enable_lora_overlap_loading": True}, "overlap"),
        ({"attn_dp_enabled": True}, "data-parallel attention"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
    ],
)
def test_configurations_that_would_serve_wrongly_are_refused(running, changes, reason):
    with pytest.raises(ConfigError, match=rf"alora_invocation_tokens=\[7, 8\] is not allowed: null: .*{reason}"):
        alora_serving.require_servable(manager(**changes), (7, 8))
    alora_serving.require_servable(manager(**changes), ())


def test_every_load_has_a_tag_of_its_own(served, running):
    tags = set()
    for _ in range(3):
        alora_serving.register("new", (7, 8))
        tags.add(served["new"].tag)
    assert len(tags) == 3


def test_admission_keeps_a_slot_for_the_base_model(served):
    lora_manager = SimpleNamespace(max_loras_per_batch=2)

    def admitted(*lora_ids):
        return alora_serving._around_admission(lambda manager, ids: len(ids) <= 2, lora_manager, set(lora_ids))

    assert admitted("active") and admitted("active", None) and admitted("plain", None)
    assert not admitted("active", "plain")
    assert alora_serving._around_admission(lambda manager, ids: len(ids) <= 2, lora_manager, {"plain", "unknown"})
