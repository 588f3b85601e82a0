"""Runs that go on from an adapter: it says what is trained, and what is given besides must agree with it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.adapters.adapter import INITIAL, Site
from sglang.srt.mezo.adapters.foreign import AdaptedModel, ForeignAdapter, read_given
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.invocation import AUTO, invocation_setting, invocation_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_start(config: MezoConfig, model: AdaptedModel, folder: str | None = None) -> ForeignAdapter | None:
    """The adapter that a run begins with, None where it makes one. A run that is resumed has a copy of its own.

    Args:
        folder: where the adapter lies, if ``init_from`` does not say it.

    Raises:
        ConfigError: it cannot be read, does not fit the model, or leaves out layers that a run would train.
    """
    if config.init_from is None:
        return None
    kept = Path(config.output_dir) / INITIAL
    if config.resume_from_checkpoint and kept.is_dir():
        folder = str(kept)
    adapter = read_given("init_from", config.init_from, folder or config.init_from, model)
    require_whole(adapter, model.layers.sites.values(), config.init_from)
    return adapter


def require_whole(adapter: ForeignAdapter, sites: Collection[Site], name: str) -> None:
    """A run trains its modules in all layers: an adapter of some of them would become another."""
    if isinstance(adapter, PrefixAdapter):
        return
    absent = [site.path for site in sites if site.name in adapter.target_modules and site.path not in adapter.matrices]
    if absent:
        raise ConfigError(
            "init_from",
            name,
            f"an adapter of {', '.join(adapter.target_modules)} in all layers, and it has nothing for {absent[0]}",
        )


def of_adapter(adapter: ForeignAdapter) -> dict[str, Any]:
    """The settings that an adapter decides, but for its invocation."""
    if isinstance(adapter, PrefixAdapter):
        spec = adapter.spec
        return {"tuning": "prefix", "num_virtual_tokens": spec.num_virtual_tokens, "prefix_positions": spec.positions}
    return {
        "tuning": "alora" if adapter.invocation else "lora",
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "target_modules": adapter.target_modules,
    }


def contradiction(
    given: Mapping[str, Any], adapter: ForeignAdapter, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[str, Any] | None:
    """A setting that was given otherwise than the adapter has it, and what that is; None where all agree.

    Args:
        given: settings by their names; "auto" and what is missing agrees.
        tokenizer: tells what an invocation stands for; None where none is among the settings.
    """
    for name, value in of_adapter(adapter).items():
        sent = given.get(name, value)
        same = (
            math.isclose(sent, value, rel_tol=1e-6)
            if name == "lora_alpha"
            else sorted(sent) == value
            if name == "target_modules"
            else sent == value
        )
        if not same:
            return name, value
    sent = given.get("invocation", AUTO)
    if sent == AUTO:
        return None
    assert tokenizer is not None, "an invocation is among the settings"
    if invocation_tokens(sent or (), tokenizer) == adapter.invocation:
        return None
    return "invocation", invocation_setting(adapter.invocation, tokenizer) if adapter.invocation else None


def settled(config: MezoConfig, adapter: ForeignAdapter | None, tokenizer: "PreTrainedTokenizerBase") -> MezoConfig:
    """The configuration with what the adapter decides.

    Raises:
        ConfigError: a field contradicts the adapter.
    """
    if adapter is None:
        return config
    if isinstance(adapter, PrefixAdapter) and config.tuning is None:
        raise ConfigError("tuning", None, "prefix: the adapter of init_from is one, and other settings follow from it")
    names = [*of_adapter(adapter), "invocation"]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if (wrong := contradiction(given, adapter, tokenizer)) is not None:
        name, value = wrong
        raise ConfigError(name, given[name], f"{value!r}, as the adapter of init_from has it")
    return replace(
        config,
        **of_adapter(adapter),
        invocation=invocation_setting(adapter.invocation, tokenizer) if adapter.invocation else None,
    )
