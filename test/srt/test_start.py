"""Runs that go on from an adapter, before there is an engine."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import oracle
from foreign_adapters import APPLIED, edit, saved
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.adapters.foreign import AdaptedModel
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.training.finetune import adapted_model
from sglang.srt.mezo.training.start import read_start, settled
from tiny import tiny_tokenizer

CONFIG = oracle.CONFIGS["llama"]
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted_model("base", CONFIG)


WHOLE = [
    name
    for name, settings in APPLIED.items()
    if not settings.keys() & {"layers_to_transform", "exclude_modules"}
    and "full" not in name
    and "below" not in name
    and not isinstance(settings.get("target_modules"), str)
]


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_begins_with_what_peft_makes_of_the_folder(base, model, tmp_path, name):
    """The adapter that is trained has one rank and one scale, and is the same function."""
    folder = saved(base, tmp_path / "adapter", **APPLIED[name])
    config = MezoConfig(init_from=str(folder))
    origin = read_start(config, model)
    config = settled(config, origin, TOKENIZER)
    spec = AdapterSpec("base", config.r, config.lora_alpha, tuple(config.target_modules), origin.invocation)
    sites = [site for site in model.layers.sites.values() if site.name in config.target_modules]
    Adapter.holding(spec, sites, origin.matrices).save_pretrained(tmp_path / "initial")
    ids = torch.tensor([[5, 6, 9, *oracle.INVOCATION, 11, 12]])
    with torch.no_grad():
        ours, theirs = (
            PeftModel.from_pretrained(copy.deepcopy(base), path)(input_ids=ids).logits
            for path in (tmp_path / "initial", folder)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert config.tuning == ("alora" if "activated" in name else "lora")


@pytest.mark.parametrize("name", ["one layer", "modules left out", "names in full", "an expression"])
def test_an_adapter_of_some_layers_is_refused(base, model, tmp_path, name):
    folder = saved(base, tmp_path / "adapter", **APPLIED[name])
    with pytest.raises(ConfigError, match="in all layers, and it has nothing for model.layers") as caught:
        read_start(MezoConfig(init_from=str(folder)), model)
    assert caught.value.field == "init_from"


def test_a_scale_below_zero_is_not_trained_further(base, model, tmp_path):
    folder = saved(base, tmp_path / "adapter", lora_alpha=-3)
    config = MezoConfig(init_from=str(folder))
    with pytest.raises(ConfigError, match="lora_alpha=-3.* is not allowed: a positive number"):
        settled(config, read_start(config, model), None)


def test_a_folder_that_is_no_adapter_is_named(model, tmp_path, base):
    with pytest.raises(
        ConfigError,
        match="^init_from='/nowhere' is not allowed: an adapter of this model: a folder with adapter_config",
    ):
        read_start(MezoConfig(init_from="/nowhere"), model)
    folder = edit(saved(base, tmp_path / "adapter"), use_dora=True)
    with pytest.raises(ConfigError, match="use_dora=True"):
        read_start(MezoConfig(init_from=str(folder)), model)


ORIGIN = SimpleNamespace(
    r=4,
    lora_alpha=6.0,
    target_modules=["q_proj", "v_proj"],
    invocation=tuple(TOKENIZER(" it was", add_special_tokens=False).input_ids),
)


def test_what_is_left_open_is_the_adapters():
    config = settled(MezoConfig(init_from="x"), ORIGIN, TOKENIZER)
    assert (config.r, config.lora_alpha, config.target_modules, config.tuning, config.invocation) == (
        4,
        6.0,
        ["q_proj", "v_proj"],
        "alora",
        " it was",
    )
    same = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"], "tuning": "alora"}
    for invocation in (" it was", "auto", list(ORIGIN.invocation)):
        assert settled(MezoConfig(init_from="x", invocation=invocation, **same), ORIGIN, TOKENIZER) == config
    assert settled(MezoConfig(), None, TOKENIZER) == MezoConfig()
    assert (MezoConfig().r, MezoConfig().lora_alpha, MezoConfig().tuning) == (8, 16, "alora")


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        ({"r": 8}, "r", "4, as the adapter"),
        ({"lora_alpha": 16}, "lora_alpha", "6.0, as the adapter"),
        ({"target_modules": ["q_proj"]}, "target_modules", "['q_proj', 'v_proj'], as the adapter"),
        ({"tuning": "lora"}, "tuning", "'alora', as the adapter"),
        ({"invocation": " no"}, "invocation", "' it was', as the adapter"),
        ({"invocation": [1]}, "invocation", "' it was', as the adapter"),
    ],
)
def test_what_contradicts_the_adapter_is_named(given, field, allowed):
    with pytest.raises(ConfigError) as caught:
        settled(MezoConfig(init_from="x", **given), ORIGIN, TOKENIZER)
    assert caught.value.field == field and caught.value.allowed.startswith(allowed)


def test_ordinary_lora_takes_no_invocation_of_an_adapter_without():
    plain = SimpleNamespace(r=4, lora_alpha=6.0, target_modules=["q_proj"], invocation=())
    assert settled(MezoConfig(init_from="x"), plain, TOKENIZER).invocation is None
    with pytest.raises(ConfigError, match="invocation=' it was' is not allowed: None, as the adapter"):
        settled(MezoConfig(init_from="x", invocation=" it was"), plain, TOKENIZER)
