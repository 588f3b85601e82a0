"""A small random model of every family that can be trained, with what is its own (windows, caps, scales) at values
that matter."""

from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig

from sglang.srt.mezo.adapters.architectures import auto_class

VOCAB = 211

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=128,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_ONE_OF_EACH = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16)
_ENCODER = dict(num_key_value_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {
    "BertForMaskedLM": ("BertConfig", _ENCODER),
    "CohereForCausalLM": ("CohereConfig", dict(logit_scale=0.25)),
    "Cohere2ForCausalLM": ("Cohere2Config", dict(logit_scale=0.25, head_dim=16, **_ONE_OF_EACH)),
    "GemmaForCausalLM": ("GemmaConfig", dict(head_dim=32)),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        dict(
            head_dim=32,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            **_ONE_OF_EACH,
        ),
    ),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", dict(head_dim=32, query_pre_attn_scalar=24, **_ONE_OF_EACH)),
    "Glm4ForCausalLM": ("Glm4Config", dict(head_dim=16)),
    "GraniteForCausalLM": (
        "GraniteConfig",
        dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    ),
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", dict(sliding_window=None)),
    "MixtralForCausalLM": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "OPTForCausalLM": (
        "OPTConfig",
        dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, init_std=0.15, num_key_value_heads=4),
    ),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", dict(head_dim=32)),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", dict(head_dim=16, **_MOE)),
    "RobertaForMaskedLM": ("RobertaConfig", _ENCODER),
    "StableLmForCausalLM": ("StableLmConfig", {}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", dict(sliding_window=None)),
    "XLMRobertaForMaskedLM": ("XLMRobertaConfig", _ENCODER),
}
"""By architecture: Transformers' configuration and its fields."""


def config(architecture: str, **fields) -> PretrainedConfig:
    kind, own = CONFIGS[architecture]
    made = getattr(transformers, kind)(**{**_COMMON, **own, **fields})
    made.architectures = [architecture]
    return made


def save_model(architecture: str, folder: Path, **fields) -> str:
    """Write a random model; its biases and norms are not at their trivial start."""
    torch.manual_seed(1)
    made = config(architecture, **fields)
    model = auto_class(made).from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)
