"""Which layers an adapter acts on: the checkpoint's linear layers, and where SGLang's model has them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from sglang.srt.mezo.adapters.adapter import Site
from sglang.srt.mezo.adapters.families import model_modules
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.engine.handle import EngineHandle, checkpoint_config, config_source

STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""SGLang's fused linear layers and the layers in them, in the order of their rows. Some models have them fused
themselves."""


@dataclass(frozen=True)
class Part:
    """Rows first .. first + rows of the checkpoint's linear layer ``site``; SGLang's layer has ``width`` rows for
    them, zeros last."""

    site: Site
    first: int
    rows: int
    width: int


@dataclass(frozen=True)
class Layer:
    """A linear layer wrapped for LoRA.

    Attributes:
        index: of the transformer block.
        name: path in SGLang's model; its last part is the name of the layer's buffers in the LoRA pool.
        in_features: of SGLang's layer, which may be wider than the checkpoint's.
        parts: what it has of the checkpoint's layers, in the order of its rows.
        adapted: paths of the checkpoint's layers that are trained.
    """

    index: int
    name: str
    module: Any
    in_features: int
    parts: tuple[Part, ...]
    adapted: frozenset[str] = frozenset()

    @property
    def target(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def out_features(self) -> int:
        return sum(part.width for part in self.parts)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Paths of the parts by which SGLang's loader knows them; it puts fused layers together itself."""
        parent, _, leaf = self.name.rpartition(".")
        return tuple(f"{parent}.{part}" for part in STACKED.get(leaf, (leaf,)))

    @property
    def is_wrapped(self) -> bool:
        """Whether the LoRA pool has room for it."""
        return hasattr(self.module, "base_layer")

    @property
    def sites(self) -> list[Site]:
        return [site for site in dict.fromkeys(part.site for part in self.parts) if site.path in self.adapted]


def adapted_sites(handle: EngineHandle, target_modules: Sequence[str]) -> list[Site]:
    """The checkpoint's linear layers that an adapter on ``target_modules`` acts on, in the order of SGLang's model.

    Raises:
        ConfigError: the engine's pool or the model has no such layer.
    """
    return [site for layer in adapted_layers(handle, target_modules) for site in layer.sites]


def adapted_layers(handle: EngineHandle, target_modules: Sequence[str]) -> list[Layer]:
    """The wrapped layers in which something of ``target_modules`` is adapted; raises what ``adapted_sites`` does."""
    layers = []
    for layer in _wrapped(handle):
        adapted = frozenset(part.site.path for part in layer.parts if part.site.name in target_modules)
        if adapted:
            layers.append(replace(layer, adapted=adapted))
    missing = sorted(set(target_modules) - {site.name for layer in layers for site in layer.sites})
    if missing:
        raise ConfigError(
            "target_modules",
            list(target_modules),
            f"the engine's LoRA pool has {adaptable_modules(handle)}, not {missing}",
        )
    return layers


def adaptable_modules(handle: EngineHandle) -> list[str]:
    """Names of the linear layers that the engine's LoRA pool can adapt, as ``target_modules`` has them."""
    return sorted({part.site.name for layer in _wrapped(handle) for part in layer.parts})


def naming(model: torch.nn.Module) -> Callable[[str], str]:
    """SGLang's name of a module or a parameter -> the checkpoint's. All but our own models for which LoRA could not
    find its layers have the same."""
    return getattr(model, "checkpoint_name", str)


def _wrapped(handle: EngineHandle) -> Iterator[Layer]:
    """Every linear layer that SGLang has wrapped for LoRA, with what it holds of the checkpoint's."""
    modules = checkpoint_sites(*config_source(handle.model_runner.server_args))
    names = naming(handle.model_runner.model)
    for index, wrapped in enumerate(handle.lora_manager.lora_modules):
        for name, module in wrapped.items():
            base: Any = module.base_layer
            parts = tuple(_parts(name, base, modules, names))
            if parts:
                yield Layer(index, name, module, base.input_size, parts)


def model_layers(model: torch.nn.Module) -> Iterator[Layer]:
    """Every linear layer in the blocks of SGLang's model, wrapped for LoRA or not, that holds something of the
    checkpoint's."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.utils import get_layer_id
    from sglang.srt.runtime_context import get_server_args

    modules = checkpoint_sites(*config_source(get_server_args()))
    names = naming(model)
    for name, module in model.named_modules():
        base, index = getattr(module, "base_layer", module), get_layer_id(name)
        if isinstance(base, LinearBase) and index is not None and not name.endswith(".base_layer"):
            parts = tuple(_parts(name, base, modules, names))
            if parts:
                yield Layer(index, name, module, base.input_size, parts)


@lru_cache(maxsize=1)
def checkpoint_sites(*source) -> Mapping[str, Site]:
    """The checkpoint's linear layers by their paths, from what ``config_source`` gives; the engine's own copy of the
    configuration holds the engine's widths."""
    return {site.path: site for site in model_modules(checkpoint_config(*source))}


def _parts(
    name: str, base: Any, modules: Mapping[str, Site], checkpoint_name: Callable[[str], str] = str
) -> Iterator[Part]:
    """The checkpoint's layers in one of SGLang's, by full widths whatever the degree of parallelism; none in experts
    and routers."""
    parent, _, leaf = name.rpartition(".")
    if (site := modules.get(checkpoint_name(name))) is not None:
        widths = _output_widths(base)
        rows = _rows_of_fused(site, widths)
        yield from (
            Part(site, first, own, width) for first, own, width in zip(itertools.accumulate([0, *rows]), rows, widths)
        )
    elif (paths := [checkpoint_name(f"{parent}.{part}") for part in STACKED.get(leaf, (leaf,))])[0] in modules:
        for path, width in zip(paths, _output_widths(base), strict=True):
            yield Part(modules[path], 0, modules[path].out_features, width)


def _rows_of_fused(site: Site, widths: Sequence[int]) -> list[int]:
    """The checkpoint's rows for each part of SGLang's layer; where that is wider, equal parts have grown equally."""
    if sum(widths) == site.out_features:
        return list(widths)
    if len(set(widths)) > 1:
        raise ConfigError(
            "target_modules",
            site.name,
            f"a layer of {site.out_features} rows; SGLang gave it {sum(widths)}: choose a tp_size that divides the "
            "heads",
        )
    return [site.out_features // len(widths)] * len(widths)


def _output_widths(base: Any) -> list[int]:
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    if isinstance(base, QKVParallelLinear):
        kv = base.total_num_kv_heads * base.head_size
        return [base.total_num_heads * base.head_size, kv, kv]
    if isinstance(base, MergedColumnParallelLinear):
        return list(base.output_sizes)
    return [base.output_size]
