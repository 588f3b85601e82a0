"""Adapters served by the engine, aLoRA above all, against PEFT on a small random Llama in fp32."""

import json

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from engine_process import ServingEngine
from foreign_adapters import APPLIED, FILES, TENSORS, edit, saved
from foreign_adapters import change_tensors as changed
from served_llama import DOCUMENT, INVOCATION, ask, base_model, peft_answer, small_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base model, an ordinary adapter and two aLoRA adapters."""
    root = tmp_path_factory.mktemp("models")
    config = small_llama()
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for name, settings in {
        "lora": {"r": 4},
        "alora": {"r": 4, "alora_invocation_tokens": INVOCATION},
        "other": {"r": 8, "alora_invocation_tokens": INVOCATION[:2], "use_rslora": False},
    }.items():
        adapter = LoraConfig(
            lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        get_peft_model(base_model(root), adapter).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def engine(models):
    engine = ServingEngine(
        model_path=str(models / "base"),
        lora_paths=[f"{name}={models / name}" for name in ("lora", "alora", "other")],
        skip_tokenizer_init=True,
        log_level="error",
        chunked_prefill_size=48,
    )
    yield engine
    engine.close()


PROMPTS = {
    "invocation in the middle": (DOCUMENT[:20] + INVOCATION + [20, 21], "alora"),
    "invocation twice": (DOCUMENT[:10] + INVOCATION + DOCUMENT[10:20] + INVOCATION + [33], "alora"),
    "invocation first": (INVOCATION + DOCUMENT[:9], "alora"),
    "invocation last": (DOCUMENT[:9] + INVOCATION, "alora"),
    "no invocation": ([50] + DOCUMENT[:9], "alora"),
    "other adapter, other invocation": (DOCUMENT[:20] + INVOCATION + [20, 21], "other"),
    "ordinary LoRA": (DOCUMENT[:20] + INVOCATION + [20, 21], "lora"),
    "base model": (DOCUMENT[:20] + INVOCATION + [20, 21], None),
    "longer than a chunk of prefill": (DOCUMENT + INVOCATION + DOCUMENT[:40], "alora"),
}


@pytest.mark.parametrize("from_cache", [False, True], ids=["first time", "second time"])
def test_mixed_batch_equals_peft(engine, models, from_cache):
    prompts, adapters = [list(column) for column in zip(*PROMPTS.values())]
    if not from_cache:
        engine.flush_cache()
    answers = ask(engine, prompts, adapters, logprobs_from=-1 if from_cache else 0)
    for name, answer in zip(PROMPTS, answers, strict=True):
        tokens, logprobs = peft_answer(models, *PROMPTS[name])
        assert answer["output_ids"] == tokens, name
        if not from_cache:
            ours = torch.tensor([value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]])
            torch.testing.assert_close(ours, logprobs, atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}")


def test_adapters_change_the_answer(models):
    """Otherwise the comparison with PEFT would show nothing."""
    prompt, _ = PROMPTS["invocation in the middle"]
    answers = {name: peft_answer(models, prompt, name) for name in (None, "lora", "alora", "other")}
    assert len({tuple(tokens) for tokens, _ in answers.values()}) == 4
    start = prompt.index(INVOCATION[0])
    before, base = answers["alora"][1][: start - 1], answers[None][1][: start - 1]
    torch.testing.assert_close(before, base, atol=1e-6, rtol=0)


def cached_tokens(engine, prompt, adapter) -> int:
    return ask(engine, [prompt], [adapter])[0]["meta_info"]["cached_tokens"]


def test_base_models_kv_is_shared_up_to_the_invocation(engine):
    engine.flush_cache()
    prompt = DOCUMENT + INVOCATION + [20, 21, 22]
    assert cached_tokens(engine, DOCUMENT, None) == 0
    assert cached_tokens(engine, prompt, "alora") == len(DOCUMENT)
    assert cached_tokens(engine, prompt, "alora") == len(prompt) - 1
    assert cached_tokens(engine, prompt, "other") == len(DOCUMENT)
    assert cached_tokens(engine, prompt, "lora") == 0
    # The base model finds what aLoRA requests have computed as base model, and nothing beyond.
    assert cached_tokens(engine, prompt, None) == len(DOCUMENT)
    assert cached_tokens(engine, prompt, None) == len(prompt) - 1


def test_later_invocation_takes_the_earlier_ones_kv_back_to_the_base_model(engine, models):
    engine.flush_cache()
    first = DOCUMENT[:30] + INVOCATION + [20, 21]
    second = first + INVOCATION + [22]
    ask(engine, [first], ["alora"])
    answer = ask(engine, [second], ["alora"])[0]
    assert answer["meta_info"]["cached_tokens"] == 30
    assert answer["output_ids"] == peft_answer(models, second, "alora")[0]


def test_adapter_that_is_loaded_again_serves_no_old_kv(engine, models, tmp_path):
    """Same name, same path, other weights."""
    folder = tmp_path / "edited"
    for seed, settings in ((1, {}), (2, {}), (3, {"alora_invocation_tokens": INVOCATION})):
        torch.manual_seed(seed)
        adapter = LoraConfig(
            r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        get_peft_model(base_model(models), adapter).save_pretrained(folder)
        assert engine.load_lora_adapter("edited", str(folder)).success
        prompt = DOCUMENT[:30] + INVOCATION + [40]
        for _ in range(2):
            assert ask(engine, [prompt], ["edited"])[0]["output_ids"] == peft_answer_at(models, folder, prompt)
        engine.unload_lora_adapter("edited")


def peft_answer_at(root, folder, prompt) -> list[int]:
    return peft_answer(root, prompt, folder)[0]


# --- adapters from outside --------------------------------------------------------------------------------------------

# Of ``APPLIED``, whose matrices are held against PEFT's without an engine, one for each way in which SGLang takes an
# adapter.
_TAKEN = (
    "alpha with a fraction",
    "patterns, rank-stabilised",
    "one layer",
    "modules left out",
    "an expression",
    "one of a fused layer",
)
SERVED = {
    **{name: APPLIED[name] for name in _TAKEN},
    **{f"{name}, activated": APPLIED[name] | {"alora_invocation_tokens": INVOCATION} for name in _TAKEN},
    "layers without q": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "exclude_modules": [r"model.layers.0.self_attn.q_proj"],
    },
    "gate alone in one layer": {"target_modules": ["model.layers.1.mlp.gate_proj", "down_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
}


def log_probs(engine, prompt, adapter) -> torch.Tensor:
    engine.flush_cache()
    answer = ask(engine, [prompt], [adapter], logprobs_from=0)[0]
    return torch.tensor([value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]])


def load_from_tensors(engine, name, folder):
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return engine.load_lora_adapter_from_tensors(
        name, tensors, json.loads((folder / "adapter_config.json").read_text())
    )


@pytest.fixture(scope="module")
def base(models):
    return base_model(models)


@pytest.mark.parametrize("name", SERVED)
def test_an_adapter_of_any_kind_answers_as_in_peft(engine, models, base, tmp_path, name):
    folder = saved(base, tmp_path / "adapter", **SERVED[name])
    prompt = DOCUMENT[:20] + INVOCATION + [20, 21, 22]
    _, expected = peft_answer(models, prompt, folder)
    _, without = peft_answer(models, prompt, None)
    assert (expected - without).abs().max() > 1e-2, "the adapter must matter"
    loaded = load_from_tensors(engine, name, folder) if len(name) % 2 else engine.load_lora_adapter(name, str(folder))
    assert loaded.success, loaded.error_message
    torch.testing.assert_close(log_probs(engine, prompt, name), expected, atol=1e-4, rtol=0)
    assert engine.unload_lora_adapter(name).success


def in_pefts_types(folder) -> dict:
    return LoraConfig.from_pretrained(folder).to_dict()


def in_few_words(folder) -> dict:
    """What SGLang's loader asks for."""
    fields = in_pefts_types(folder)
    return {name: fields[name] for name in ("r", "lora_alpha", "target_modules")}


@pytest.mark.parametrize("fields_of", [in_pefts_types, in_few_words])
def test_tensors_come_with_a_configuration_as_python_has_it(engine, models, base, tmp_path, fields_of):
    folder = saved(base, tmp_path / "adapter")
    fields = fields_of(folder)
    assert isinstance(fields["target_modules"], set)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    loaded = engine.load_lora_adapter_from_tensors("python", tensors, fields)
    assert loaded.success, loaded.error_message
    prompt = DOCUMENT[:20] + INVOCATION
    torch.testing.assert_close(
        log_probs(engine, prompt, "python"), peft_answer(models, prompt, folder)[1], atol=1e-4, rtol=0
    )
    assert engine.unload_lora_adapter("python").success


BAD_FIELDS = {
    "use_dora": True,
    "r": 2,
    "bias": "all",
    "target_modules": None,
    "lora_alpha": "x",
    "use_something_new": True,
    "peft_type": "IA3",
}


def test_adapters_that_cannot_be_served_are_refused_and_leave_nothing(engine, models, base, tmp_path):
    """Each is tried under the same name, on one server, and the one that is loaded beside them answers throughout."""
    prompt = DOCUMENT[:20] + INVOCATION + [20, 21, 22]
    before = log_probs(engine, prompt, "alora")
    whole = saved(base, tmp_path / "whole")

    def refused(damage, message):
        folder = saved(base, tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}")
        damage(folder)
        result = engine.load_lora_adapter("bad", str(folder))
        assert not result.success and message in result.error_message
        assert sorted(result.loaded_adapters) == ["alora", "lora", "other"]

    for damage, message in FILES.values():
        refused(damage, message)
    for change, message in TENSORS.values():
        refused(lambda folder: changed(folder, change), message)
    for field, value in BAD_FIELDS.items():
        refused(lambda folder: edit(folder, **{field: value}), field)
    for path in ("/nowhere", "nowhere/adapter", str(whole / "adapter_config.json")):
        result = engine.load_lora_adapter("bad", path)
        assert not result.success and "lora_path" in result.error_message
    tensors = safetensors.torch.load_file(whole / "adapter_model.safetensors")
    for field, value in BAD_FIELDS.items():
        fields = {**json.loads((whole / "adapter_config.json").read_text()), field: value}
        result = engine.load_lora_adapter_from_tensors("bad", tensors, fields)
        assert not result.success and field in result.error_message
    fields = json.loads((whole / "adapter_config.json").read_text())
    for sent, load_format, message in (
        ([b"no pickle"], "flattened_bucket", "serialized_named_tensors"),
        ([1, 2], None, "tensors='list' is not allowed"),
    ):
        result = engine.load_lora_adapter_from_tensors("bad", sent, fields, load_format)
        assert not result.success and message in result.error_message
    assert engine.load_lora_adapter("bad", str(whole)).success, "the name is free"
    torch.testing.assert_close(
        log_probs(engine, prompt, "bad"), peft_answer(models, prompt, whole)[1], atol=1e-4, rtol=0
    )
    assert engine.unload_lora_adapter("bad").success
    assert torch.equal(log_probs(engine, prompt, "alora"), before)
