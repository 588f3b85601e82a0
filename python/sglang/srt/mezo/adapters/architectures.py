"""What kind of model a checkpoint's configuration names: it goes on with a text, or fills in what is masked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BEHIND_PADDING = ("RobertaForMaskedLM", "XLMRobertaForMaskedLM")
"""Models whose first token has the position behind that of padding."""


def architecture_of(config: "PretrainedConfig") -> str:
    """The name of the model's class; that of its type where the configuration does not say."""
    return (config.architectures or [config.model_type])[0]


def is_masked(config: "PretrainedConfig") -> bool:
    """Whether it is a masked language model: every token attends to all of the text, and words are read at a mask."""
    return architecture_of(config).endswith("ForMaskedLM")


def auto_class(config: "PretrainedConfig") -> Any:
    """Transformers' class that makes such a model."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM


def task_type(config: "PretrainedConfig") -> str | None:
    """PEFT's, which for masked language models has none."""
    return None if is_masked(config) else "CAUSAL_LM"


def pipeline_tag(task_type: str | None) -> str:
    """The hub's word for what a model of PEFT's task type does."""
    return "text-generation" if task_type else "fill-mask"


def longest_text(config: "PretrainedConfig") -> int:
    """Tokens that the model has positions for."""
    positions = config.max_position_embeddings
    return positions - config.pad_token_id - 1 if architecture_of(config) in _BEHIND_PADDING else positions
