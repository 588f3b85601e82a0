"""Training asks as requests do: the prompts of rows are those of SGLang's own handler, for every kind of row and
template."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from conversations import ANSWERS_THAT_CALL, MODEL, REFUSED, ROWS, TEMPLATES, SGLangsOwn, request_for
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.conversation import turns
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.data.invocation import find_invocation
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.engine.chat import ChatRenderer
from tiny import renderer

CONTEXT = 4096
NAMES = (*TEMPLATES, "chatml", "llama-2")
"""Files, and two of SGLang's conversation templates."""
UNTOLD = {("chatml", "an answer in parts"), ("llama-2", "an answer in parts"), ("llama-2", "a system message alone")}
"""What SGLang's conversation templates cannot write as an answer, though they can ask for it."""


def encoder_for(template: str | None, **settings) -> tuple[Encoder, AutoTokenizer]:
    """As training has it; ``template`` is a file's or one that SGLang knows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    settings = ChatSettings(str(MODEL), chat_template=TEMPLATES.get(template, template), **settings)
    return Encoder(tokenizer, CONTEXT, chat=ChatRenderer(tokenizer, settings)), tokenizer


@pytest.fixture(scope="module", params=NAMES)
def sides(request):
    """The template's name, the training side and SGLang's."""
    encoder, tokenizer = encoder_for(request.param)
    return request.param, encoder, tokenizer, SGLangsOwn(TEMPLATES.get(request.param, request.param)).prompt


def places(row: dict) -> list[int]:
    return [len(turn.asked["messages"]) for turn in turns(row)]


def test_there_are_enough_rows():
    assert len(ROWS) >= 40 and len(TEMPLATES) == 4


@pytest.mark.parametrize("kind", ROWS)
def test_the_prompt_of_a_row_is_that_of_the_request(sides, kind):
    template, encoder, tokenizer, prompt = sides
    row = ROWS[kind]
    try:
        expected = [prompt(request_for(row, place)) for place in places(row)]
    except ValueError as refusal:
        with pytest.raises(DataError) as caught:
            encoder.encode(row)
        assert str(refusal) in str(caught.value)
        return
    if (template, kind) in UNTOLD:
        with pytest.raises(DataError, match="single text|differently than its generation prompt"):
            encoder.encode(row)
        return
    examples = encoder.encode(row)
    assert [example.prompt for example in examples] == expected
    for place, example in zip(places(row), examples, strict=True):
        answer = row["messages"][place]["content"]
        if isinstance(answer, str):
            assert answer.strip() in tokenizer.decode(example.options[0])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_request_would_be_refused_for_is_the_rows_error(sides, kind):
    _, encoder, _, prompt = sides
    row, reason = REFUSED[kind]
    with pytest.raises(ValueError):  # pydantic's errors are such
        prompt(request_for(row, len(row["messages"]) - 1))
    with pytest.raises(DataError) as caught:
        encoder.encode_rows([SourceRow(row, "rows.jsonl", 7)])
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert reason in str(caught.value) or "the chat template refuses" in str(caught.value)


def test_at_least_two_thirds_of_the_rows_are_rendered_by_each_template(sides):
    _, encoder, *_ = sides
    outcomes = encoder.encode_each([SourceRow(row, "rows", number) for number, row in enumerate(ROWS.values())])
    assert sum(isinstance(outcome, list) for outcome in outcomes) > len(ROWS) * 2 / 3


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "kind",
    ["one question", "a system message", "three rounds", "blanks", "no ASCII", "a question that ends with a line"],
)
def test_prompt_and_answer_are_what_transformers_renders(template, kind):
    encoder, tokenizer = encoder_for(template)
    [example] = encoder.encode(ROWS[kind])
    whole = tokenizer.apply_chat_template(ROWS[kind]["messages"], tokenize=False)
    assert tokenizer.decode(example.prompt + example.options[0]) == whole
    answer = ROWS[kind]["messages"][-1]["content"]
    assert tokenizer.decode(example.options[0]).startswith(answer) or tokenizer.decode(example.options[0]).startswith(
        " " + answer
    )


@pytest.mark.parametrize("kind", ANSWERS_THAT_CALL)
def test_an_answer_that_is_a_tool_call_is_learned_as_the_template_writes_it(kind):
    encoder, tokenizer = encoder_for("tools")
    [example] = encoder.encode(ANSWERS_THAT_CALL[kind])
    text = tokenizer.decode(example.options[0])
    assert '<tool_call>rate {"n": 3}</tool_call>' in text and text.endswith("<|im_end|>\n")
    assert example.prompt == SGLangsOwn(TEMPLATES["tools"]).prompt(request_for(ANSWERS_THAT_CALL[kind], 1))


@pytest.mark.parametrize("template", ["strings", "parts", "reasoning", "chatml"])
@pytest.mark.parametrize("kind", ANSWERS_THAT_CALL)
def test_a_template_that_writes_no_tool_calls_has_none_to_learn(template, kind):
    encoder, _ = encoder_for(template)
    with pytest.raises(
        DataError, match=r"messages\[1\].tool_calls cannot be learned: the chat template does not write them"
    ):
        encoder.encode(ANSWERS_THAT_CALL[kind])


def test_the_servers_settings_count(tmp_path):
    row = ROWS["one question"]
    settings = {"default_chat_template_kwargs": {"enable_thinking": False}}
    encoder, tokenizer = encoder_for("reasoning", **settings)
    [example] = encoder.encode(row)
    assert (
        tokenizer.decode(example.prompt).endswith("<think>\n\n</think>\n")
        and tokenizer.decode(example.options[0]) == " great<|im_end|>\n"
    )
    assert example.prompt == SGLangsOwn(TEMPLATES["reasoning"], **settings).prompt(request_for(row, 1))
    encoder, tokenizer = encoder_for("chatml", reasoning_parser="deepseek-r1")
    asked = SGLangsOwn("chatml", reasoning_parser="deepseek-r1").prompt(request_for(row, 1))
    assert tokenizer.decode(asked).endswith("<think>")
    with pytest.raises(DataError, match="differently than its generation prompt announces"):
        encoder.encode(row)


def test_a_template_in_a_file_of_sglangs_json_format_is_read(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"name": "mine", "system": "S:", "user": "U", "assistant": "A", "sep_style": "CHATML", "sep": "</s>", '
        '"stop_str": "</s>"}'
    )
    encoder, _ = encoder_for(str(path))
    [example] = encoder.encode(ROWS["three rounds"])
    assert example.prompt == SGLangsOwn(str(path)).prompt(request_for(ROWS["three rounds"], 5))


@pytest.mark.parametrize("template", ["no-such-template", "missing.jinja"])
def test_a_template_that_is_not_there_is_an_error_at_once(template):
    with pytest.raises(ConfigError, match=f"chat_template='{template}' is not allowed"):
        encoder_for(template)


def test_the_model_decides_where_the_user_names_no_template():
    """The embedded model has a template of its own, and an encoder that is told nothing takes it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    own = SGLangsOwn(None)
    for kind in ("one question", "parts", "a tool call before", "a name"):
        [example] = Encoder(tokenizer, CONTEXT, chat=renderer(tokenizer)).encode(ROWS[kind])
        assert example.prompt == own.prompt(request_for(ROWS[kind], len(ROWS[kind]["messages"]) - 1))


def test_threads_share_a_renderer():
    encoder, _ = encoder_for("tools")
    rows = [row for row in ROWS.values() if row["messages"][-1]["content"] == " great"] * 5
    alone = [encoder.encode(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encoder.encode, rows)) == alone


def test_settings_can_be_sent_to_another_process():
    settings = ChatSettings("m", chat_template="chatml", default_chat_template_kwargs={"a": 1})
    assert pickle.loads(pickle.dumps(settings)) == settings


# --- the border between prompt and answer -----------------------------------------------------------------------------


def test_an_answer_that_would_merge_with_the_prompt_leaves_the_prompt_as_it_is_served(tmp_path):
    path = tmp_path / "bare.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    encoder, tokenizer = encoder_for(str(path))
    begun, rest = "gre", "at"
    assert tokenizer.encode(begun + rest, add_special_tokens=False)[
        : len(tokenizer.encode(begun, add_special_tokens=False))
    ] != tokenizer.encode(begun, add_special_tokens=False)
    [example] = encoder.encode(
        {"messages": [{"role": "user", "content": begun}, {"role": "assistant", "content": rest}]}
    )
    assert list(example.prompt) == tokenizer.encode(begun, add_special_tokens=False)
    assert list(example.options[0]) == tokenizer.encode(rest, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        ("strings", "[assistant]"),
        ("parts", "<assistant>"),
        ("tools", "<|im_start|>assistant\n"),
        ("reasoning", "<|im_start|>assistant\n"),
        ("chatml", "<|im_start|>assistant\n"),
    ],
)
def test_the_generation_prompt_is_what_the_template_appends(template, tail):
    encoder, tokenizer = encoder_for(template)
    for kind in ("one question", "a question that ends with a line", "three rounds", "an earlier answer in parts"):
        for turn in turns(ROWS[kind]):
            assert tokenizer.decode(encoder._renderer.generation_prompt(turn)) == tail


@pytest.mark.parametrize("template", ["tools", "chatml", "llama-2", "reasoning"])
def test_rows_of_chats_have_the_generation_prompt_as_invocation(template):
    encoder, _ = encoder_for(template)
    rows = [
        SourceRow(ROWS[kind], "rows", 1)
        for kind in ("one question", "three rounds", "a system message", "a question that ends with a line", "no ASCII")
    ]
    examples = encoder.encode_rows(rows)
    tokens = encoder.generation_prompt(rows, (example.prompt for example in examples))
    assert tokens
    for example in examples:
        assert find_invocation(example.prompt, tokens) == len(example.prompt) - len(tokens)


def test_prompts_that_do_not_end_alike_have_no_common_invocation():
    encoder, _ = encoder_for("strings")
    rows = [SourceRow(ROWS["one question"], "rows", 1)]
    prompts = [example.prompt for example in encoder.encode_rows(rows)]
    assert encoder.generation_prompt(rows, prompts)
    with pytest.raises(DataError, match="not every prompt ends with the generation prompt '.assistant.'"):
        encoder.generation_prompt(rows, [*prompts, (1, 2, 3)])
    with pytest.raises(DataError, match="there are no messages"):
        encoder.generation_prompt([SourceRow({"text": "a"}, "rows", 1)], [])
