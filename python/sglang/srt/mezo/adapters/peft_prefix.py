"""Prefixes from outside: PEFT's PrefixTuning, ours or not, that gives with a model what PEFT 0.21 would give, or is
refused."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sglang.srt.mezo.adapters.adapter import CONFIG
from sglang.srt.mezo.adapters.peft_files import (
    DTYPES,
    directory_of,
    name_of,
    read_json,
    read_weights,
    require_finite,
    require_own_sums,
    shape_of,
)
from sglang.srt.mezo.adapters.prefix_adapter import EMBEDDINGS, POSITIONS, KVShape, PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.config import PrefixPositions
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.kinds import described, fits

PREFIX_TUNING = "PREFIX_TUNING"

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",  # PEFT sets it as it loads a prefix
        "init_weights",
        "encoder_hidden_size",
        "prefix_projection",  # of training: what is saved is the projection's result
    }
)


class PrefixModel(NamedTuple):
    """What a prefix has to fit.

    Attributes:
        name: of the base model, as a prefix's files are to call it.
        dtype: that keys and values are kept in.
        task_type: PEFT's; None of a masked language model.
    """

    name: str
    kv: KVShape
    context_length: int
    dtype: torch.dtype
    task_type: str | None = "CAUSAL_LM"


def read_prefix(folder: str, model: PrefixModel) -> PrefixAdapter:
    """The prefix in a folder, or in a repository of the hub.

    Raises:
        ConfigError: naming the file or field at fault. Nothing larger than a prefix can be is read.
    """
    directory = directory_of(folder)
    spec = _spec(read_json(directory / CONFIG), model)
    tensors = read_weights(directory, PrefixAdapter(spec).numel)
    require_own_sums(directory)
    return _fit(spec, tensors, model)


def fit_prefix(fields: object, tensors: Mapping[str, torch.Tensor], model: PrefixModel) -> PrefixAdapter:
    """The same of a prefix that comes as the fields of its configuration and its tensors."""
    if not isinstance(tensors, Mapping):
        raise ConfigError("tensors", type(tensors).__name__, "a dictionary of tensors")
    return _fit(_spec(fields, model), tensors, model)


def _spec(fields: object, model: PrefixModel) -> PrefixSpec:
    """What the configuration says, checked against the model field by field."""
    if not isinstance(fields, dict):
        raise ConfigError(CONFIG, fields, "a JSON object")
    kv = model.kv
    expected = {
        "peft_type": PREFIX_TUNING,
        "task_type": model.task_type,
        "num_layers": kv.layers,
        "token_dim": kv.heads * kv.head_dim,
        "num_attention_heads": kv.heads,
        "num_transformer_submodules": 1,
    }
    for name, value in expected.items():
        if fields.get(name) != value or isinstance(fields.get(name), bool):
            of = "as PEFT writes it" if isinstance(value, str) else "by the model's layers, and its heads of keys"
            raise ConfigError(name, fields.get(name), f"{value}, {of}")
    for name, value in fields.items():
        if name not in (*expected, "num_virtual_tokens", POSITIONS) and name not in _WITHOUT_EFFECT and value:
            raise ConfigError(str(name)[:100], value, "null, false or empty: nothing but keys and values is applied")
    tokens: Any = fields.get("num_virtual_tokens")
    if not fits(tokens, int) or not 1 <= tokens < model.context_length:
        raise ConfigError("num_virtual_tokens", tokens, f"from 1 to {model.context_length - 1}, the context less one")
    positions: Any = fields.get(POSITIONS, "unshifted" if model.task_type is None else "shifted")
    if not fits(positions, PrefixPositions):
        raise ConfigError(POSITIONS, positions, described(PrefixPositions))
    return PrefixSpec(model.name, tokens, kv, positions, model.task_type)


def _fit(spec: PrefixSpec, tensors: Mapping[str, torch.Tensor], model: PrefixModel) -> PrefixAdapter:
    prefix = PrefixAdapter(spec)
    others = [name for name in tensors if name != EMBEDDINGS]
    if others or EMBEDDINGS not in tensors:
        found = ", ".join(sorted(map(str, others)))[:200] or None
        raise ConfigError("tensors", found, f"{EMBEDDINGS}, and no others")
    matrix = tensors[EMBEDDINGS]
    if not isinstance(matrix, torch.Tensor) or matrix.layout != torch.strided or matrix.dtype not in DTYPES:
        kind = str(matrix.dtype) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
        raise ConfigError(EMBEDDINGS, kind, "numbers of type " + ", ".join(map(name_of, DTYPES)))
    if tuple(matrix.shape) != prefix.shapes[0]:
        raise ConfigError(EMBEDDINGS, shape_of(matrix), f"{list(prefix.shapes[0])} by the model and {CONFIG}")
    matrix = matrix.detach().cpu()
    require_finite(EMBEDDINGS, matrix, model.dtype)
    require_finite(EMBEDDINGS, matrix, torch.float32)
    prefix.state_dict()[EMBEDDINGS].copy_(matrix)
    return prefix
