"""Rows that are tokenised together get the tokens that each gets alone, in a few calls of the tokenizer."""

import copy
import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data import texts
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.tasks import Task, TextExample
from tiny import CHAT_TEMPLATE, renderer, tiny_tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "opt-reviews"
REVIEWS = Path(__file__).parents[2] / "examples" / "assets" / "reviews" / "train.jsonl"
CONTEXT = 100


@pytest.fixture(scope="module", params=["bos", "plain", "opt"])
def tokenizer(request):
    if request.param == "opt":
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer
    return tiny_tokenizer(adds_bos=request.param == "bos", chat_template=CHAT_TEMPLATE)


class Counted:
    """A tokenizer that counts how often it is called."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._tokenizer(*args, **kwargs)


def alone(tokenizer, text: str, special_tokens: bool = True) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special_tokens).input_ids)


def expected(tokenizer, row: dict) -> list[tuple] | None:
    """(prompt, options) of a row, a call for each of its texts; None where it is too long."""
    end = tokenizer.eos_token_id
    if "messages" in row:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        answer = tokenizer.apply_chat_template(row["messages"], tokenize=False)[len(prompt) :]
        rows = [(alone(tokenizer, prompt, False), [alone(tokenizer, answer, False)])]
    elif "text" in row:
        ids = alone(tokenizer, row["text"])
        blocks = [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)]
        rows = [(block[:1], [block[1:]]) for block in blocks if len(block) > 1]
    else:
        prompt, options = alone(tokenizer, row["prompt"]), []
        for option in row.get("options") or [row["completion"]]:
            joint = alone(tokenizer, row["prompt"] + option)
            fits = joint[: len(prompt)] == prompt and len(joint) > len(prompt)
            options.append(joint[len(prompt) :] if fits else alone(tokenizer, option, False))
        if "completion" in row and options[0][-1] != end:
            options[0] += (end,)
        rows = [(prompt, options)]
    return rows if all(len(prompt) + max(map(len, options)) <= CONTEXT for prompt, options in rows) else None


def random_row(draw: random.Random, words: list[str]) -> dict:
    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    # Without the space an option merges with the last word of the prompt in some tokenizers, and is tokenised by
    # itself.
    option = lambda: draw.choice(["", " ", "\n", " é"]) + text(3)  # noqa: E731
    match draw.randrange(4):
        case 0:
            return {"prompt": text(30), "options": [option() for _ in range(draw.randint(1, 4))], "label": 0}
        case 1:
            return {"prompt": text(30), "completion": option()}
        case 2:
            return {"messages": [{"role": "user", "content": text(12)}, {"role": "assistant", "content": text(5)}]}
        case _:
            return {"text": text(80) + " end"}


def test_rows_get_the_tokens_together_that_they_get_alone(tokenizer):
    draw = random.Random(1)
    with open(REVIEWS) as file:
        words = sorted({word for line in file for word in json.loads(line)["sentence"].split()})
    rows = [random_row(draw, [*words, "naïve", "日本", "\t", "gre", "at"]) for _ in range(600)]
    counted = Counted(tokenizer)
    outcomes = Encoder(counted, CONTEXT, chat=renderer(counted)).encode_each(
        [SourceRow(row, "rows", place) for place, row in enumerate(rows)]
    )
    wanted = [expected(tokenizer, row) for row in rows]
    assert wanted.count(None) < 300
    for row, outcome, want in zip(rows, outcomes, wanted):
        if want is None:
            assert isinstance(outcome, DataError) and "context of 100" in outcome.reason, row
        else:
            assert [(example.prompt, list(example.options)) for example in outcome] == want, row
    assert counted.calls <= 6


def test_a_row_whose_text_no_tokenizer_takes_is_bad_alone(tokenizer):
    class Wrong(Task):
        name = "wrong"

        def render(self, fields):
            return TextExample(fields["prompt"], (" great",), 0)

    rows = [
        SourceRow({"prompt": prompt}, "rows", line) for line, prompt in enumerate(["it was", 5, "so", None, "bad"], 1)
    ]
    outcomes = Encoder(tokenizer, CONTEXT, Wrong()).encode_each(rows)
    assert [isinstance(outcome, DataError) for outcome in outcomes] == [False, True, False, True, False]
    assert str(outcomes[1]).startswith("rows:2: ")


def test_long_rows_are_not_all_in_memory_at_once(tokenizer, monkeypatch):
    """Options are joined to their prompts for a few rows at a time."""
    monkeypatch.setattr(texts, "_MAX_CHARACTERS", 2000)
    sizes = []

    class Measured(Counted):
        def __call__(self, texts, **kwargs):
            sizes.append(sum(map(len, texts)))
            return super().__call__(texts, **kwargs)

    prompt, options = "it was a great film " * 10, [f" {number}" for number in range(20)]
    rows = [SourceRow({"prompt": prompt, "options": options, "label": 0}, "rows", line) for line in range(100)]
    outcomes = Encoder(Measured(tokenizer), 10_000).encode_each(rows)
    assert len(outcomes) == 100 and all(len(outcome[0].options) == 20 for outcome in outcomes)
    assert max(sizes) <= 2000 + 2 * 20 * (len(prompt) + 3)


@pytest.mark.parametrize("settings", ["as it is", "padding", "truncation", "special tokens are split"])
@pytest.mark.parametrize("special_tokens", [True, False])
def test_what_is_asked_of_the_backend_is_what_a_call_gives(tokenizer, settings, special_tokens):
    tokenizer = copy.deepcopy(tokenizer)
    written = ["", "the plot is thin", f"a {tokenizer.eos_token} within", " two  spaces\n", "é 漢字 😀"]
    if settings == "special tokens are split":
        tokenizer.split_special_tokens = True
    expected = [tokenizer(text, add_special_tokens=special_tokens).input_ids for text in written]
    if settings == "padding":
        tokenizer.backend_tokenizer.enable_padding(length=50)
    if settings == "truncation":
        tokenizer.backend_tokenizer.enable_truncation(2)
    for _ in range(2):
        assert texts._token_ids(tokenizer, written, special_tokens) == expected


def test_a_tokenizer_that_does_more_than_its_backend_is_called(tokenizer):
    class Louder(type(tokenizer)):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([one.upper() for one in text], *args, **kwargs)

    louder = copy.deepcopy(tokenizer)
    louder.__class__ = Louder
    assert texts._token_ids(louder, ["the plot"], True) == texts._token_ids(tokenizer, ["THE PLOT"], True)
