"""The front end of a run: what is wrong with a model, a data set or a setting is said before an engine starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, finetune
from tiny import tiny_tokenizer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
MODEL = ModelArguments(model=str(ASSETS / "opt-reviews"))
DATA = DataArguments(task="sst2", dataset=str(ASSETS / "reviews"), dev_split="validation", test_split="test")


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path) -> MezoConfig:
    return MezoConfig(output_dir=str(tmp_path / "run"), max_steps=2)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """Every error here must come before the engine: starting one would fail the test."""

    def refuse(*arguments, **settings):
        pytest.fail("the engine was started")

    monkeypatch.setattr("sglang.srt.mezo.training.finetune.MezoEngine", refuse)


GOOD_ROW = {"prompt": "a fine film. It was", "options": [" great", " terrible"], "label": 0}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD_ROW, "options": []}, "options=[]"),
        ({**GOOD_ROW, "label": 2}, "label=2"),
        ({**GOOD_ROW, "prompt": "words " * 600 + "It was"}, "more than the context of 512"),
        ({**GOOD_ROW, "prompt": "a fine film."}, "invocation"),
        ({"question": "?"}, "columns ['question']"),
    ],
)
def test_a_bad_row_names_its_file_and_line(tmp_path, config, row, reason):
    path = write_rows(tmp_path / "rows.jsonl", *[GOOD_ROW] * 7, row, *[GOOD_ROW] * 7)
    with pytest.raises(DataError) as caught:
        finetune(MODEL, DataArguments(dataset=path), replace(config, invocation=" It was"))
    assert str(caught.value).startswith(f"{path}:8: ")
    assert reason in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_an_unknown_task(config):
    with pytest.raises(DataError, match="unknown task 'sst3'; known tasks: boolq, cb, copa, "):
        finetune(MODEL, replace(DATA, task="sst3"), config)


def test_a_file_that_is_not_there(config):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file or folder"):
        finetune(MODEL, replace(DATA, dataset="nowhere.jsonl"), config)


def test_a_hub_that_cannot_be_reached(config):
    with pytest.raises(DataError, match="nobody/nothing"):
        finetune(MODEL, replace(DATA, dataset="nobody/nothing"), config)


SETTINGS = json.loads((ASSETS / "opt-reviews" / "config.json").read_text())
BROKEN_MODELS = {
    "empty": (
        {name: None for name in ("config.json", "model.safetensors", "tokenizer.json")},
        "there is no config.json in this one",
    ),
    "without weights": ({"model.safetensors": None}, "a model with its weights, and there is no \\*.safetensors"),
    "cut weights": ({"model.safetensors": b"\x08\x00\x00"}, "weights can be read .model.safetensors: "),
    "weights of words": (
        {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"},
        "weights can be read",
    ),
    "no JSON": ({"config.json": b"{"}, "not a valid JSON file"),
    "a list": ({"config.json": b"[1]"}, "Should have a `model_type`"),
    "no type": ({"config.json": b"{}"}, "Should have a `model_type`"),
    "another type": (
        {"config.json": json.dumps(SETTINGS | {"model_type": "zzz"}).encode()},
        "does not recognize this architecture",
    ),
    "a size in words": ({"config.json": json.dumps(SETTINGS | {"hidden_size": "x"}).encode()}, "expected int, got str"),
    "a broken tokenizer": ({"tokenizer.json": b"{"}, "Expecting property name"),
    "a tokenizer of a list": ({"tokenizer.json": b"[]"}, "a hub name or the folder of a model .'str' object"),
    "no tokenizer": (
        {"tokenizer.json": None, "tokenizer_config.json": None},
        "a model with its tokenizer, of which there are no files",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_model_whose_files_are_broken(tmp_path, config, kind):
    changes, message = BROKEN_MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(MODEL.model, folder)
    for name, content in changes.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^model='{folder}' is not allowed: .*{message}") as caught:
        finetune(ModelArguments(model=str(folder)), DATA, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/model", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("~/nowhere", "there is no such folder"),
        ("nowhere/to/go", "there is no such folder"),
        (str(ASSETS / "opt-reviews" / "config.json"), "this is a file"),
        ("nobody/nothing", "couldn't connect"),
        ("nothing", "couldn't connect"),
        ("", "there is no config.json in this one"),
        ("some words", "Repo id must"),
    ],
)
def test_a_model_that_is_not_there(config, model, message):
    with pytest.raises(ConfigError, match=f"^model='{model}' is not allowed: .*{message}") as caught:
        finetune(ModelArguments(model=model), DATA, config)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_family(config, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match="architectures='GPT2LMHeadModel' is not allowed: the families that can be trained are BERT, Cohere, ",
    ):
        finetune(ModelArguments(model=str(tmp_path)), DATA, config)


@pytest.mark.parametrize("invocation", [None, ""])
def test_activated_lora_without_an_invocation(tmp_path, config, invocation):
    path = write_rows(tmp_path / "rows.jsonl", *[GOOD_ROW] * 10)
    with pytest.raises(ConfigError, match="invocation"):
        finetune(MODEL, DataArguments(dataset=path), replace(config, invocation=invocation))


def test_ordinary_lora_with_an_invocation(config):
    with pytest.raises(ConfigError, match="invocation"):
        finetune(MODEL, DATA, replace(config, tuning="lora", invocation=" It was"))


def test_a_folder_that_cannot_be_made(tmp_path, config):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            ConfigError, match=f"output_dir=.* is not allowed: a folder that can be made: {tmp_path / 'file'} is a file"
        ):
            finetune(MODEL, DATA, replace(config, output_dir=str(path)))
    with pytest.raises(ConfigError, match="a new or empty folder"):
        finetune(MODEL, DATA, replace(config, output_dir=str(tmp_path)))
    for setting in ("resume_from_checkpoint", "overwrite_output_dir"):
        with pytest.raises(ConfigError, match="a folder that an earlier run made"):
            finetune(MODEL, DATA, replace(config, output_dir=str(tmp_path), **{setting: True}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("settings", [{"r": 4}, {"learning_rate": 1.0}])
def test_a_run_that_goes_on_has_the_settings_that_it_had(tmp_path, config, settings):
    run = tmp_path / "run"
    run.mkdir()
    (run / "seed_log").write_text("")
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=f"{name}={value} is not allowed: the run to resume has"):
        finetune(MODEL, DATA, replace(config, resume_from_checkpoint=True, **settings))
    (run / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="a run whose config.json can be read"):
        finetune(MODEL, DATA, replace(config, resume_from_checkpoint=True))


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"prompt": "a fine film. It was", "completion": " great"},
            {"objective": "classification"},
            "objective='classification' .* one option only",
        ),
        (
            {"prompt": "a fine film. It was", "completion": " great"},
            {"metric_for_best_model": "eval_accuracy"},
            "one of eval_loss for completion",
        ),
        (GOOD_ROW, {"metric_for_best_model": "f1"}, "one of eval_loss, eval_accuracy for classification"),
    ],
)
def test_an_objective_that_the_rows_do_not_have(tmp_path, config, row, settings, message):
    path = write_rows(tmp_path / "rows.jsonl", *[row] * 10)
    with pytest.raises(ConfigError, match=message):
        finetune(MODEL, DataArguments(dataset=path), replace(config, invocation=" It was", **settings))


def test_a_file_has_no_splits(tmp_path, config):
    path = write_rows(tmp_path / "rows.jsonl", *[GOOD_ROW] * 10)
    with pytest.raises(ConfigError, match="test_split='test' is not allowed: none for .*, which has no splits"):
        finetune(MODEL, DataArguments(dataset=path, test_split="test"), replace(config, invocation=" It was"))


TEXTS = [{"text": f"the plot of page {number} is thin, but the acting is superb"} for number in range(30)]
STREAM = {"task": "text", "streaming": True, "pack": True, "num_dev": 1, "num_test": 1}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({}, {"max_steps": -1}, "max_steps=-1 is not allowed: at least 1 beside a stream"),
        ({"max_length": 513}, {}, "max_length=513 is not allowed: at most 512, what the model has room for"),
        (
            {"max_length": 510},
            {"tuning": "prefix", "num_virtual_tokens": 5},
            "max_length=510 is not allowed: at most 507, what the model has room for",
        ),
        ({}, {"tuning": "alora"}, "tuning='alora' is not allowed: lora, full or prefix for whole texts"),
        (
            {},
            {"tuning": "alora", "invocation": " It was"},
            "tuning='alora' is not allowed: lora, full or prefix for whole texts",
        ),
        ({}, {"objective": "classification"}, "objective='classification' .* one option only"),
        ({"dataset_config": "small"}, {}, "dataset_config='small' is not allowed: none for .*rows.jsonl"),
        ({"test_split": "test"}, {}, "test_split='test' is not allowed: none for .*, which has no splits"),
        ({"num_dev": 500}, {}, "no block of max_length=32 tokens is left to train on behind the"),
        ({"dataset": "nowhere.jsonl"}, {}, "no such file or folder"),
    ],
)
def test_a_stream_that_cannot_be_trained_on(tmp_path, config, data, settings, message):
    path = write_rows(tmp_path / "rows.jsonl", *TEXTS)
    data = DataArguments(**{"dataset": path, "max_length": 32, **STREAM, **data})
    with pytest.raises((ConfigError, DataError), match=message):
        finetune(
            MODEL, data, MezoConfig(**{"output_dir": config.output_dir, "max_steps": 2, "tuning": "lora", **settings})
        )
    assert not Path(config.output_dir).exists()


def test_a_row_that_is_longer_than_max_length_is_a_bad_row(tmp_path, config):
    path = write_rows(tmp_path / "rows.jsonl", *[GOOD_ROW] * 7, {**GOOD_ROW, "prompt": "words " * 30 + "It was"})
    data = DataArguments(dataset=path, max_length=20)
    with pytest.raises(DataError, match="rows.jsonl:8: .* more than the context of 20"):
        finetune(MODEL, data, replace(config, invocation=" It was"))


def test_no_data_at_all(config):
    with pytest.raises(ConfigError, match="dataset=None"):
        finetune(MODEL, DataArguments(), replace(config, tuning="lora"))


# --- what only the model's files can tell -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj,v_proj"]},
            r"target_modules=\['q_proj,v_proj'\] is not allowed: OPT has q_proj, k_proj, v_proj, out_proj, fc1, fc2",
        ),
        ({"target_modules": ["q_proj", "o_proj"]}, r"target_modules=\['o_proj'\] is not allowed: OPT has "),
        ({"target_modules": ["all-linear", "q_proj"]}, r"target_modules=\['all-linear'\] is not allowed: OPT has "),
        ({"target_modules": ["lm_head"]}, r"target_modules=\['lm_head'\] is not allowed: OPT has "),
        ({"r": 10_000}, "r=10000 is not allowed: at most [0-9]+, the width of the model"),
    ],
)
def test_what_the_model_does_not_have(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        finetune(MODEL, DATA, replace(config, **settings))


def test_a_pool_that_cannot_hold_an_example(config):
    with pytest.raises(
        ConfigError, match="max_total_tokens=5 is not allowed: at least [0-9]+, the tokens of the longest example"
    ):
        finetune(replace(MODEL, max_total_tokens=5), DATA, config)


def test_all_linear_is_what_peft_makes_of_it(config, monkeypatch):
    """And is written out in the settings of the run."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL.model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {
        name.rpartition(".")[2]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    started = {}

    class Started(Exception):
        pass

    def start(model, **settings):
        started.update(settings)
        raise Started

    monkeypatch.setattr("sglang.srt.mezo.training.finetune.MezoEngine", start)
    with pytest.raises(Started):
        finetune(MODEL, DATA, replace(config, target_modules=["all-linear"]))
    assert set(started["target_modules"]) == names == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
