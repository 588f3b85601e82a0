"""The adapter's files against PEFT, and what is left of them when the disk is full."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import oracle
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec, Site
from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.errors import ConfigError
from tiny import file_size_limit, small_disk

FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "SHA256SUMS"}
SITES = [Site("model.layers.0.self_attn.q_proj", 64, 96), Site("model.layers.1.mlp.up_proj", 96, 32)]


def spec(r: int = 4, invocation: tuple[int, ...] = ()) -> AdapterSpec:
    return AdapterSpec("base-model", r, 12, ("q_proj", "up_proj"), invocation)


def random_adapter(r: int = 4, seed: int = 0, sites: list[Site] = SITES) -> Adapter:
    adapter = Adapter(spec(r), sites)
    adapter.theta.normal_(generator=torch.Generator().manual_seed(seed))
    return adapter


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_theta_holds_a_then_b_of_every_site_in_order():
    adapter = Adapter(spec(r=2), [Site("x", 3, 5), Site("y", 4, 1)])
    adapter.theta.copy_(torch.arange(adapter.numel))
    assert adapter.numel == 2 * (3 + 5) + 2 * (4 + 1)
    (x, a_x, b_x), (y, a_y, b_y) = adapter.matrices()
    assert (x.path, y.path) == ("x", "y")
    assert (a_x.shape, b_x.shape, a_y.shape, b_y.shape) == ((2, 3), (5, 2), (2, 4), (1, 2))
    assert torch.cat([m.flatten() for m in (a_x, b_x, a_y, b_y)]).equal(adapter.theta)
    b_y.zero_()  # views, not copies
    assert adapter.theta[-2:].eq(0).all() and adapter.theta[-3] != 0


def test_start_is_that_of_peft_with_numbers_of_our_own():
    sites = [Site("model.layers.0.self_attn.q_proj", 4096, 96), SITES[1]]
    adapter = Adapter.initial(spec(r=8), sites, seed=5)
    for site, a, b in adapter.matrices():
        assert b.eq(0).all()
        assert a.abs().max() <= 1 / math.sqrt(site.in_features)
    (_, a, _), (_, other, _) = adapter.matrices()
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(8, 4096), a=math.sqrt(5))
    assert a.std() == pytest.approx(theirs.std().item(), rel=0.03)
    both = torch.stack([a.flatten()[: other.numel()], other.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 5 / math.sqrt(other.numel())  # no shared stream
    assert Adapter.initial(spec(r=8), sites, seed=5).theta.equal(adapter.theta)
    assert not Adapter.initial(spec(r=8), sites, seed=6).theta.equal(adapter.theta)


# --- files ------------------------------------------------------------------------------------------------------------


def sites_of(model: torch.nn.Module, targets: tuple[str, ...]) -> list[Site]:
    return [
        Site(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets
    ]


@pytest.mark.parametrize("invocation", [(), oracle.INVOCATION], ids=["lora", "alora"])
@pytest.mark.parametrize("kind", ["opt-125m", "llama"])
def test_peft_loads_the_files_with_equal_weights(tmp_path, kind, invocation):
    path, targets = oracle.save_model(kind, tmp_path / "model"), oracle.TARGETS[kind]
    base = AutoModelForCausalLM.from_pretrained(path)
    adapter = Adapter(AdapterSpec(path, 4, 12, targets, invocation), sites_of(base, targets))
    adapter.theta.normal_(generator=torch.Generator().manual_seed(0))
    adapter.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == adapter.state_dict().keys()
    for name, tensor in adapter.state_dict().items():
        assert loaded[name].equal(tensor), name
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 12, set(targets))
    assert (config.alora_invocation_tokens or []) == list(invocation)
    layer = model.get_submodule(f"base_model.model.{adapter.sites[0].path}")
    assert layer.scaling["default"] == 3.0


def test_config_file_has_the_fields_that_peft_and_sglang_read(tmp_path):
    Adapter(spec(invocation=(7, 8)), SITES).save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == FILES
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base-model",
        "bias": "none",
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "alora_invocation_tokens": [7, 8],
    }
    assert {name: config[name] for name in expected} == expected
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]


def test_an_ordinary_adapter_has_no_invocation_in_its_config(tmp_path):
    Adapter(spec(), SITES).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["alora_invocation_tokens"] is None


def test_weights_come_back_bit_for_bit(tmp_path):
    saved, loaded = random_adapter(), Adapter(spec(), SITES)
    saved.save_pretrained(tmp_path / "adapter")
    loaded.load_weights(tmp_path / "adapter")
    assert loaded.theta.equal(saved.theta)


def test_an_adapter_that_peft_saved_can_be_loaded(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(oracle.save_model("llama", tmp_path / "model"))
    sites = sites_of(base, ("q_proj", "up_proj"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(spec(), sites)
    adapter.load_weights(tmp_path / "adapter")
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert all(theirs[name].equal(tensor) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [Adapter(spec(r=2), SITES), Adapter(spec(), SITES[:1]), Adapter(spec(), [*SITES, Site("model.lm_head", 4, 4)])],
    ids=["other rank", "fewer sites", "more sites"],
)
def test_weights_of_another_shape_are_refused_and_change_nothing(tmp_path, other):
    other.save_pretrained(tmp_path / "adapter")
    adapter = random_adapter()
    before = adapter.theta.clone()
    with pytest.raises(ConfigError, match="matrices of rank 4 on"):
        adapter.load_weights(tmp_path / "adapter")
    assert adapter.theta.equal(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_and_change_nothing(tmp_path, value):
    stored, adapter = random_adapter(), random_adapter(seed=1)
    stored.theta[-3] = value
    stored.save_pretrained(tmp_path / "adapter")
    before = adapter.theta.clone()
    with pytest.raises(ConfigError, match="finite numbers, and .*lora_B.weight has others"):
        adapter.load_weights(tmp_path / "adapter")
    assert adapter.theta.equal(before)


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    random_adapter(seed=0).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "stray").touch()
    random_adapter(seed=1).save_pretrained(tmp_path / "adapter")
    assert os.listdir(tmp_path) == ["adapter"]
    assert set(os.listdir(tmp_path / "adapter")) == FILES
    assert_holds(tmp_path / "adapter", random_adapter(seed=1))


def test_others_may_read_a_saved_folder(tmp_path):
    random_adapter().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o755


# --- full disks -------------------------------------------------------------------------------------------------------


def assert_holds(folder: Path, expected: Adapter) -> None:
    loaded = Adapter(expected.spec, expected.sites)
    loaded.load_weights(folder)
    assert loaded.theta.equal(expected.theta)


@pytest.mark.parametrize(
    "room", [0, 100, 4096], ids=["no byte fits", "part of the header fits", "part of the weights fits"]
)
def test_a_write_that_fails_leaves_the_older_folder_and_nothing_else(tmp_path, room):
    old = random_adapter(seed=0)
    old.save_pretrained(tmp_path / "adapter")
    with file_size_limit(room), pytest.raises(OSError):
        random_adapter(seed=1).save_pretrained(tmp_path / "adapter")
    assert os.listdir(tmp_path) == ["adapter"]
    assert_holds(tmp_path / "adapter", old)


def test_a_first_write_that_fails_leaves_no_folder(tmp_path):
    with file_size_limit(4096), pytest.raises(OSError):
        random_adapter().save_pretrained(tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def save_until_full(folder: Path) -> tuple[str, list[str]]:
    """On a disk of 64 KiB: a small adapter fits, a large one does not."""
    small = random_adapter(r=4)
    small.save_pretrained(folder / "adapter")
    try:
        random_adapter(r=100).save_pretrained(folder / "adapter")
    except OSError as error:
        assert_holds(folder / "adapter", small)
        return os.strerror(error.errno), os.listdir(folder)
    raise AssertionError("the disk did not fill")


def test_a_full_disk_leaves_the_older_folder_and_nothing_else(tmp_path):
    with small_disk(tmp_path, "64k") as child:
        if child is None:
            pytest.skip("this kernel lets nobody mount a small file system")
        message, left = child.submit(save_until_full, tmp_path).result()
    assert message == "No space left on device"
    assert left == ["adapter"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_is_removed(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "deep" / "folder") as partial:
        (partial / "file").touch()
        raise error
    assert os.listdir(tmp_path / "deep") == []
