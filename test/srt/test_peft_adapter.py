"""Adapters from outside: what PEFT makes of a folder is what we make of it, matrix by matrix, or it is refused with
its field."""

import copy
import dataclasses
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM

import oracle
from foreign_adapters import (
    APPLIED,
    ATTENTION,
    CONFIG,
    FILES,
    INVOCATION,
    QV,
    RAN,
    TENSORS,
    WEIGHTS,
    B,
    change_tensors,
    edit,
    saved,
)
from sglang.srt.mezo.adapters import peft_config
from sglang.srt.mezo.adapters.adapter import Site
from sglang.srt.mezo.adapters.peft_adapter import ModelLayers, fit_adapter, read_adapter
from sglang.srt.mezo.adapters.peft_config import read_config
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.integrity import SUMS, write_sums


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(oracle.CONFIGS["llama"]).eval()


def layers_of(model, max_rank=16, dtype=torch.float32) -> ModelLayers:
    sites = {
        path: Site(path, module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    adapted = {path for path in sites if path.rpartition(".")[2] in ATTENTION}
    return ModelLayers(sites, adapted, max_rank, dtype, model.config.vocab_size)


@pytest.fixture(scope="module")
def layers(base) -> ModelLayers:
    return layers_of(base)


def deltas_of_peft(base, folder: Path) -> dict[str, torch.Tensor]:
    """What each layer's weight changes by, as PEFT has it once it has loaded the folder."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight("default")
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def deltas(adapter) -> dict[str, torch.Tensor]:
    return {path: adapter.lora_alpha / adapter.r * b.float() @ a.float() for path, (a, b) in adapter.matrices.items()}


@pytest.mark.parametrize("name", APPLIED)
def test_every_matrix_is_what_peft_makes_of_it(base, layers, tmp_path, name):
    folder = saved(base, tmp_path / "adapter", **APPLIED[name])
    adapter = read_adapter(str(folder), layers)
    expected = deltas_of_peft(base, folder)
    torch.testing.assert_close(deltas(adapter), expected, atol=1e-6, rtol=1e-6)
    assert all(delta.abs().max() > 0.01 for delta in expected.values()), "nothing to see"
    assert adapter.invocation == tuple(APPLIED[name].get("alora_invocation_tokens", ()))
    assert (
        {a.shape[0] for a, _ in adapter.matrices.values()}
        == {b.shape[1] for _, b in adapter.matrices.values()}
        == {adapter.r}
    )


def test_the_shorthand_for_all_linear_layers_takes_what_the_file_has(base, layers, tmp_path):
    folder = edit(saved(base, tmp_path / "adapter"), target_modules="all-linear")
    ours, peft = deltas(read_adapter(str(folder), layers)), deltas_of_peft(base, folder)
    torch.testing.assert_close(ours, {path: peft[path] for path in ours}, atol=1e-6, rtol=1e-6)
    assert all((delta == 0).all() for path, delta in peft.items() if path not in ours) and len(ours) < len(peft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_numbers_and_pickled_files_are_read(base, layers, tmp_path, dtype):
    folder = saved(base, tmp_path / "adapter")
    change_tensors(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    expected = deltas_of_peft(base, folder)
    torch.testing.assert_close(deltas(read_adapter(str(folder), layers)), expected, atol=1e-6, rtol=1e-6)
    torch.save(safetensors.torch.load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(deltas(read_adapter(str(folder), layers)), expected, atol=1e-6, rtol=1e-6)


def test_what_is_brought_to_one_rank_and_scale_stays_as_it_is(base, layers, tmp_path):
    folder = saved(base, tmp_path / "adapter", **APPLIED["patterns, rank-stabilised"])
    first = read_adapter(str(folder), layers)
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": m
        for path, pair in first.matrices.items()
        for side, m in zip("AB", pair)
    }
    fields = {"peft_type": "LORA", "r": first.r, "lora_alpha": first.lora_alpha, "target_modules": first.target_modules}
    torch.testing.assert_close(deltas(fit_adapter(fields, tensors, layers)), deltas(first))


# --- fields -----------------------------------------------------------------------------------------------------------


def test_every_field_of_peft_is_applied_or_refused_or_known_to_have_no_effect():
    tables = [*peft_config._APPLIED, *peft_config._WITHOUT_EFFECT, *peft_config._CHOICES, *peft_config._OFF]
    assert sorted(tables) == sorted({field.name for field in dataclasses.fields(LoraConfig)})


PATHS = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
]
PATHS += ["model.decoder.layers.1.fc1", "transformer.h.2.attn.c_attn", "lm_head", "q_proj", "xq_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": targets, **more}
        for targets in (
            QV,
            ["q_proj"],
            ["self_attn.q_proj", "up_proj"],
            ["layers.1.self_attn.v_proj"],
            PATHS[:3],
            ["roj"],
        )
        for more in (
            {},
            {"exclude_modules": ["up_proj"]},
            {"exclude_modules": r".*\.1\..*"},
            {"exclude_modules": ""},
            {"layers_to_transform": 1},
            {"layers_to_transform": [0, 11]},
            {"layers_to_transform": []},
            {"layers_to_transform": [1], "layers_pattern": "layers"},
            {"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
            {"layers_to_transform": [1], "layers_pattern": r"ex.*s"},
            {"layers_to_transform": [1], "layers_pattern": []},
        )
    ]
    + [
        {"target_modules": expression}
        for expression in (r".*q_proj", r"q_proj", r".*\.(1|11)\.(?!mlp).*", "all", r".*\.self_attn\..*")
    ],
)
def test_modules_are_the_ones_that_peft_finds(settings):
    fields = {
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": None,
        **settings,
    }
    ours = read_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}).targets(PATHS)
    assert ours == [path for path in PATHS if check_target_module_exists(SimpleNamespace(**fields), path)]


OFF = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"],
    "bias": ["all", "lora_only", None],
}
OFF |= {
    "peft_type": ["IA3", "ALORA", "lora", None],
    "task_type": ["SEQ_CLS", "x", 5],
    "layer_replication": [[[0, 2], [1, 2]]],
}
OFF |= {name: [True] for name in ("use_dora", "lora_bias", "use_qalora")}
OFF |= {name: [["embed_tokens"]] for name in ("modules_to_save", "target_parameters")}
OFF |= {"trainable_token_indices": [[1, 2], {"embed_tokens": [1]}]}
OFF |= {
    name: [{"a": 1}]
    for name in ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_config")
}
WRONG = {
    **OFF,
    "r": [0, -1, 1.5, "4", True, None, 17, 10**17, 10**400, [4], ...],
    "lora_alpha": ["16", None, True, float("nan"), float("inf"), 10**400, [1], ...],
    "use_rslora": ["yes", 1],
    "target_modules": [None, [], "", 5, [5], ["nothing"], "nothing", "(", r".*_pro", {"q_proj": 1}, ...],
    "exclude_modules": [5, [5], "(", {"a": 1}],
    "layers_to_transform": ["1", [1.5], True, [None]],
    "layers_pattern": ["layers", 5, [5]],  # without layers_to_transform
    "rank_pattern": [[4], "q_proj"],
    "rank_pattern.q_proj": [0, 1.5, "4", None, True],
    "rank_pattern.(": [4],
    "alpha_pattern": [4],
    "alpha_pattern.q_proj": ["4", None, float("inf"), True],
    "alora_invocation_tokens": [[], 5, " It was", [1.0, 2.0], ["1"], [[1, 2]], [-1], [99999], {"a": 1}, [True]],
    "invocation_string": [" It was", 5, ["a"]],
    "use_something_new": [True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_that_cannot_be_applied_is_refused_by_name(base, layers, tmp_path_factory, field, value):
    folder = shutil.copytree(plain_folder(base, tmp_path_factory), tmp_path_factory.mktemp("edited") / "adapter")
    name, _, key = field.partition(".")
    edit(folder, **{name: {key: value} if key else value})
    with pytest.raises(ConfigError) as caught:
        read_adapter(str(folder), layers)
    assert caught.value.field in (field, name, "adapter_config.json")
    assert str(caught.value).startswith(f"{caught.value.field}=") and len(str(caught.value)) < 1000


@pytest.mark.parametrize("field", [*peft_config._OFF, "use_something_new", "invocation_string"])
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_field_that_is_off_is_nothing(base, layers, tmp_path_factory, field, value):
    folder = shutil.copytree(plain_folder(base, tmp_path_factory), tmp_path_factory.mktemp("edited") / "adapter")
    assert read_adapter(str(edit(folder, **{field: value})), layers).r == 4


_FOLDERS: dict[int, Path] = {}


def plain_folder(base, tmp_path_factory) -> Path:
    if id(base) not in _FOLDERS:
        _FOLDERS[id(base)] = saved(base, tmp_path_factory.mktemp("plain") / "adapter")
    return _FOLDERS[id(base)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head."),
        ({"target_modules": ["q_proj", "up_proj"]}, "target_modules='model.layers.0.mlp.up_proj'"),
        ({"r": 32}, "r=32"),
        ({"rank_pattern": {"v_proj": 32}}, "rank_pattern={'v_proj': 32}"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
    ],
)
@pytest.mark.parametrize("activated", [False, True])
def test_what_only_peft_can_apply_is_refused(base, layers, tmp_path, settings, message, activated):
    if activated and settings.keys() & {"use_dora"}:
        pytest.skip("PEFT has no such adapter")
    folder = saved(base, tmp_path / "adapter", **settings)
    if activated:
        edit(folder, **INVOCATION)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_adapter(str(folder), layers)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_an_expression_that_takes_for_ever_is_refused(layers, base, tmp_path, field):
    evil = r"(?:(?:[a-z0-9_.]|[a-z0-9_.]{2}|[a-z])+)+[A-Z]"
    value = {"rank_pattern": {evil: 4}}.get(field, evil)
    folder = edit(
        saved(base, tmp_path / "adapter"),
        **{field: value},
        **({"layers_to_transform": [1]} if field == "layers_pattern" else {}),
    )
    with pytest.raises(ConfigError) as caught:
        read_adapter(str(folder), layers)
    assert caught.value.field == field


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_the_models_are_refused_by_name(base, layers, tmp_path, kind, pickled):
    change, message = TENSORS[kind]
    folder = change_tensors(saved(base, tmp_path / "adapter"), change)
    if pickled:
        torch.save(safetensors.torch.load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_adapter(str(folder), layers)
    assert len(str(caught.value)) < 1000


def test_numbers_that_the_engine_cannot_keep_are_refused(base, tmp_path):
    folder = change_tensors(saved(base, tmp_path / "adapter"), B(lambda m: m.fill_(1e5)))
    assert read_adapter(str(folder), layers_of(base)).r == 4
    with pytest.raises(ConfigError, match="finite numbers in float16"):
        read_adapter(str(folder), layers_of(base, dtype=torch.float16))
    with pytest.raises(ConfigError, match="lora_alpha=1e.300 is not allowed: one that gives a finite scale in float32"):
        read_adapter(str(edit(saved(base, tmp_path / "large"), lora_alpha=1e300)), layers_of(base))
    scaled = edit(change_tensors(folder, B(lambda m: m.fill_(1e38))), alpha_pattern={"q_proj": 1e5})
    with pytest.raises(ConfigError, match="finite numbers in float32"):
        read_adapter(str(scaled), layers_of(base))


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_folder_is_refused_by_its_file(base, layers, tmp_path, kind):
    damage, field = FILES[kind]
    folder = saved(base, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        read_adapter(str(folder), layers)
    assert caught.value.field == field and len(str(caught.value)) < 1000
    assert not RAN.exists()


@pytest.mark.parametrize(
    "place",
    ["/nowhere", "../nowhere", "nowhere", "no/where", "a/b/c", "", "a\0b", "x" * 5000, "/proc/self/mem", "/dev/null"],
)
def test_a_place_without_an_adapter_is_named(layers, place):
    with pytest.raises(ConfigError) as caught:
        read_adapter(place, layers)
    assert caught.value.field in ("lora_path", CONFIG) and len(str(caught.value)) < 1000


def test_an_adapter_of_ours_that_is_no_more_as_it_was_written_is_refused(base, layers, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    write_sums(folder, (CONFIG, WEIGHTS))
    assert read_adapter(str(folder), layers).r == 4
    change_tensors(folder, B(lambda m: m * 2))
    with pytest.raises(ConfigError, match="adapter_model.safetensors.* does not agree") as caught:
        read_adapter(str(folder), layers)
    assert caught.value.field == SUMS
    (folder / SUMS).unlink()
    assert read_adapter(str(folder), layers).r == 4
    os.mkfifo(folder / SUMS)
    with pytest.raises(ConfigError, match=SUMS):
        read_adapter(str(folder), layers)


def test_tokens_that_the_model_knows_may_lie_beside_an_adapter(base, layers, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    (folder / "added_tokens.json").write_text('{"<s>": 1}')
    assert read_adapter(str(folder), layers).r == 4


def test_no_flipped_byte_of_a_file_is_anything_but_an_adapter_or_a_refusal(base, layers, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    refused = 0
    for name, places in ((CONFIG, range(0, 10**6)), (WEIGHTS, [*range(0, 1500, 3), *range(1500, 60_000, 5000)])):
        content = (folder / name).read_bytes()
        for place in places:
            if place >= len(content):
                break
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
            try:
                read_adapter(str(folder), layers)
            except ConfigError as error:
                refused += 1
                assert error.field and len(str(error)) < 1000
        (folder / name).write_bytes(content)
    assert refused > 500
