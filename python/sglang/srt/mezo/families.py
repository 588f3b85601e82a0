"""Model families that can be trained, and the linear layers of a checkpoint as Transformers names and shapes them.

Both come from the checkpoint's configuration alone: an engine may fuse layers, or widen them for its parallel ranks, but an adapter's
files are for the checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sglang.srt.mezo.adapter import Site
from sglang.srt.mezo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_GATED = ("gate_proj", "up_proj", "down_proj")
_GATED_IN_ONE = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """Names of linear layers as Transformers has them.

    Attributes:
        name: of the family, as people call it.
        attention: the layers of its attention.
        mlp: the layers beside it that SGLang's LoRA pool has room for.
        reads: those that ordinary LoRA adapts by default, as MeZO and PEFT do.
    """

    name: str
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = _GATED
    reads: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def modules(self) -> tuple[str, ...]:
        """What ``target_modules`` may name."""
        return self.attention + self.mlp

    def default_targets(self, tuning: Literal["alora", "lora"]) -> tuple[str, ...]:
        """``target_modules`` where nobody names any."""
        return self.attention if tuning == "alora" else self.reads


FAMILIES = {
    "CohereForCausalLM": Family("Cohere"),
    "Cohere2ForCausalLM": Family("Cohere 2"),
    "GemmaForCausalLM": Family("Gemma"),
    "Gemma2ForCausalLM": Family("Gemma 2"),
    "Gemma3ForCausalLM": Family("Gemma 3 (text)"),
    "Glm4ForCausalLM": Family("GLM-4", mlp=_GATED_IN_ONE),
    "GraniteForCausalLM": Family("Granite"),
    "LlamaForCausalLM": Family("Llama"),
    "MistralForCausalLM": Family("Mistral"),
    "MixtralForCausalLM": Family("Mixtral (attention)", mlp=()),
    "Olmo2ForCausalLM": Family("OLMo 2"),
    "OPTForCausalLM": Family("OPT", attention=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=("fc1", "fc2")),
    "Phi3ForCausalLM": Family("Phi-3", attention=("qkv_proj", "o_proj"), mlp=_GATED_IN_ONE, reads=("qkv_proj",)),
    "Qwen2ForCausalLM": Family("Qwen2"),
    "Qwen3ForCausalLM": Family("Qwen3"),
    "Qwen3MoeForCausalLM": Family("Qwen3-MoE (attention)", mlp=()),
    "StableLmForCausalLM": Family("StableLM"),
    "Starcoder2ForCausalLM": Family("StarCoder2 (attention)", mlp=()),
}
"""By the architecture that a checkpoint's configuration names. ``test_families.py`` holds each against Transformers and PEFT."""


def family_of(config: "PretrainedConfig") -> Family:
    """The family of a model.

    Raises:
        ConfigError: it is not one that can be trained.
    """
    architecture = (config.architectures or [config.model_type])[0]
    if architecture not in FAMILIES:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ConfigError("architectures", architecture, f"the families that can be trained are {known}")
    return FAMILIES[architecture]


def require_modules(family: Family, target_modules: Iterable[str]) -> None:
    """Raise ConfigError where ``target_modules`` names a layer that the family does not have, or that cannot be adapted."""
    unknown = sorted(set(target_modules) - set(family.modules))
    if unknown:
        raise ConfigError("target_modules", unknown, f"{family.name} has {', '.join(family.modules)}")


def model_modules(config: "PretrainedConfig") -> tuple[Site, ...]:
    """The linear layers of every transformer block, in the order of the model; the head is none of them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return tuple(
        Site(path, module.in_features, module.out_features) for path, module in linear if any(part.isdigit() for part in path.split("."))
    )
