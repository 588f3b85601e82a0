"""Fields of a checkpoint's configuration that SGLang's model of it does not heed: it computes something else than
Transformers then."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.adapters.architectures import architecture_of
from sglang.srt.mezo.adapters.families import rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NO_ROPE = ("default", "dynamic")  # "dynamic" is what it says only beyond the longest position
_ROPE = ("default", "linear", "yarn", "llama3", "longrope")
_COMPUTED: dict[str, dict[str, tuple]] = {
    "CohereForCausalLM": {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (True,),
        "rope_type": _ROPE,
    },
    "Cohere2ForCausalLM": {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (True,),
        "rope_type": _ROPE,
    },
    "GemmaForCausalLM": {
        "attention_bias": (False,),
        "hidden_act": ("gelu", "gelu_pytorch_tanh"),
        "tie_word_embeddings": (True,),
        "rope_type": _NO_ROPE,
    },
    "Gemma2ForCausalLM": {"tie_word_embeddings": (True,), "rope_type": _NO_ROPE},
    "Gemma3ForCausalLM": {"tie_word_embeddings": (True,)},
    "Glm4ForCausalLM": {"rope_type": _ROPE},
    "GraniteForCausalLM": {"attention_bias": (False,), "mlp_bias": (False,), "rope_type": _ROPE},
    "LlamaForCausalLM": {"mlp_bias": (False,), "rope_type": _ROPE},
    "MistralForCausalLM": {"rope_type": _ROPE},
    "MixtralForCausalLM": {"hidden_act": ("silu",), "tie_word_embeddings": (False,), "rope_type": _NO_ROPE},
    "Olmo2ForCausalLM": {"hidden_act": ("silu",), "rope_type": _ROPE},
    "Phi3ForCausalLM": {"rope_type": _ROPE},
    "Qwen2ForCausalLM": {"rope_type": _ROPE},
    "Qwen3ForCausalLM": {"rope_type": _ROPE},
    "Qwen3MoeForCausalLM": {
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
        "rope_type": _ROPE,
    },
    "StableLmForCausalLM": {
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "use_parallel_residual": (False,),
        "rope_type": _NO_ROPE,
    },
    "Starcoder2ForCausalLM": {"rope_type": _NO_ROPE},
}
"""By architecture: the values of a field that SGLang computes."""

_WITHOUT_WINDOWS = {
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Starcoder2ForCausalLM",
}


def differences(config: "PretrainedConfig", context_length: int | None = None) -> list[str]:
    """A sentence for every field that makes a difference, with its value.

    Args:
        config: of a family that can be trained.
        context_length: longest sequence that the engine takes; by default the model's.
    """
    architecture = architecture_of(config)
    longest = context_length or config.max_position_embeddings
    found = [
        f"{field}={value!r} is computed as {' or '.join(map(repr, computed))}"
        for field, computed in _COMPUTED.get(architecture, {}).items()
        for value in _values(config, field)
        if value not in computed
    ]
    found += _windows(config, architecture, longest)
    found += _long_rope(config, longest)
    found += _rope_scale(config, architecture)
    found += _gemma3(config) if architecture == "Gemma3ForCausalLM" else ()
    if architecture == "Gemma2ForCausalLM" and any(
        (kind == "sliding_attention") != (i % 2 == 0) for i, kind in enumerate(config.layer_types)
    ):
        found.append(
            f"layer_types={config.layer_types!r} is computed with every other layer a sliding one, the first among them"
        )
    return found


def _values(config: "PretrainedConfig", field: str) -> list[Any]:
    """The values of a field; of ``rope_type`` one for each kind of layer that has positions of its own."""
    if field == "rope_type":
        return sorted({parameters.get("rope_type", "default") for parameters in rope_parameters(config)})
    return [getattr(config, field)] if hasattr(config, field) else []


def _windows(config: "PretrainedConfig", architecture: str, longest: int) -> Iterator[str]:
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    if architecture in _WITHOUT_WINDOWS and slides and window is not None and window < longest:
        yield f"sliding_window={window} is computed as None: a token sees all {longest} before it"


def _long_rope(config: "PretrainedConfig", longest: int) -> Iterator[str]:
    for parameters in rope_parameters(config):
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if parameters.get("rope_type") == "longrope" and longest > original:
            yield (
                "rope_type='longrope' turns on the long factors for all sequences of a batch with one longer than "
                f"{original}; a context_length of {original} has none"
            )


def _rope_scale(config: "PretrainedConfig", architecture: str) -> Iterator[str]:
    """What rotated vectors are multiplied by. Gemma 3 has Transformers' own positions."""
    for parameters in rope_parameters(config) if architecture != "Gemma3ForCausalLM" else ():
        kind, given = parameters.get("rope_type"), parameters.get("attention_factor")
        if kind == "yarn" and given is not None:
            computed, reason = 0.1 * math.log(parameters["factor"]) + 1, "factor"
        elif kind == "longrope":
            original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            ratio = config.max_position_embeddings / original
            computed, reason = _long_scale(ratio, original), "max_position_embeddings"
            given = _long_scale(parameters.get("factor") or ratio, original) if given is None else given
            if (short := parameters.get("short_mscale")) is not None:
                computed, reason = short, "short_mscale"
        else:
            continue
        if not math.isclose(given, computed, rel_tol=1e-4):
            yield f"attention_factor={round(given, 4)!r} of {kind!r} is computed as {computed:.4f} from {reason}"


def _long_scale(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _gemma3(config: "PretrainedConfig") -> Iterator[str]:
    sliding, full = (config.rope_parameters.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
    if (kind := sliding.get("rope_type", "default")) not in _NO_ROPE:
        yield f"rope_type={kind!r} of sliding_attention is computed as 'default'"
    # Transformers (5.19) looks for it beside the kinds of layers, where it is not.
    if full.get("rope_type") == "yarn" and not full.get("truncate", True):
        yield f"truncate={full['truncate']!r} of full_attention is computed so, and Transformers takes it for True"
