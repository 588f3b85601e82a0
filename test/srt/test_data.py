"""Rows to tokens: every form of row, and every way in which one can be bad."""

import json
import logging
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.examples import Encoder, Example, default_objective
from sglang.srt.mezo.data.rows import SourceRow, read_rows
from sglang.srt.mezo.data.tasks import TASKS, get_task
from tiny import CHAT_TEMPLATE, renderer, tiny_tokenizer

CONTEXT = 40
END = 2
CHOICE = {"prompt": "it was", "options": [" great", " bad"], "label": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, CONTEXT, chat=renderer(tokenizer))


def ids(tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of a text alone, without the special token in front."""
    return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def write_lines(path: Path, *lines: object) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- forms of rows ----------------------------------------------------------------------------------------------------


def test_options_continue_the_prompt_and_keep_their_label(encoder, tokenizer):
    [example] = encoder.encode(CHOICE)
    assert example == Example((END, *ids(tokenizer, "it was")), (ids(tokenizer, " great"), ids(tokenizer, " bad")), 1)
    assert len(example.options[0]) == 1


def test_a_completion_is_one_option_that_ends_with_the_end_token(encoder, tokenizer):
    [example] = encoder.encode({"prompt": "the plot", "completion": " is great"})
    assert example == Example((END, *ids(tokenizer, "the plot")), ((*ids(tokenizer, " is great"), END),), 0)


def test_a_completion_that_has_its_end_gets_no_second_one(encoder, tokenizer):
    [example] = encoder.encode({"prompt": "the plot", "completion": " is great</s>"})
    assert example.options == ((*ids(tokenizer, " is great"), END),)


def test_messages_go_through_the_chat_template_and_train_the_last_answer(encoder, tokenizer):
    messages = [
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "maybe"},
        {"role": "assistant", "content": "great"},
    ]
    [example] = Encoder(tokenizer, 100, chat=renderer(tokenizer)).encode({"messages": messages})
    assert tokenizer.decode(example.prompt) == "<user>yes</s><assistant>no</s><user>maybe</s><assistant>"
    assert tokenizer.decode(example.options[0]) == "great</s>"
    assert example.options[0][-1] == END and example.prompt[0] != END  # the template alone decides on special tokens


def test_plain_text_is_cut_into_blocks_of_the_context(encoder, tokenizer):
    text = " it was a great film and the plot is not so bad" * 9
    examples = encoder.encode({"text": text})
    tokens = [token for example in examples for token in example.prompt + example.options[0]]
    assert tuple(tokens) == (END, *ids(tokenizer, text))
    assert [len(example.prompt) + len(example.options[0]) for example in examples[:-1]] == [CONTEXT] * (
        len(examples) - 1
    )
    assert all(len(example.prompt) == 1 and len(example.options) == 1 for example in examples)


def test_a_last_block_of_one_token_has_nothing_to_predict_and_is_dropped(tokenizer):
    length = len(ids(tokenizer, " it was a great film")) + 1
    [example] = Encoder(tokenizer, length - 1).encode({"text": " it was a great film"})
    assert (*example.prompt, *example.options[0]) == (END, *ids(tokenizer, " it was a great"))


def test_sst2_asks_as_the_paper_does(tokenizer):
    [example] = Encoder(tokenizer, 100, get_task("sst2")).encode({"sentence": "a great film ", "label": 1})
    assert tokenizer.decode(example.prompt) == "</s>a great film It was"
    assert [tokenizer.decode(option) for option in example.options] == [" terrible", " great"]
    assert example.label == 1


def test_an_option_that_would_merge_with_the_prompt_keeps_the_prompt_as_it_is_served(encoder, tokenizer):
    assert ids(tokenizer, "great")[: len(ids(tokenizer, "gre"))] != ids(tokenizer, "gre")
    [example] = encoder.encode({"prompt": "gre", "options": ["at", "at and the plot is bad"], "label": 0})
    assert example.prompt == (END, *ids(tokenizer, "gre"))
    assert example.options == (ids(tokenizer, "at"), ids(tokenizer, "at and the plot is bad"))


def test_a_tokenizer_without_a_start_token_gives_prompts_without_one():
    tokenizer = tiny_tokenizer(adds_bos=False)
    [example] = Encoder(tokenizer, CONTEXT).encode(CHOICE)
    assert example.prompt == ids(tokenizer, "it was")


def test_the_objective_follows_the_form_of_the_rows(encoder):
    def objective(fields: dict) -> str:
        row = SourceRow(fields, "rows", 1)
        return default_objective(encoder.encode_rows([row]))

    assert objective(CHOICE) == "classification"
    assert objective({"prompt": "yes", "completion": " no"}) == "completion"
    assert objective({"text": "it was great"}) == "completion"


# --- bad rows ---------------------------------------------------------------------------------------------------------

_USER, _ANSWER = {"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}

BAD_ROWS = {
    "broken JSON": ('{"prompt": ', "not JSON"),
    "deeply nested": ('{"text": ' + "[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    "half of a surrogate pair": ('{"text": "\\ud800"}', "text is no Unicode text"),
    "option half of a surrogate pair": (
        '{"prompt": "it", "options": ["a", "\\udfff"], "label": 0}',
        "options is no Unicode text",
    ),
    "column of ours": ({"__broken__": 5}, "columns ['__broken__'] have none of the forms"),
    "no object": ([1, 2], "a JSON object is needed, not list"),
    "no known form": ({"question": "?"}, "columns ['question'] have none of the forms"),
    "label missing": ({"prompt": "it", "options": [" a"]}, "columns ['options', 'prompt'] have none of the forms"),
    "no options": ({**CHOICE, "options": []}, "at least one is needed"),
    "empty option": ({**CHOICE, "options": [" great", ""]}, "none may be empty"),
    "options no list": ({**CHOICE, "options": " great"}, "options=' great' must be a list of strings"),
    "option no text": ({**CHOICE, "options": [" great", 3]}, "must be a list of strings"),
    "two options the same": (
        {**CHOICE, "options": [" bad", " great", " bad"]},
        "options[0]=' bad' and options[2]=' bad' are the same tokens",
    ),
    "label too large": ({**CHOICE, "label": 2}, "label=2 must be an index of the 2 options"),
    "label negative": ({**CHOICE, "label": -1}, "label=-1 must be an index of the 2 options"),
    "label a boolean": ({**CHOICE, "label": True}, "label=True must be an index of the 2 options"),
    "label in words": ({**CHOICE, "label": "bad"}, "label='bad' must be an index of the 2 options"),
    "empty prompt of a completion": (
        {"prompt": "", "completion": "it"},
        "prompt='' must be a non-empty string: {\"text\"} instead",
    ),
    "empty prompt": ({**CHOICE, "prompt": ""}, "prompt='' must be a non-empty string"),
    "prompt no text": ({"prompt": None, "completion": "a"}, "prompt=None must be a non-empty string"),
    "empty completion": ({"prompt": "it", "completion": ""}, "completion='' must be a non-empty string"),
    "empty text": ({"text": ""}, "text='' must be a non-empty string"),
    "prompt too long": (
        {"prompt": "it was" * 100, "completion": " great"},
        f"tokens and an option are more than the context of {CONTEXT}",
    ),
    "too long": ({"prompt": "it was", "completion": " great" * 100}, f"tokens are more than the context of {CONTEXT}"),
    "messages no list": ({"messages": "hello"}, "messages must be a list"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "nothing to answer": ({"messages": [_ANSWER]}, "messages must be a list of two or more"),
    "no answer": ({"messages": [_ANSWER, _USER]}, "ends with an assistant message"),
    "empty answer": ({"messages": [_USER, {**_ANSWER, "content": ""}]}, "messages[1].content='' must be"),
    "answer without content": ({"messages": [_USER, {"role": "assistant"}]}, "messages[1].content=None must be"),
    "answer no object": ({"messages": ["yes", "no"]}, "ends with an assistant message"),
    "message no object": (
        {"messages": ["yes", _ANSWER]},
        "messages[0]='yes' must be an object with a role and a content",
    ),
    "message without role": (
        {"messages": [{"content": "yes"}, _ANSWER]},
        "messages[0]={'content': 'yes'} must be an object with a role",
    ),
    "message without content": ({"messages": [{"role": "user"}, _ANSWER]}, "messages[0].content=None must be a string"),
    "no role of a request": (
        {"messages": [{**_USER, "role": "judge"}, _ANSWER]},
        "messages[0].role='judge' is not allowed",
    ),
    "template refuses": (
        {"messages": [{**_USER, "role": "system"}, _ANSWER]},
        "the chat template refuses the messages: no such role",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_reported_with_file_line_and_reason(tmp_path, encoder, kind):
    bad, reason = BAD_ROWS[kind]
    path = write_lines(tmp_path / "rows.jsonl", CHOICE, "", bad, CHOICE)  # a blank line counts as a line
    with pytest.raises(DataError) as caught:
        encoder.encode_rows(read_rows(path, "train"))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert (caught.value.source, caught.value.line) == (path, 3)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_skip_mode_leaves_the_bad_row_out_and_says_so(tmp_path, encoder, caplog, kind):
    path = write_lines(tmp_path / "rows.jsonl", CHOICE, BAD_ROWS[kind][0], CHOICE)
    with caplog.at_level(logging.WARNING):
        examples = encoder.encode_rows(read_rows(path, "train"), on_bad_row="skip")
    assert examples == encoder.encode(CHOICE) * 2
    [message] = [record.getMessage() for record in caplog.records if record.name == "sglang.srt.mezo.data.checks"]
    assert f"{path}:2: " in message and BAD_ROWS[kind][1] in message


def test_bytes_that_are_no_text_are_an_error_of_their_line(tmp_path, encoder):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(CHOICE).encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="rows.jsonl:2: not JSON.*can't decode byte 0xe9"):
        encoder.encode_rows(read_rows(str(path), "train"))


def test_a_message_shows_the_beginning_of_a_long_value(encoder):
    with pytest.raises(DataError) as caught:
        encoder.encode({**CHOICE, "label": "x" * 100_000})
    assert "label='xxx" in str(caught.value) and len(str(caught.value)) < 500


def test_options_of_the_same_tokens_are_refused(tokenizer):
    """Where the tokenizer makes the same of two texts, nothing tells them apart either."""

    class Lower:
        eos_token_id = END

        def __call__(self, texts, **settings):
            return tokenizer(texts.lower() if isinstance(texts, str) else [text.lower() for text in texts], **settings)

    with pytest.raises(DataError, match=r"options\[0\]=' great' and options\[2\]=' Great' are the same tokens"):
        Encoder(Lower(), CONTEXT).encode({**CHOICE, "options": [" great", " bad", " Great"]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": 1}, "column 'sentence' is missing"),
        ({"sentence": "good"}, "column 'label' is missing"),
        ({"sentence": "good", "label": -1}, "label=-1 must be a class from 0 to 1"),
        ({"sentence": 5, "label": 1}, "sentence=5 must be a string"),
        ({"sentence": None, "label": 1}, "sentence=None must be a string"),
        ({"sentence": ["good"], "label": 1}, r"sentence=\['good'\] must be a string"),
        ({"sentence": "\ud800", "label": 1}, "sentence is no Unicode text"),
        ({"sentence": "good", "label": None}, "label=None must be a class from 0 to 1"),
    ],
)
def test_a_bad_row_of_a_task_is_reported_too(tokenizer, row, reason):
    with pytest.raises(DataError, match=f"^glue.train.:7: .*{reason}"):
        Encoder(tokenizer, 100, get_task("sst2")).encode_rows([SourceRow(row, "glue[train]", 7)])


def test_a_prompt_without_the_invocation_is_refused(tokenizer):
    encoder = Encoder(tokenizer, CONTEXT, invocation=ids(tokenizer, " it was"))
    assert encoder.encode({**CHOICE, "prompt": "not bad it was"})
    rows = [SourceRow({**CHOICE, "prompt": "not bad"}, "rows.jsonl", 4)]
    with pytest.raises(DataError, match="rows.jsonl:4: the prompt does not hold the invocation tokens"):
        encoder.encode_rows(rows)


def test_the_context_is_full_at_its_length_and_not_before(tokenizer):
    row = {"prompt": "it was a great film", "options": [" great", " not so terrible"], "label": 0}
    [example] = Encoder(tokenizer, 1000).encode(row)
    length = len(example.prompt) + len(example.options[1])
    assert Encoder(tokenizer, length).encode(row) == [example]
    with pytest.raises(DataError, match=f"{length} tokens are more than the context of {length - 1}"):
        Encoder(tokenizer, length - 1).encode(row)


def test_a_prompt_or_an_option_without_tokens_is_refused(tokenizer):
    class Stripping:
        """A tokenizer for which blanks are nothing."""

        eos_token_id = END

        def __call__(self, texts: list[str], add_special_tokens: bool = True):
            return tokenizer([text.strip() for text in texts], add_special_tokens=False)

    encoder = Encoder(Stripping(), CONTEXT)
    with pytest.raises(DataError, match="option 1 has no tokens"):
        encoder.encode({"prompt": "it", "options": [" great", "  "], "label": 0})
    with pytest.raises(DataError, match="option 0 has no tokens"):
        encoder.encode({"prompt": "it", "completion": " "})
    with pytest.raises(DataError, match="the prompt has no tokens"):
        encoder.encode({"prompt": " ", "completion": "it"})


def test_a_text_of_one_token_is_refused():
    encoder = Encoder(tiny_tokenizer(adds_bos=False), CONTEXT)
    with pytest.raises(DataError, match="two tokens or more"):
        encoder.encode({"text": " great"})


def test_messages_need_a_chat_template():
    without = tiny_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        Encoder(without, CONTEXT, chat=renderer(without)).encode({"messages": [_USER, _ANSWER]})
    with pytest.raises(DataError, match="messages need a renderer, such as chat=ChatRenderer"):
        Encoder(without, CONTEXT).encode({"messages": [_USER, _ANSWER]})


def test_a_template_that_rewrites_its_generation_prompt_is_refused():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(DataError, match="differently than its generation prompt"):
        Encoder(tokenizer, CONTEXT, chat=renderer(tokenizer)).encode({"messages": [_USER, _ANSWER]})


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match="rows.jsonl: it has no rows"):
        read_rows(str(tmp_path / "rows.jsonl"), "train")


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_no_usable_row_is_an_error(encoder, on_bad_row):
    with pytest.raises(DataError, match="no usable row"):
        encoder.encode_rows([], on_bad_row)
    with pytest.raises(DataError, match="rows.jsonl"):
        encoder.encode_rows([SourceRow({"question": "?"}, "rows.jsonl", 1)], on_bad_row)


def test_an_unknown_task_is_an_error_that_lists_the_known_ones():
    with pytest.raises(DataError, match="unknown task 'sst3'; known tasks: .*sst2"):
        get_task("sst3")


@pytest.mark.parametrize("name", ["sst2", "SST2", "SST-2", "sst_2"])
def test_a_task_is_found_however_its_name_is_written(name):
    assert get_task(name) is TASKS["sst2"]
