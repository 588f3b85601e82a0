"""Upstream's models of the families that can be trained, where they compute something else than Transformers."""

from sglang.srt.mezo.plugin.hooks import Hook


def _before_gemma2(model, config, *args, **kwargs) -> None:
    """Transformers no longer has this second name of the activation, and upstream reads it."""
    if not hasattr(config, "hidden_act"):
        config.hidden_act = config.hidden_activation


def _after_gemma(result: None, model, config, *args, **kwargs) -> None:
    """Upstream has the exact GELU, whatever the configuration says."""
    from sglang.srt.layers.activation import GeluAndMul

    if config.hidden_act == "gelu_pytorch_tanh":
        for layer in model.model.layers:
            layer.mlp.act_fn = GeluAndMul("tanh")


def _after_cohere_attention(result: None, attention, *args, **kwargs) -> None:
    """A window of so many tokens has the query's own among them; upstream counts those before it, for this model one
    too many."""
    if attention.sliding_window_size > 0:
        attention.attn.sliding_window_size = attention.sliding_window_size - 1


def _before_partial_rotation(model, config, *args, **kwargs) -> None:
    """Upstream looks for the share of a head that is rotated where Transformers no longer has it."""
    config.partial_rotary_factor = config.rope_parameters.get(
        "partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)
    )


HOOKS = (
    Hook(
        "sglang.srt.models.gemma",
        "GemmaForCausalLM.__init__",
        "after",
        _after_gemma,
        "the activation that hidden_act names",
    ),
    Hook(
        "sglang.srt.models.gemma2",
        "Gemma2ForCausalLM.__init__",
        "before",
        _before_gemma2,
        "a name that Transformers' configuration lacks",
    ),
    Hook(
        "sglang.srt.models.llama",
        "Phi3ForCausalLM.__init__",
        "before",
        _before_partial_rotation,
        "the share of a head that is rotated",
    ),
    Hook(
        "sglang.srt.models.stablelm",
        "StableLmForCausalLM.__init__",
        "before",
        _before_partial_rotation,
        "the share of a head that is rotated",
    ),
    Hook(
        "sglang.srt.models.commandr",
        "CohereAttention.__init__",
        "after",
        _after_cohere_attention,
        "a sliding window is not one token too long",
    ),
)
