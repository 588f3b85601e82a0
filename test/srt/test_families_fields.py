"""Fields of a configuration that change Transformers' log-probabilities: SGLang computes them, or a warning or a
refusal names them."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import oracle
import tiny_models
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.differences import differences
from sglang.srt.mezo.adapters.families import FAMILIES, family_of
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.engine.handle import warn_of_differences

IDS = torch.randint(10, tiny_models.VOCAB, (100,), generator=torch.Generator().manual_seed(5)).tolist()
SEQUENCES = (IDS, IDS[:20])  # a batch: what one of them is given must not depend on the other
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(kind: str, **parameters) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


def long_rope(long_factor: float = 1.0, **parameters) -> dict[str, Any]:
    factors = dict(short_factor=[1.0] * 8, long_factor=[long_factor] * 8)
    return rope("longrope", original_max_position_embeddings=32, **factors, **parameters)


YARN = dict(factor=4.0, original_max_position_embeddings=32)
ROPES = [
    rope("default", rope_theta=100.0),
    rope("default", partial_rotary_factor=0.5),
    rope("linear", factor=2.0),
    rope("dynamic", factor=2.0),
    rope("yarn", **YARN),
    rope("yarn", **YARN, attention_factor=2.0),
    rope("yarn", **YARN, beta_fast=8, beta_slow=2),
    rope("yarn", **YARN, truncate=False),
    rope("yarn", **YARN, mscale=2.0, mscale_all_dim=1.0),
    rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    long_rope(factor=2.0),
    long_rope(attention_factor=2.0),
    long_rope(short_mscale=1.5, long_mscale=1.5),
    long_rope(2.0, factor=4.0),
]
VALUES = {
    "attention_bias": [True, False],
    "mlp_bias": [True],
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "relu"],
    "hidden_activation": ["gelu", "silu"],
    "rms_norm_eps": [0.1],
    "layer_norm_eps": [0.1],
    "norm_epsilon": [0.1],
    "rope_parameters": ROPES,
    "tie_word_embeddings": [True, False],
    "head_dim": [8, 24],
    "sliding_window": [8],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "layer_types": [[FULL, SLIDING], [FULL, FULL], [SLIDING, SLIDING]],
    "num_key_value_heads": [4, 1],
    "attn_logit_softcapping": [None, 2.0],
    "final_logit_softcapping": [None, 1.0],
    "query_pre_attn_scalar": [64],
    "embedding_multiplier": [1.5],
    "logits_scaling": [5.0],
    "residual_multiplier": [0.3],
    "attention_multiplier": [0.5],
    "logit_scale": [1.0, 0.1],
    "use_qk_norm": [True],
    "qk_layernorm": [True],
    "use_parallel_residual": [True],
    "use_qkv_bias": [True],
    "use_bias": [False],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "num_experts_per_tok": [1],
    "use_bidirectional_attention": [True],
    "do_layer_norm_before": [False],
    "enable_bias": [False],
    "activation_function": ["gelu"],
    "word_embed_proj_dim": [32],
    "layer_norm_elementwise_affine": [False],
    "_remove_final_layer_norm": [True],
    "pretraining_tp": [2],
    "is_decoder": [True],
}
WINDOWED = {"sliding_window": 8, "use_sliding_window": True}
WITH_IT = {
    "use_sliding_window": {"sliding_window": 8, "max_window_layers": 0},
    "max_window_layers": WINDOWED,
    "word_embed_proj_dim": {"do_layer_norm_before": False},
}
"""Without these other fields a value means nothing."""


def variations(architecture: str) -> Iterator[dict[str, Any]]:
    """Fields that differ from those of the small model, those at the default among them."""
    base = tiny_models.config(architecture)
    yield {}
    for field, values in VALUES.items():
        for value in (
            values if hasattr(base, field) and not (architecture == "OPTForCausalLM" and "head" in field) else []
        ):
            if field == "layer_types" and architecture.startswith("Qwen"):
                yield {field: value, **WINDOWED}
            elif field == "rope_parameters" and architecture == "Gemma3ForCausalLM":
                yield {field: {FULL: value, SLIDING: rope("default", rope_theta=1000.0)}}
                yield {field: {FULL: rope("default", rope_theta=1000.0), SLIDING: value}}
            elif value != getattr(base, field):
                yield {field: value, **WITH_IT.get(field, {})}


def transformers_log_probs(architecture: str, fields: dict[str, Any], folder: Path) -> torch.Tensor | None:
    """None where Transformers itself does not take the fields."""
    try:
        tiny_models.save_model(architecture, folder, **fields)
        model = oracle.load(folder)
        with torch.no_grad():
            return torch.cat([torch.log_softmax(model(torch.tensor([ids])).logits[0], -1) for ids in SEQUENCES])
    except Exception:
        return None


def engine_log_probs(engine) -> np.ndarray:
    from sglang.srt.mezo.engine.forward import Sequenced, extend
    from sglang.srt.mezo.engine.head import Head

    count = sum(map(len, SEQUENCES))
    tokens = torch.arange(tiny_models.VOCAB).repeat(count)
    rows = torch.arange(count).repeat_interleave(tiny_models.VOCAB)
    with torch.inference_mode():
        hidden, _ = extend(
            engine.handle, [Sequenced(torch.empty(0, dtype=torch.int64), ids, ((None, len(ids)),)) for ids in SEQUENCES]
        )
        return Head(engine.handle).log_probs(hidden, rows, tokens).view(count, -1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_field_is_computed_or_warned_of_or_refused(architecture, tmp_path):
    wrong = []
    for number, fields in enumerate(map(deepcopy, variations(architecture))):  # Transformers adds to some of them
        folder = tmp_path / str(number)
        expected = transformers_log_probs(architecture, fields, folder)
        if expected is None:
            continue
        config = AutoConfig.from_pretrained(folder)
        try:
            family = family_of(config)
        except ConfigError:
            continue
        found = differences(config)
        try:
            process = EngineProcess(
                model_path=str(folder),
                r=4,
                target_modules=family.attention,
                num_slots=2,
                dtype="float32",
                skip_tokenizer_init=True,
                max_total_tokens=2000,
                log_level="error",
            )
        except RuntimeError as error:  # SGLang's own refusal
            assert "ValueError" in str(error), (fields, error)
            continue
        try:
            difference = abs(process.call(engine_log_probs) - expected.numpy()).max()
        finally:
            process.close()
        if (difference > 1e-3) != bool(found):
            wrong.append((fields, difference, found))
    assert not wrong, "\n".join(map(str, wrong))


# --- without an engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_nothing_is_said_of_a_family_as_it_is(architecture):
    assert differences(tiny_models.config(architecture)) == []


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("MistralForCausalLM", {"sliding_window": 64}, ["sliding_window=64"]),
        ("MistralForCausalLM", {"sliding_window": 128}, []),
        ("Phi3ForCausalLM", {"sliding_window": 47}, ["sliding_window=47"]),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, []),
        ("Qwen2ForCausalLM", {**WINDOWED, "max_window_layers": 0}, ["sliding_window=8"]),
        ("Qwen3ForCausalLM", {**WINDOWED, "layer_types": [FULL, FULL]}, []),
        (
            "LlamaForCausalLM",
            {"mlp_bias": True, "rope_parameters": rope("dynamic", factor=2.0)},
            ["mlp_bias=True", "rope_type='dynamic'"],
        ),
        ("GemmaForCausalLM", {"rope_parameters": rope("linear", factor=2.0)}, ["rope_type='linear'"]),
        ("Gemma2ForCausalLM", {"layer_types": [FULL, SLIDING]}, ["layer_types="]),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {FULL: rope("linear", factor=2.0), SLIDING: rope("linear", factor=2.0)}},
            ["of sliding_attention"],
        ),
        ("LlamaForCausalLM", {"rope_parameters": ROPES[-1]}, ["longer than 32"]),
        ("Qwen3ForCausalLM", {"rope_parameters": rope("yarn", **YARN, attention_factor=2.0)}, ["attention_factor=2.0"]),
        ("Qwen3ForCausalLM", {"rope_parameters": rope("yarn", **YARN, attention_factor=1.1386)}, []),
        ("LlamaForCausalLM", {"rope_parameters": long_rope(factor=2.0)}, ["longer", "attention_factor=1.095"]),
        ("LlamaForCausalLM", {"rope_parameters": long_rope(factor=4.0)}, ["longer"]),
        ("LlamaForCausalLM", {"rope_parameters": long_rope(short_mscale=1.5)}, ["longer", "short_mscale"]),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {FULL: rope("yarn", **YARN, truncate=False), SLIDING: rope("default")}},
            ["truncate=False"],
        ),
    ],
)
def test_a_difference_names_the_field_and_its_value(architecture, fields, named):
    found = differences(tiny_models.config(architecture, **fields))
    assert len(found) == len(named) and all(name in sentence for name, sentence in zip(named, found))


def test_no_difference_shows_within_a_shorter_context():
    assert differences(tiny_models.config("MistralForCausalLM", sliding_window=64), context_length=64) == []
    assert differences(tiny_models.config("LlamaForCausalLM", rope_parameters=ROPES[-1]), context_length=32) == []


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}),
        ("StableLmForCausalLM", {"qk_layernorm": True}),
        ("Gemma2ForCausalLM", {"hidden_activation": "silu"}),
        ("MixtralForCausalLM", {"head_dim": 8}),
    ],
)
def test_what_sglang_does_not_load_is_refused_by_its_name(architecture, fields):
    ((name, value),) = fields.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        family_of(tiny_models.config(architecture, **fields))


def test_positions_that_sglang_cannot_run_are_refused():
    with pytest.raises(ConfigError, match="rope_type='longrope'"):
        family_of(tiny_models.config("Qwen3MoeForCausalLM", rope_parameters=long_rope()))


def test_an_engines_start_says_it_in_a_line(caplog):
    warn_of_differences(tiny_models.config("LlamaForCausalLM", mlp_bias=True), None)
    warn_of_differences(tiny_models.config("LlamaForCausalLM"), None)
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and "LlamaForCausalLM" in record.message
        and "mlp_bias=True is computed as False" in record.message
    )
