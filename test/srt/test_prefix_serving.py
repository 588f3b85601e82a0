"""Prefixes served by the engine against PEFT, on a small random Llama with grouped queries in float32."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from engine_process import ServingEngine
from foreign_adapters import change_tensors
from foreign_prefixes import FIELDS, FILES, TENSORS, saved_prefix
from served_llama import DOCUMENT, INVOCATION, SAMPLING, ask, base_model, peft_answer, small_llama
from sglang.srt.mezo.adapters.prefix_adapter import KVShape, PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.noise import direction

CONTEXT, POOL = 512, 1500
PROMPT = [*DOCUMENT, *INVOCATION, 20]
TARGETS = ["q_proj", "v_proj"]
FIRST, LATER = "first time", "second time"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of a base model, prefixes by PEFT and by us, and adapters that run beside them."""
    root = tmp_path_factory.mktemp("models")
    config = small_llama(CONTEXT)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    base = base_model(root)
    saved_prefix(base, root / "prefix")
    saved_prefix(base, root / "projected", tokens=3, seed=3, prefix_projection=True, encoder_hidden_size=16)
    ours = PrefixAdapter(PrefixSpec("base", 9, KVShape.of(config)))
    ours.theta.copy_(direction(1, 0, ours.numel))
    ours.save_pretrained(root / "ours")
    for name, settings in {"lora": {}, "alora": {"alora_invocation_tokens": INVOCATION}}.items():
        adapter = LoraConfig(
            r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        get_peft_model(base_model(root), adapter).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def engine(models):
    engine = ServingEngine(
        model_path=str(models / "base"),
        lora_paths=[f"{name}={models / name}" for name in ("prefix", "lora", "alora")],
        skip_tokenizer_init=True,
        log_level="error",
        chunked_prefill_size=48,
        max_total_tokens=POOL,
        max_loras_per_batch=3,
    )
    for name in ("projected", "ours"):
        assert engine.load_lora_adapter(name, str(models / name)).success
    yield engine
    engine.close()


PROMPTS = {
    "one token": ([50], "prefix"),
    "two chunks": (PROMPT, "prefix"),
    "another prefix": (PROMPT, "ours"),
    "projected, as PEFT saves it": (PROMPT, "projected"),
    "short": (DOCUMENT[:9], "ours"),
    "LoRA": (PROMPT, "lora"),
    "activated LoRA": (PROMPT, "alora"),
    "base model": (PROMPT, None),
}


@pytest.mark.parametrize("time", [FIRST, LATER, "after a flush"])
def test_mixed_batch_equals_peft(engine, models, time):
    prompts, adapters = [list(column) for column in zip(*PROMPTS.values())]
    if time != LATER:
        engine.flush_cache()
    answers = ask(engine, prompts, adapters, logprobs_from=-1 if time == LATER else 0)
    for name, answer in zip(PROMPTS, answers, strict=True):
        prompt, adapter = PROMPTS[name]
        tokens, logprobs = peft_answer(models, prompt, adapter)
        meta = answer["meta_info"]
        assert answer["output_ids"] == tokens, name
        assert meta["prompt_tokens"] == len(prompt) and meta["completion_tokens"] == 8, name
        if time == LATER:
            assert meta["cached_tokens"] == len(prompt) - 1, name
            continue
        assert meta["cached_tokens"] == 0 and meta["cached_tokens_details"] is None, name
        values, ids = zip(*[(value, token) for value, token, *_ in meta["input_token_logprobs"]])
        assert list(ids) == prompt and values[0] is None, name
        torch.testing.assert_close(
            torch.tensor(values[1:]), logprobs, atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}"
        ) if logprobs.numel() else None


def test_prefixes_change_the_answer(models):
    """Otherwise the comparison with PEFT would show nothing."""
    adapters = ("prefix", "projected", "ours", None)
    answers = [peft_answer(models, PROMPT, adapter)[1] for adapter in adapters]
    for index, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-2 for other in answers[:index])


def test_prompt_logprobs_begin_where_they_are_asked_for(engine, models):
    _, expected = peft_answer(models, PROMPT, "prefix")
    for start in (1, 40, len(PROMPT) - 1):
        answer = ask(engine, [PROMPT], ["prefix"], logprobs_from=start)[0]
        (_, first, *_), *rest = answer["meta_info"]["input_token_logprobs"]
        assert [first, *(token for _, token, *_ in rest)] == PROMPT[start:]
        ours = torch.tensor([value for value, *_ in rest])
        torch.testing.assert_close(ours, expected[start:], atol=1e-4, rtol=0)


def test_a_prefix_shares_nothing_and_counts_for_nothing_in_the_cache(engine):
    def cached(adapter, prompt=PROMPT):
        return ask(engine, [prompt], [adapter])[0]["meta_info"]["cached_tokens"]

    engine.flush_cache()
    for adapter in ("prefix", "ours", None):
        assert cached(adapter) == 0 and cached(adapter) == len(PROMPT) - 1
    # Placeholders are 0 in the tree: as words they are the base model's.
    assert cached(None, [0] * 5 + PROMPT) == 0


def ask_with(engine, fields: dict):
    """Runs in the engine's process: fields that ``Engine.generate`` does not have."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    fields = {"input_ids": PROMPT, "lora_path": "prefix", "sampling_params": dict(SAMPLING), **fields}
    request = GenerateReqInput(**fields)
    return engine.loop.run_until_complete(anext(engine.tokenizer_manager.generate_request(request, None)))


@pytest.mark.parametrize("fields", [{"extra_key": "mine"}, {"cache_salt": "mine"}], ids=str)
def test_who_keeps_to_himself_meets_the_prefix_and_nothing_else(engine, models, fields):
    engine.flush_cache()
    expected, _ = peft_answer(models, PROMPT, "prefix")
    for asked, cached in ((fields, 0), (fields, 0), ({}, 0), (fields, 0), ({}, len(PROMPT) - 1)):
        answer = engine.call(ask_with, asked)
        assert answer["output_ids"] == expected
        meta = answer["meta_info"]
        assert (meta["prompt_tokens"], meta["cached_tokens"]) == (len(PROMPT), cached)


def test_beams_equal_pefts(engine, models):
    answer = engine.generate(input_ids=PROMPT, lora_path="prefix", sampling_params={**SAMPLING, "beam_width": 3})
    assert answer["output_ids"] == peft_answer(models, PROMPT, "prefix", num_beams=3)[0]


def test_prefixes_need_no_slots(engine, models):
    """Two adapters and the base model fill the pool; as many prefixes as there are run beside them."""
    names = [f"copy-{seed}" for seed in range(4)]
    for seed, name in enumerate(names):
        saved_prefix(base_model(models), models / name, tokens=2, seed=10 + seed)
        assert engine.load_lora_adapter(name, str(models / name)).success
    adapters = [*names, "lora", "alora", None]
    for adapter, answer in zip(adapters, ask(engine, [PROMPT] * len(adapters), adapters), strict=True):
        assert answer["output_ids"] == peft_answer(models, PROMPT, adapter)[0], adapter
    for name in names:
        assert engine.unload_lora_adapter(name).success


def test_eviction_takes_prompts_and_no_prefix(engine, models):
    """Several times what the pool holds, and more at once than it has room for."""
    engine.flush_cache()
    prompts = [[seed, *DOCUMENT, *DOCUMENT] for seed in range(40)]
    answers = ask(engine, prompts, ["prefix", "ours"] * 20, max_new_tokens=60)
    assert sum(len(prompt) + 60 for prompt in prompts) > 4 * POOL
    for prompt, adapter, answer in list(zip(prompts, ["prefix", "ours"] * 20, answers))[::8]:
        assert answer["output_ids"][:8] == peft_answer(models, prompt, adapter)[0]
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)


def test_a_prefix_that_is_loaded_again_serves_no_old_kv(engine, models, tmp_path):
    """Same name, same path, other numbers."""
    for seed in range(3):
        folder = saved_prefix(base_model(models), tmp_path / "edited", seed=seed, tokens=5 - seed % 2)
        assert engine.load_lora_adapter("edited", str(folder)).success
        result = engine.load_lora_adapter("edited", str(folder))
        assert not result.success and "already loaded" in result.error_message
        for _ in range(2):
            assert ask(engine, [PROMPT], ["edited"])[0]["output_ids"] == peft_answer(models, PROMPT, folder)[0]
        assert engine.unload_lora_adapter("edited").success


def test_a_prefix_comes_as_tensors_too(engine, models):
    folder = models / "prefix"
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert engine.load_lora_adapter_from_tensors("tensors", tensors, fields).success
    assert ask(engine, [PROMPT], ["tensors"])[0]["output_ids"] == peft_answer(models, PROMPT, "prefix")[0]
    assert engine.unload_lora_adapter("tensors").success
    result = engine.load_lora_adapter_from_tensors("tensors", tensors, {**fields, "num_layers": 7})
    assert not result.success and "num_layers=7 is not allowed" in result.error_message


def test_a_prefix_that_overflows_reaches_nobody_else(engine, models, tmp_path):
    """Keys that are finite, whose products with queries are not."""
    folder = saved_prefix(base_model(models), tmp_path / "huge", scale=1e38)
    assert engine.load_lora_adapter("huge", str(folder)).success
    for _ in range(3):
        with pytest.raises(RuntimeError, match="adapter 'huge' does not give finite numbers for this request"):
            engine.call(ask_with, {"lora_path": "huge"})
        for adapter, answer in zip(("prefix", None), ask(engine, [PROMPT[1:]] * 2, ["prefix", None]), strict=True):
            assert answer["output_ids"] == peft_answer(models, PROMPT[1:], adapter)[0]
    assert engine.unload_lora_adapter("huge").success


# --- what is refused --------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_served_are_refused_and_leave_nothing(engine, models, tmp_path):
    """Each is tried under the same name, on one server, and what is loaded beside them answers throughout."""
    before = ask(engine, [PROMPT], ["prefix"])[0]["output_ids"]

    def refused(damage, message, tokens=5):
        folder = saved_prefix(base_model(models), tmp_path / f"{len(list(tmp_path.iterdir()))}", tokens=tokens)
        damage(folder)
        result = engine.load_lora_adapter("bad", str(folder))
        assert not result.success and message in result.error_message, result.error_message
        assert "bad" not in result.loaded_adapters and "prefix" in result.loaded_adapters

    for damage, message in (*FILES.values(), *FIELDS.values()):
        refused(damage, message)
    for change, message in TENSORS.values():
        refused(lambda folder: change_tensors(folder, change), message)
    refused(lambda folder: None, f"a prefix of 400 tokens is more than the {POOL // 4 - 17} of", tokens=400)
    whole = saved_prefix(base_model(models), tmp_path / "whole")
    assert engine.load_lora_adapter("bad", str(whole)).success, "the name is free"
    assert engine.unload_lora_adapter("bad").success
    assert ask(engine, [PROMPT], ["prefix"])[0]["output_ids"] == before


def ask_in_session(engine) -> dict:
    """Runs in the engine's process."""
    session = engine.loop.run_until_complete(engine.tokenizer_manager.open_session(_open_session(), None))
    return ask_with(engine, {"session_params": {"id": session}})


def _open_session():
    from sglang.srt.managers.io_struct import OpenSessionReqInput

    return OpenSessionReqInput(capacity_of_str_len=1000)


def ask_with_embeddings(engine) -> dict:
    """The same."""
    from sglang.srt.managers.embed_types import PositionalEmbeds

    return ask_with(engine, {"positional_embed_overrides": PositionalEmbeds([torch.zeros(1, 64)], [0])})


def request_error(engine, **fields) -> str:
    with pytest.raises(RuntimeError) as error:
        engine.call(ask_with, fields)
    return str(error.value)


def test_requests_that_would_be_answered_wrongly_are_refused(engine, models):
    for asked, field in ((ask_in_session, "session"), (ask_with_embeddings, "positional_embed_overrides")):
        with pytest.raises(RuntimeError, match=f"{field} is not allowed under adapter 'prefix', a prefix"):
            engine.call(asked)
    # SGLang leaves five tokens of a context to answers, and one to itself.
    longest = CONTEXT - 1 - 5 - 5 - 1
    prompt = (DOCUMENT * 8)[:longest]
    for logprobs in (False, True):
        message = request_error(
            engine,
            input_ids=[*prompt, 1],
            sampling_params={"max_new_tokens": 1},
            return_logprob=logprobs,
            logprob_start_len=0 if logprobs else -1,
        )
        assert f"the prompt has {longest + 1} tokens, and under adapter 'prefix'" in message
    assert ask(engine, [prompt], ["prefix"], max_new_tokens=5)[0]["meta_info"]["completion_tokens"] == 5
    message = request_error(engine, input_ids=PROMPT, sampling_params={"max_new_tokens": CONTEXT - len(PROMPT) - 4})
    assert f"max_new_tokens={CONTEXT - len(PROMPT) - 4} is not allowed: {CONTEXT - len(PROMPT) - 5} are left" in message
    assert ask(engine, [PROMPT], ["prefix"])[0]["output_ids"] == peft_answer(models, PROMPT, "prefix")[0]


# --- at a start -------------------------------------------------------------------------------------------------------


def started(models, name: str, **arguments) -> ServingEngine:
    """An engine with one prefix and nothing else."""
    return ServingEngine(
        model_path=str(models / "base"),
        lora_paths=[f"{name}={models / name}"],
        skip_tokenizer_init=True,
        log_level="error",
        max_total_tokens=POOL,
        **arguments,
    )


def test_a_server_starts_with_prefixes_alone(models):
    engine = started(models, "ours")
    try:
        assert ask(engine, [PROMPT], ["ours"])[0]["output_ids"] == peft_answer(models, PROMPT, "ours")[0]
    finally:
        engine.close()


@pytest.mark.parametrize(
    "flag", [{"disable_radix_cache": True}, pytest.param({"page_size": 16}, marks=pytest.mark.slow)], ids=str
)
def test_a_server_that_cannot_serve_a_prefix_does_not_start_with_one(models, flag):
    with pytest.raises(RuntimeError):
        started(models, "prefix", **flag)
