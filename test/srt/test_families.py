"""Model families: the table against Transformers' own modules, and models that cannot be trained."""

from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

import tiny_models
from sglang.srt.mezo.adapters.families import FAMILIES, family_of, model_modules, require_generating, require_modules
from sglang.srt.mezo.core.errors import ConfigError


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_table_names_what_transformers_has(architecture):
    family = FAMILIES[architecture]
    names = {site.name for site in model_modules(tiny_models.config(architecture))}
    assert set(family.modules) <= names
    assert names - set(family.modules) <= {"c_fc", "c_proj", "dense"}, "all but what SGLang's pool has no room for"
    assert set(family.reads) <= set(family.attention)


def test_modules_have_the_checkpoints_own_names_and_shapes():
    sites = model_modules(tiny_models.config("Phi3ForCausalLM"))
    assert [tuple(site) for site in sites if ".1." in site.path] == [
        ("model.layers.1.self_attn.o_proj", 64, 64),
        ("model.layers.1.self_attn.qkv_proj", 64, 128),
        ("model.layers.1.mlp.gate_up_proj", 64, 192),
        ("model.layers.1.mlp.down_proj", 96, 64),
    ]


def test_code_that_comes_with_a_checkpoint_is_not_needed():
    """With ``trust_remote_code`` the configuration of many a Phi-3 is of a class of its own."""

    class Phi3Config(transformers.Phi3Config):
        pass

    own = tiny_models.config("Phi3ForCausalLM")
    foreign = Phi3Config(**own.to_dict(), auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    assert model_modules(foreign) == model_modules(own)


UNSUPPORTED = {
    "GPT2LMHeadModel": "GPT2Config",
    "GPTNeoXForCausalLM": "GPTNeoXConfig",
    "FalconForCausalLM": "FalconConfig",
    "BloomForCausalLM": "BloomConfig",
    "MambaForCausalLM": "MambaConfig",
    "BertLMHeadModel": "BertConfig",
    "RobertaForCausalLM": "RobertaConfig",
    "DeepseekV3ForCausalLM": "DeepseekV3Config",
    "Gemma3ForConditionalGeneration": "Gemma3Config",
    "LlavaForConditionalGeneration": "LlavaConfig",
    "T5ForConditionalGeneration": "T5Config",
}


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_other_models_are_refused_in_one_line(architecture, tmp_path):
    config = getattr(transformers, UNSUPPORTED[architecture])()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        family_of(AutoConfig.from_pretrained(tmp_path))
    message = str(refusal.value)
    assert architecture in message and "\n" not in message
    assert all(family.name in message for family in FAMILIES.values())
    config.architectures = None
    with pytest.raises(ConfigError, match=config.model_type):
        family_of(config)


@pytest.mark.parametrize("field", ["is_decoder", "tie_word_embeddings", "hidden_act"])
def test_an_encoder_that_is_another_is_refused(field):
    config = tiny_models.config("RobertaForMaskedLM")
    setattr(config, field, {"is_decoder": True, "tie_word_embeddings": False, "hidden_act": "relu"}[field])
    with pytest.raises(ConfigError, match=field):
        family_of(config)


def test_a_server_that_trains_refuses_an_encoder():
    require_generating(tiny_models.config("OPTForCausalLM"))
    with pytest.raises(ConfigError, match="'RobertaForMaskedLM' is not allowed: a model that generates text"):
        require_generating(tiny_models.config("RobertaForMaskedLM"))


def test_a_classifier_of_a_supported_family_is_refused():
    config = tiny_models.config("LlamaForCausalLM")
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification"):
        family_of(config)


@pytest.mark.parametrize(
    ("architecture", "targets", "wrong"),
    [
        ("Phi3ForCausalLM", ["q_proj", "o_proj"], "q_proj"),
        ("MixtralForCausalLM", ["q_proj", "gate_proj"], "gate_proj"),
        ("OPTForCausalLM", ["q_proj", "o_proj"], "o_proj"),
        ("Starcoder2ForCausalLM", ["c_fc"], "c_fc"),
        ("RobertaForMaskedLM", ["query", "dense"], "dense"),
    ],
)
def test_modules_that_a_family_lacks_are_named(architecture, targets, wrong):
    with pytest.raises(ConfigError) as refusal:
        require_modules(FAMILIES[architecture], targets)
    assert f"['{wrong}']" in str(refusal.value) and ", ".join(FAMILIES[architecture].modules) in str(refusal.value)


def test_the_page_lists_every_family():
    """``python benchmarks/families.py`` writes the table."""
    rows = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    for architecture, family in FAMILIES.items():
        assert any(
            row.startswith(f"| {family.name} | `{architecture}` | {', '.join(family.modules)} |") for row in rows
        ), family.name
