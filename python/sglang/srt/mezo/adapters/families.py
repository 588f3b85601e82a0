"""Model families that can be trained, and the linear layers of a checkpoint as Transformers names and shapes them.

Both come from the checkpoint's configuration alone: an engine may fuse layers, or widen them for its parallel ranks,
but an adapter's files are for the checkpoint.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.adapters.adapter import Site
from sglang.srt.mezo.adapters.architectures import architecture_of, auto_class, is_masked
from sglang.srt.mezo.adapters.weights import Parameter
from sglang.srt.mezo.core.config import Tuning
from sglang.srt.mezo.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


_GATED = ("gate_proj", "up_proj", "down_proj")
_GATED_IN_ONE = ("gate_up_proj", "down_proj")
_SILU = {"hidden_act": ("silu",)}
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
_ENCODER: dict[str, Any] = {
    # The others are all called "dense".
    "attention": ("query", "key", "value"),
    "mlp": (),
    "reads": ("query", "value"),
    "takes": {"hidden_act": ("gelu",), "tie_word_embeddings": (True,), "is_decoder": (False,)},
}


@dataclass(frozen=True)
class Family:
    """Names of linear layers as Transformers has them.

    Attributes:
        name: of the family, as people call it.
        attention: the layers of its attention.
        mlp: the layers beside it that SGLang's LoRA pool has room for.
        reads: those that ordinary LoRA adapts by default, as MeZO and PEFT do.
        takes: values of the configuration's fields without which SGLang does not load the model.
    """

    name: str
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = _GATED
    reads: tuple[str, ...] = ("q_proj", "v_proj")
    takes: Mapping[str, tuple] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """What ``target_modules`` may name."""
        return self.attention + self.mlp

    def default_targets(self, tuning: Tuning, adaptable: Collection[str] | None = None) -> tuple[str, ...]:
        """``target_modules`` where nobody names any.

        Args:
            adaptable: what an engine has room for, which is anything by default; all of it where none of the usual
                ones is there.
        """
        usual = self.attention if tuning == "alora" else self.reads
        if adaptable is None:
            return usual
        return tuple(name for name in usual if name in adaptable) or tuple(adaptable)


FAMILIES = {
    "BertForMaskedLM": Family("BERT", **_ENCODER),
    "CohereForCausalLM": Family("Cohere"),
    "Cohere2ForCausalLM": Family("Cohere 2"),
    "GemmaForCausalLM": Family("Gemma"),
    "Gemma2ForCausalLM": Family("Gemma 2", takes=_GELU),
    "Gemma3ForCausalLM": Family("Gemma 3 (text)", takes={**_GELU, "use_bidirectional_attention": (False, None)}),
    "Glm4ForCausalLM": Family("GLM-4", mlp=_GATED_IN_ONE, takes=_SILU),
    "GraniteForCausalLM": Family("Granite", takes=_SILU),
    "LlamaForCausalLM": Family("Llama", takes=_SILU),
    "MistralForCausalLM": Family("Mistral", takes=_SILU),
    "MixtralForCausalLM": Family("Mixtral (attention)", mlp=()),
    "Olmo2ForCausalLM": Family("OLMo 2"),
    "OPTForCausalLM": Family("OPT", attention=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=("fc1", "fc2")),
    "Phi3ForCausalLM": Family(
        "Phi-3", attention=("qkv_proj", "o_proj"), mlp=_GATED_IN_ONE, reads=("qkv_proj",), takes=_SILU
    ),
    "Qwen2ForCausalLM": Family("Qwen2", takes=_SILU),
    "Qwen3ForCausalLM": Family("Qwen3", takes=_SILU),
    "Qwen3MoeForCausalLM": Family("Qwen3-MoE (attention)", mlp=()),
    "RobertaForMaskedLM": Family("RoBERTa", **_ENCODER),
    "StableLmForCausalLM": Family("StableLM", takes={"qk_layernorm": (False,)}),
    "Starcoder2ForCausalLM": Family("StarCoder2 (attention)", mlp=()),
    "XLMRobertaForMaskedLM": Family("XLM-RoBERTa", **_ENCODER),
}
"""By the architecture that a checkpoint's configuration names. ``test_families.py`` holds each against Transformers
and PEFT."""

_NO_LONG_ROPE = ("Qwen3MoeForCausalLM",)
_HEADS_FILL_HIDDEN = ("Cohere2ForCausalLM", "MixtralForCausalLM")


def family_of(config: "PretrainedConfig") -> Family:
    """The family of a model.

    Raises:
        ConfigError: it is not one that can be trained, or has a field that SGLang's model of it does not take.
    """
    architecture = architecture_of(config)
    if architecture not in FAMILIES:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ConfigError("architectures", architecture, f"the families that can be trained are {known}")
    family = FAMILIES[architecture]
    for name, values in family.takes.items():
        if getattr(config, name, values[0]) not in values:
            raise ConfigError(
                name, getattr(config, name), f"SGLang loads {architecture} with {' or '.join(map(repr, values))}"
            )
    heads = config.hidden_size // config.num_attention_heads
    if architecture in _HEADS_FILL_HIDDEN and getattr(config, "head_dim", None) not in (None, heads):
        raise ConfigError(
            "head_dim", config.head_dim, f"SGLang loads {architecture} with hidden_size / num_attention_heads, {heads}"
        )
    if architecture in _NO_LONG_ROPE and any(
        parameters.get("rope_type") == "longrope" for parameters in rope_parameters(config)
    ):
        raise ConfigError("rope_type", "longrope", f"SGLang runs {architecture} with any other")
    return family


def rope_parameters(config: "PretrainedConfig") -> list[dict[str, Any]]:
    """Of each kind of layer that has positions of its own, or the one of all."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    return kinds or [parameters]


def require_tuning(config: "PretrainedConfig", tuning: Tuning) -> None:
    """Raise ConfigError for a way of tuning that a model cannot have."""
    if tuning == "alora" and is_masked(config):
        raise ConfigError(
            "tuning",
            tuning,
            f"lora, full or prefix for {architecture_of(config)}, whose tokens attend to what follows them: no part of "
            "a prompt stays what the base model makes of it",
        )


def require_generating(config: "PretrainedConfig") -> None:
    """Raise ConfigError for a model that no server serves, and none trains."""
    if is_masked(config):
        raise ConfigError(
            "architectures",
            architecture_of(config),
            "a model that generates text; masked language models are trained offline, by sglang-mezo train",
        )


def require_modules(family: Family, target_modules: Iterable[str]) -> None:
    """Raise ConfigError where ``target_modules`` names a layer that the family does not have, or that cannot be
    adapted."""
    unknown = sorted(set(target_modules) - set(family.modules))
    if unknown:
        raise ConfigError("target_modules", unknown, f"{family.name} has {', '.join(family.modules)}")


def model_modules(config: "PretrainedConfig") -> tuple[Site, ...]:
    """The linear layers of every transformer block, in the order of the model; the head is none of them."""
    import torch

    model = _without_weights(config)
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return tuple(
        Site(path, module.in_features, module.out_features)
        for path, module in linear
        if any(part.isdigit() for part in path.split("."))
    )


def model_parameters(config: "PretrainedConfig") -> tuple[Parameter, ...]:
    """Every parameter, in the order of the model; one that is used twice comes once."""
    return tuple(Parameter(name, tuple(one.shape)) for name, one in _without_weights(config).named_parameters())


def _without_weights(config: "PretrainedConfig") -> "torch.nn.Module":
    """Transformers' model."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    known = MODEL_FOR_MASKED_LM_MAPPING if is_masked(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:  # of code that came with the checkpoint
        config = AutoConfig.for_model(**{name: value for name, value in config.to_dict().items() if name != "auto_map"})
    with torch.device("meta"):
        return auto_class(config).from_config(config, attn_implementation="eager")
