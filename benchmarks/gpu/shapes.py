"""Models of known shapes with random weights, by their configurations alone where an engine makes the weights.

python benchmarks/gpu/shapes.py llama-3.1-8b FOLDER        # with a tokenizer, for a server
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "assets" / "opt-reviews"
DUMMY = {"load_format": "dummy", "skip_tokenizer_init": True}
"""Of an engine whose folder has a configuration and no weights."""


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        dropout=0.0,
    )


def _llama(width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "tiny": _opt(64, 2, 4),
    "tiny-llama": _llama(64, 2, 4, 2, 96, 50_272),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-13b": _opt(5120, 40, 40),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14_336, 128_256),
}
TARGETS = {"opt": ("q_proj", "k_proj", "v_proj", "out_proj"), "llama": ("q_proj", "k_proj", "v_proj", "o_proj")}


def targets(shape: str) -> tuple[str, ...]:
    """The attention projections."""
    return TARGETS[SHAPES[shape].model_type]


def save(shape: str, folder: Path, dtype: str, tokenizer: bool = False) -> str:
    """A folder with a configuration, and with the repository's small tokenizer where a server needs one."""
    config = SHAPES[shape]
    config.architectures = ["OPTForCausalLM" if config.model_type == "opt" else "LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(TOKENIZER / name, folder / name)
    return str(folder)


def on_device(shape: str, dtype: str, device: torch.device) -> Any:
    """Transformers' model with random weights, made where it stays."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=getattr(torch, dtype)).eval()


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]), "bfloat16", tokenizer=True)
