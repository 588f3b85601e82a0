"""PEFT adapters and the model of an engine: what they can act on there, and their matrices as SGLang's loader takes
them."""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from sglang.srt.mezo.adapters.families import FAMILIES
from sglang.srt.mezo.adapters.foreign import AdaptedModel
from sglang.srt.mezo.adapters.peft_adapter import ModelLayers, PeftAdapter
from sglang.srt.mezo.adapters.peft_prefix import PrefixModel
from sglang.srt.mezo.adapters.prefix_adapter import KVShape
from sglang.srt.mezo.engine.handle import checkpoint_config, config_source
from sglang.srt.mezo.engine.layers import Layer, Part, checkpoint_sites, model_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sglang.srt.lora.lora_manager import LoRAManager


class CheckedFields(dict):
    """Fields of a configuration whose tensors have SGLang's names and shapes already."""


def is_known(manager: "LoRAManager") -> bool:
    """Whether the linear layers of the model are known by their names in Transformers."""
    config: Any = manager.base_hf_config
    return any(architecture in FAMILIES for architecture in config.architectures or ())


def model_for_adapters(manager: "LoRAManager") -> AdaptedModel:
    """What an adapter has to fit. It may act on any layer before SGLang has laid out its pool, which it does for the
    adapters that it starts with."""
    from sglang.srt.runtime_context import get_server_args

    args = get_server_args()
    any_layer = not hasattr(manager, "lora_modules")
    adapted = [
        part.site.path
        for layer in model_layers(manager.base_model)
        if any_layer or layer.is_wrapped
        for part in layer.parts
    ]
    max_rank = getattr(manager, "max_lora_rank", None)
    config: Any = manager.base_hf_config
    sites = checkpoint_sites(*config_source(args))
    layers = ModelLayers(sites, frozenset(adapted), max_rank, manager.dtype, config.vocab_size)
    return AdaptedModel(layers, _prefixes(args, checkpoint_config(*config_source(args)), manager.dtype))


def model_of_checkpoint(server_args) -> AdaptedModel | None:
    """What an adapter has to fit, before there is an engine; None where that is not known.

    Raises:
        ConfigError: the model's configuration cannot be read.
    """
    source = config_source(server_args)
    config = checkpoint_config(*source)
    if not set(config.architectures or ()) & FAMILIES.keys():
        return None
    sites = checkpoint_sites(*source)
    vocab_size = config.get_text_config().vocab_size
    layers = ModelLayers(sites, sites.keys(), server_args.max_lora_rank, torch.float32, vocab_size)
    return AdaptedModel(layers, _prefixes(server_args, config, torch.float32))


def _prefixes(server_args, config: "PretrainedConfig", dtype: torch.dtype) -> PrefixModel:
    context_length = server_args.context_length or config.get_text_config().max_position_embeddings
    return PrefixModel(server_args.model_path, KVShape.of(config), context_length, dtype)


def as_sglang_takes_it(manager: "LoRAManager", adapter: PeftAdapter) -> tuple[CheckedFields, dict[str, torch.Tensor]]:
    """Configuration and tensors. Of a fused layer all parts are there, all as wide as SGLang's: zeros where the
    adapter has nothing."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in model_layers(manager.base_model):
        if any(part.site.path in adapter.matrices for part in layer.parts):
            for name, part in zip(layer.part_names, layer.parts, strict=True):
                a, b = _placed(part, layer, adapter)
                tensors[f"base_model.model.{name}.lora_A.weight"] = a
                tensors[f"base_model.model.{name}.lora_B.weight"] = b
    fields = CheckedFields(
        peft_type="LORA",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        target_modules=sorted({name.split(".")[-3] for name in tensors}),
        alora_invocation_tokens=list(adapter.invocation) or None,
    )
    return fields, tensors


def _placed(part: Part, layer: Layer, adapter: PeftAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [width, r] of one part of SGLang's layer."""
    if part.site.path not in adapter.matrices:
        return torch.zeros(adapter.r, layer.in_features), torch.zeros(part.width, adapter.r)
    a, b = adapter.matrices[part.site.path]
    rows = b[part.first : part.first + part.rows]
    return pad(a, (0, layer.in_features - a.shape[1])), pad(rows, (0, 0, 0, part.width - part.rows))
