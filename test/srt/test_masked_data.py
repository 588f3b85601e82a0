"""Rows for masked language models: tokens around one mask, words in its place, and every way in which a row can be
bad; and what is refused of such a model before an engine starts."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglang.srt.mezo.adapters.foreign import read_foreign
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.masked import MaskedEncoder
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.data.tasks import get_task
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.evaluate import EvaluateArguments, evaluate
from sglang.srt.mezo.training.finetune import ModelArguments, adapted_model, finetune
from sglang.srt.mezo.training.preview import PreviewArguments, page, preview
from tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "assets" / "roberta-reviews"
CONTEXT = 40
CHOICE = {"prompt": "the plot is thin. It was<mask>.", "options": [" great", " terrible"], "label": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def encoder(tokenizer) -> MaskedEncoder:
    return MaskedEncoder(tokenizer, CONTEXT)


def words(tokenizer, example: Example) -> tuple[list[str], list[str]]:
    """Prompt and options, token by token."""
    return tokenizer.convert_ids_to_tokens(list(example.prompt)), tokenizer.convert_ids_to_tokens(
        [token for option in example.options for token in option]
    )


# --- forms of rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [CHOICE["prompt"], "the plot is thin. It was <mask>."])
def test_options_stand_in_the_place_of_the_mask(encoder, tokenizer, prompt):
    [example] = encoder.encode({**CHOICE, "prompt": prompt})
    tokens, options = words(tokenizer, example)
    assert "".join(tokens).replace("Ġ", " ") == "<s>the plot is thin. It was<mask>.</s>"
    assert tokens[example.mask] == "<mask>" and options == ["Ġgreat", "Ġterrible"] and example.label == 1


def test_a_task_has_a_form_of_its_own(tokenizer):
    encoder = MaskedEncoder(tokenizer, CONTEXT, get_task("sst2"))
    [example] = encoder.encode({"sentence": "the plot is thin.", "label": 0})
    [same] = MaskedEncoder(tokenizer, CONTEXT).encode({**CHOICE, "options": [" terrible", " great"], "label": 0})
    assert example == same


def test_one_option_alone_is_a_word_to_be_learned(encoder):
    [example] = encoder.encode({**CHOICE, "options": [" great"], "label": 0})
    assert len(example.options) == 1


def test_one_row_is_run_and_read_at_the_mask(encoder):
    [example] = encoder.encode(CHOICE)
    plan = Planner("lora").plan(example)
    [row] = plan.rows
    assert row.prefix == () and row.suffix == example.prompt
    assert row.reads == tuple((example.mask, option[0]) for option in example.options)
    assert plan.slot_tokens == len(example.prompt) and plan.single_token_options


def test_no_demonstrations_are_shown(tokenizer):
    row = SourceRow(
        {"sentence": "the plot is thin.", "label": 0}, "rows", 1, demonstrations=["a fine film. It was great"]
    )
    with pytest.raises(DataError, match="rows:1: a masked language model is shown no demonstrations"):
        MaskedEncoder(tokenizer, CONTEXT, get_task("sst2")).encode_rows([row])


# --- bad rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "the plot is thin. It was"}, "the prompt has 0 <mask>, and one is needed"),
        ({"prompt": "the<mask> is<mask>."}, "the prompt has 2 <mask>, and one is needed"),
        ({"options": [" great", " greatness of all"]}, "options[1]=' greatness of all' is"),
        ({"options": ["great", " bad"]}, "a word with the space before it"),
        ({"options": [" great", " great"]}, "are the same tokens"),
        ({"options": [" great", ""]}, "none may be empty"),
        ({"label": 2}, "label=2 must be an index of the 2 options"),
        ({"prompt": "the plot is thin. " * 10 + "It was<mask>."}, f"tokens are more than the context of {CONTEXT}"),
    ],
)
def test_what_is_wrong_with_a_row(encoder, change, message):
    with pytest.raises(DataError) as refusal:
        encoder.encode({**CHOICE, **change})
    assert message in str(refusal.value)


def test_a_prompt_may_be_as_long_as_the_context(encoder):
    """The options need no room behind it."""
    prompt = "<mask>." + " the" * (CONTEXT - 4)
    [example] = encoder.encode({**CHOICE, "prompt": prompt})
    assert len(example.prompt) == CONTEXT
    with pytest.raises(DataError, match="more than the context"):
        encoder.encode({**CHOICE, "prompt": prompt + " the"})


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "completion": "b"}, {"text": "a text"}, {"messages": [{"role": "user", "content": "a"}]}],
    ids=lambda row: next(reversed(row)),
)
def test_other_forms_are_refused(encoder, row):
    with pytest.raises(DataError, match=r"none of the forms \{label, options, prompt\}, which is what a masked"):
        encoder.encode(row)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(DataError, match="no mask token"):
        MaskedEncoder(tiny_tokenizer(), CONTEXT).encode(CHOICE)


def test_words_that_the_model_does_not_know_are_refused():
    """WordPiece, as BERT has it, gives all of them one token."""
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", "good", "bad")
    pieces = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "CLS", "SEP", "MASK")}
    encoder = MaskedEncoder(PreTrainedTokenizerFast(tokenizer_object=pieces, **special), CONTEXT)
    row = {"prompt": "it was [MASK]", "options": [" good", "bad"], "label": 0}
    assert encoder.encode(row) == [Example((5, 6, 4), ((7,), (8,)), 0, 2)]
    with pytest.raises(DataError, match=r"options\[1\]=' great' is not a word of the model's"):
        encoder.encode({**row, "options": [" good", " great"]})


def test_bad_rows_can_be_left_out(encoder, caplog):
    rows = [SourceRow(fields, "rows.jsonl", line) for line, fields in enumerate([CHOICE, {"text": "a"}], 1)]
    with caplog.at_level(logging.WARNING):
        assert len(encoder.encode_rows(rows, "skip")) == 1
    assert "rows.jsonl:2" in caplog.text


# --- before an engine starts ------------------------------------------------------------------------------------------


ARGUMENTS = ModelArguments(model=str(MODEL), dtype="float32")
DATA = DataArguments(task="sst2", dataset=str(ROOT / "examples" / "assets" / "reviews"), test_split="test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tuning='alora' is not allowed: lora, full or prefix for RobertaForMaskedLM"),
        ({"tuning": "lora", "target_modules": ["all-linear"]}, "RoBERTa has query, key, value"),
        ({"tuning": "lora", "target_modules": ["q_proj"]}, "RoBERTa has query, key, value"),
        ({"tuning": "prefix", "prefix_positions": "shifted"}, "unshifted for RobertaForMaskedLM"),
        ({"tuning": "lora", "invocation": " It was"}, "invocation=' It was' is not allowed"),
    ],
)
def test_settings_that_such_a_model_cannot_have(settings, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        finetune(ARGUMENTS, DATA, MezoConfig(output_dir=str(tmp_path / "run"), **settings))
    assert message in str(refusal.value)


def test_rows_of_other_models_are_refused_by_file_and_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    config = MezoConfig(output_dir=str(tmp_path / "run"), tuning="full")
    with pytest.raises(DataError, match="rows.jsonl:1"):
        finetune(ARGUMENTS, DataArguments(dataset=str(rows)), config)
    with pytest.raises(DataError, match="rows.jsonl:1"):
        evaluate(ARGUMENTS, EvaluateArguments(dataset=str(rows)))


def test_the_preview_shows_the_mask():
    with pytest.raises(ConfigError, match="num_train=2 is not allowed: nothing without drawn"):
        PreviewArguments(task="sst2", dataset=DATA.dataset, num_train=2)
    arguments = PreviewArguments(task="sst2", dataset=DATA.dataset, rows=1, tuning="lora")
    [shown] = preview(ARGUMENTS, arguments)
    assert shown["prompt"].endswith("It was<mask>.</s>") and shown["options"] == [" terrible", " great"]
    [row] = shown["rows"]
    assert row["prefix_tokens"] == 0 and row["ids"] == shown["prompt_ids"]
    assert [position for position, _ in row["reads"]] == [len(row["ids"]) - 3] * 2
    assert "<mask>" in page(shown)
    with pytest.raises(ConfigError, match="tuning='alora'"):
        list(preview(ARGUMENTS, replace(arguments, tuning="alora")))


# --- what a run of such a model leaves --------------------------------------------------------------------------------


def test_a_prefix_is_taken_up_for_its_own_kind_of_model(tmp_path):
    config, _ = read_checkpoint(str(MODEL))
    saved = PrefixAdapter(PrefixSpec.of(MezoConfig(tuning="prefix", num_virtual_tokens=3), str(MODEL), config))
    saved.theta.copy_(direction(4, 0, saved.numel))
    saved.save_pretrained(tmp_path / "prefix")
    model = adapted_model(str(MODEL), config)
    read = read_foreign(str(tmp_path / "prefix"), model)
    assert read.spec == saved.spec and torch.equal(read.theta, saved.theta)
    causal = model._replace(prefixes=model.prefixes._replace(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="task_type=None is not allowed: CAUSAL_LM"):
        read_foreign(str(tmp_path / "prefix"), causal)


def test_what_such_a_model_cannot_be_asked_is_refused(tmp_path):
    model, data = ModelArguments(str(MODEL)), DataArguments("sst2", str(ROOT / "examples" / "assets" / "reviews"))
    for settings, field in (({"objective": "f1"}, "objective"), ({"reward": "builtins:len"}, "objective")):
        with pytest.raises(ConfigError) as raised:
            finetune(model, data, MezoConfig(str(tmp_path / "run"), tuning="lora", **settings))
        assert raised.value.field == field
    with pytest.raises(ConfigError) as raised:
        finetune(model, replace(data, task="text"), MezoConfig(str(tmp_path / "run"), tuning="lora"))
    assert raised.value.field == "task"
