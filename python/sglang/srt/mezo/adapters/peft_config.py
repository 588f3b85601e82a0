"""adapter_config.json, field by field as PEFT 0.21 reads it: what is applied, what has no effect here, what is refused.

A configuration either gives the function that PEFT computes with it, or it is refused with its field, value and what is
allowed.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import regex

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.kinds import described, fits

_APPLIED: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "use_rslora": Optional[bool],
    "target_modules": Union[str, list[str]],
    "exclude_modules": Optional[Union[str, list[str]]],
    "layers_to_transform": Optional[Union[int, list[int]]],
    "layers_pattern": Optional[Union[str, list[str]]],
    "rank_pattern": Optional[dict],
    "alpha_pattern": Optional[dict],
    "alora_invocation_tokens": Optional[list[int]],
}
"""Fields that say which layers are adapted, at which rank and scale, and from where on; their types."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",  # where it comes from
        "lora_dropout",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",  # of training and of its start
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",  # nothing by themselves on the layers that are adapted
    }
)
"""Fields whose values change nothing in what the adapter computes."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION", None),  # the others add a head
    "bias": ("none",),
    # Of the others PEFT changes the base model's weights as it loads the adapter, or the adapter was fitted on changed
    # ones.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}
"""Fields of which only these values give plain LoRA."""

_OFF = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
)
"""Fields that make something else of LoRA, or adapt something else than linear layers: they must be null, false or
empty."""

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_MATCHING_SECONDS = 1.0  # for all names of the model; a regular expression can be made to take for ever


@dataclass(frozen=True)
class PeftConfig:
    """A configuration that can be applied; ``read_config`` makes it. Names of modules are paths in the model of
    Transformers."""

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str]
    use_rslora: bool | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    alora_invocation_tokens: Sequence[int] | None = None

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that activate it; none for ordinary LoRA."""
        return tuple(self.alora_invocation_tokens or ())

    @property
    def is_all_linear(self) -> bool:
        """Every linear layer but the head; which those are is the model's to say."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def targets(self, paths: Sequence[str]) -> list[str]:
        """Those of the modules that the adapter acts on.

        Raises:
            ConfigError: a regular expression is none, or takes too long.
        """
        match = _Matcher()
        return [path for path in paths if not self._excludes(path, match) and self._includes(path, match)]

    def ranks_and_scales(self, paths: Sequence[str]) -> list[tuple[int, float]]:
        """Rank of each module, and what B A x is multiplied with; raises what ``targets`` does."""
        match = _Matcher()
        found = []
        for path in paths:
            r = self._by_pattern("rank_pattern", self.r, path, match)
            alpha = self._by_pattern("alpha_pattern", self.lora_alpha, path, match)
            found.append((r, alpha / (math.sqrt(r) if self.use_rslora else r)))
        return found

    def _excludes(self, path: str, match: "_Matcher") -> bool:
        if not self.exclude_modules:
            return False
        if isinstance(self.exclude_modules, str):
            return match("exclude_modules", self.exclude_modules, path, regex.fullmatch) is not None
        return _ends_with(path, self.exclude_modules)

    def _includes(self, path: str, match: "_Matcher") -> bool:
        if isinstance(self.target_modules, str):
            return self.is_all_linear or match("target_modules", self.target_modules, path, regex.fullmatch) is not None
        if path in self.target_modules:
            return True
        return _ends_with(path, self.target_modules) and self._is_in_layers(path, match)

    def _is_in_layers(self, path: str, match: "_Matcher") -> bool:
        """By the first number in the path, or the one behind a name in ``layers_pattern``."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        forms = (
            [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns if pattern]
            if patterns
            else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        )
        found = next(filter(None, (match("layers_pattern", form, path, regex.match) for form in forms)), None)
        return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)

    def _by_pattern(self, name: str, default: float, path: str, match: "_Matcher") -> Any:
        """The value of the first key that is the end of the path, or matches one."""
        patterns = getattr(self, name) or {}
        keys = (key for key in patterns if match(name, rf"(.*\.)?({key})$", path, regex.match) is not None)
        return patterns.get(next(keys, path), default)


class _Matcher:
    """Regular expressions of one configuration, which have ``_MATCHING_SECONDS`` in all."""

    def __init__(self):
        self._deadline = time.monotonic() + _MATCHING_SECONDS

    def __call__(self, field: str, pattern: str, path: str, how: Callable) -> regex.Match | None:
        try:
            return how(pattern, path, timeout=max(1e-3, self._deadline - time.monotonic()))
        except TimeoutError:
            raise ConfigError(
                field,
                pattern,
                f"a regular expression that is done with the model's names within {_MATCHING_SECONDS:g} s",
            ) from None
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise ConfigError(field, pattern, f"a regular expression ({error})") from error


def read_config(fields: object) -> PeftConfig:
    """Check what adapter_config.json holds.

    A field that PEFT 0.21 does not know is refused unless it is null, false, 0 or empty: a later PEFT, or another
    program, may mean something by it that would be left out here without a word.

    Raises:
        ConfigError: naming the first field at fault.
    """
    if not isinstance(fields, dict):
        raise ConfigError("adapter_config.json", fields, "a JSON object")
    for name in _REQUIRED:
        if name not in fields:
            raise ConfigError(name, None, "given in adapter_config.json, as PEFT writes it")
    for name, value in fields.items():
        if name in _APPLIED:
            _require(
                name,
                value,
                fits(value, _APPLIED[name]),
                "an object" if _APPLIED[name] == Optional[dict] else described(_APPLIED[name]),
            )
        elif name in _CHOICES:
            known = any(value == choice and type(value) is type(choice) for choice in _CHOICES[name])
            _require(
                name,
                value,
                known,
                "one of " + ", ".join("null" if choice is None else str(choice) for choice in _CHOICES[name]),
            )
        elif name in _OFF:
            _require(name, value, not value, "null, false or empty: only plain LoRA of linear layers is applied")
        elif name not in _WITHOUT_EFFECT:
            _require(str(name)[:100], value, not value, "null, false or empty, as PEFT 0.21 does not know the field")
    config = PeftConfig(**{name: fields[name] for name in _APPLIED if name in fields})
    _check(config, fields.get("task_type"))
    return config


_MOST_RANK = 1 << 16  # far above the width of any layer


def _is_finite(value: float) -> bool:
    """Of a whole number too, which may be larger than any number that is not whole."""
    return abs(value) <= sys.float_info.max


def _check(config: PeftConfig, task_type: str | None) -> None:
    _require("r", config.r, 1 <= config.r <= _MOST_RANK, f"from 1 to {_MOST_RANK}")
    _require("lora_alpha", config.lora_alpha, _is_finite(config.lora_alpha), "a finite number")
    _require("target_modules", config.target_modules, bool(config.target_modules), "at least one module")
    for name, value in (config.rank_pattern or {}).items():
        _require(
            f"rank_pattern.{str(name)[:100]}",
            value,
            fits(value, int) and 1 <= value <= _MOST_RANK,
            f"from 1 to {_MOST_RANK}",
        )
    for name, value in (config.alpha_pattern or {}).items():
        _require(f"alpha_pattern.{str(name)[:100]}", value, fits(value, float) and _is_finite(value), "a finite number")
    for name in ("layers_to_transform", "layers_pattern"):
        _require(
            name,
            getattr(config, name),
            getattr(config, name) is None or isinstance(config.target_modules, list),
            "null beside target_modules that are a string",
        )
    _require(
        "layers_pattern",
        config.layers_pattern,
        not config.layers_pattern or config.layers_to_transform is not None,
        "null without layers_to_transform",
    )
    tokens = config.alora_invocation_tokens
    _require(
        "alora_invocation_tokens",
        tokens,
        tokens is None or (len(tokens) > 0 and min(tokens) >= 0),
        "at least one token id, or null",
    )
    _require(
        "task_type", task_type, tokens is None or task_type == "CAUSAL_LM", "CAUSAL_LM beside alora_invocation_tokens"
    )


def _require(name: str, value: object, condition: bool, allowed: str) -> None:
    if not condition:
        raise ConfigError(name, value, allowed)


def _ends_with(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
