"""Adapters of every kind that comes from outside: low-rank ones of layers, and prefixes."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch

from sglang.srt.mezo.adapters.adapter import CONFIG
from sglang.srt.mezo.adapters.peft_adapter import ModelLayers, PeftAdapter, fit_adapter, read_adapter
from sglang.srt.mezo.adapters.peft_files import directory_of, read_json
from sglang.srt.mezo.adapters.peft_prefix import PREFIX_TUNING, PrefixModel, fit_prefix, read_prefix
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError

ForeignAdapter = PeftAdapter | PrefixAdapter


class AdaptedModel(NamedTuple):
    """What adapters of a model have to fit."""

    layers: ModelLayers
    prefixes: PrefixModel


def read_foreign(folder: str, model: AdaptedModel) -> ForeignAdapter:
    """The adapter in a folder, or in a repository of the hub; ConfigError names the file or field at fault."""
    fields = read_json(directory_of(folder) / CONFIG)
    return read_prefix(folder, model.prefixes) if _is_prefix(fields) else read_adapter(folder, model.layers)


def read_given(field: str, name: str, folder: str, model: AdaptedModel) -> ForeignAdapter:
    """The same of an adapter that a user has named; ConfigError is about the field that names it."""
    try:
        return read_foreign(folder, model)
    except ConfigError as error:
        reason = error.allowed if error.field == "lora_path" else str(error)
        raise ConfigError(field, name, f"an adapter of this model: {reason}") from error


def fit_foreign(fields: object, tensors: Mapping[str, torch.Tensor], model: AdaptedModel) -> ForeignAdapter:
    """The same of one that comes as the fields of its configuration, in PEFT's types or JSON's, and its tensors."""
    if isinstance(fields, dict):
        fields = {"peft_type": "LORA", **{name: _as_json(value) for name, value in fields.items()}}
    if _is_prefix(fields):
        return fit_prefix(fields, tensors, model.prefixes)
    return fit_adapter(fields, tensors, model.layers)


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return list(value) if isinstance(value, tuple) else value


def _is_prefix(fields: object) -> bool:
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind not in (None, "LORA", PREFIX_TUNING):
        raise ConfigError("peft_type", kind, f"LORA or {PREFIX_TUNING}")
    return kind == PREFIX_TUNING
