"""What a run is trained on is never what it is judged by, unless it says so."""

import json
import logging
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conversations import TEMPLATES
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.examples import Example, count_shared
from sglang.srt.mezo.data.splits import DataArguments, Splits, load_splits
from sglang.srt.mezo.engine.chat import ChatRenderer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "opt-reviews")


@pytest.fixture
def load(tokenizer, caplog):
    """Splits, and the warnings that came with them."""

    def load(**data) -> tuple[Splits, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            splits = load_splits(tokenizer, 512, (), DataArguments(**data))
        return splits, [
            record.getMessage() for record in caplog.records if record.name == "sglang.srt.mezo.data.splits"
        ]

    return load


def row(number: int, label: int = 0) -> dict:
    return {"prompt": f"the plot {number} is good. It was", "options": [" terrible", " great"], "label": label}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.dev), len(splits.test)


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (20, 4, 6)),
        ({"num_test": 2, "num_dev": 3}, (25, 3, 2)),
        ({"num_test": 0, "num_dev": 0}, (30, 0, 0)),
        ({"num_test": None}, (20, 4, 6)),
        ({"num_train": 5}, (5, 4, 6)),
        ({"num_train": 5, "num_dev": 1}, (5, 1, 6)),
        ({"num_train": None}, (20, 4, 6)),
    ],
)
def test_rows_of_a_file_are_held_out_of_it(tmp_path, load, settings, expected):
    splits, warnings = load(dataset=write(tmp_path / "rows.jsonl", *map(row, range(30))), **settings)
    assert sizes(splits) == expected and splits.shared == {} and warnings == []
    everything = splits.train + splits.dev + splits.test
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", ["dev_split", "test_split"])
@pytest.mark.parametrize("split", ["test", "validation", "rows"])
def test_a_file_has_no_split_to_name(tmp_path, load, name, split):
    path = write(tmp_path / "rows.jsonl", *map(row, range(30)))
    with pytest.raises(ConfigError) as caught:
        load(dataset=path, **{name: split})
    count = name.replace("split", "").rstrip("_")
    assert str(caught.value) == (
        f"{name}='{split}' is not allowed: none for {path}, which has no splits: num_{count} of its rows are held out. "
        "Or put a file for each split into a folder: train.jsonl, validation.jsonl, test.jsonl"
    )


def test_a_tasks_file_has_no_split_either(tmp_path, load):
    rows = [{"sentence": f"the plot {number} is good", "label": 1} for number in range(30)]
    assert sizes(load(dataset=write(tmp_path / "rows.jsonl", *rows), task="SST-2")[0]) == (20, 4, 6)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_that_are_named_are_taken_as_they_are(tmp_path, load):
    for name, numbers in (("train", range(30)), ("validation", range(30, 40)), ("test", range(40, 45))):
        write(tmp_path / f"{name}.jsonl", *map(row, numbers))
    splits, warnings = load(dataset=str(tmp_path), dev_split="validation", test_split="test")
    assert sizes(splits) == (30, 10, 5) and warnings == [] and splits.shared == {}
    assert sizes(load(dataset=str(tmp_path), test_split="test")[0]) == (24, 6, 5)
    assert sizes(load(dataset=str(tmp_path))[0]) == (20, 4, 6)
    with pytest.raises(DataError, match="cannot load split 'dev'"):
        load(dataset=str(tmp_path), dev_split="dev")


def test_examples_in_two_splits_are_counted_in_a_warning(tmp_path, load):
    write(tmp_path / "train.jsonl", *map(row, range(30)))
    write(tmp_path / "validation.jsonl", row(1), row(2), row(50), row(51))
    write(tmp_path / "test.jsonl", row(2), row(3, label=1), row(4), row(50), row(60))
    splits, warnings = load(dataset=str(tmp_path), dev_split="validation", test_split="test")
    assert splits.shared == {"dev in train": 2, "test in train": 3, "test in dev": 2}
    assert warnings == [
        "2 of 4 dev examples are train examples too: the adapter is chosen on what it has learned",
        "3 of 5 test examples are train examples too: the reported figures are in part of what it has learned",
        "2 of 5 test examples are dev examples too: the reported figures are in part of what it was chosen on",
    ]


def test_rows_that_a_file_has_twice_are_counted_where_they_are_held_out(tmp_path, load):
    splits, [first, second, third] = load(dataset=write(tmp_path / "rows.jsonl", *[row(0)] * 30))
    assert splits.shared == {"dev in train": 4, "test in train": 6, "test in dev": 6}


def test_rows_are_compared_as_tokens(tmp_path, load):
    """What is written in another form is the same example."""
    write(tmp_path / "train.jsonl", *map(row, range(10)))
    (tmp_path / "test.csv").write_text(
        'label,options,prompt\n1,"["" terrible"", "" great""]",the plot 3 is good. It was\n'
    )
    assert load(dataset=str(tmp_path), test_split="test")[0].shared == {"test in train": 1}


def test_what_the_repository_carries_shares_nothing(load):
    splits, warnings = load(task="sst2", dataset=str(ASSETS / "reviews"), dev_split="validation", test_split="test")
    assert sizes(splits) == (1000, 300, 600) and warnings == []


def test_examples_are_shared_whatever_their_label():
    example = Example((1, 2), ((3,), (4,)), 0)
    assert (
        count_shared(
            [
                example,
                Example((1, 2), ((3,), (4,)), 1),
                Example((1, 2), ((4,), (3,)), 0),
                Example((1,), ((3,), (4,)), 0),
            ],
            [example],
        )
        == 2
    )
    assert count_shared([], [example]) == count_shared([example], []) == 0


# --- the invocation of chats ------------------------------------------------------------------------------------------


def chats(tokenizer, path: str) -> Splits:
    """Splits of a file whose invocation is left open, under a chat template with a generation prompt."""
    settings = ChatSettings(tokenizer.name_or_path, chat_template=TEMPLATES["strings"])
    return load_splits(tokenizer, 512, None, DataArguments(dataset=path), ChatRenderer(tokenizer, settings))


def chat(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"plot {number}"}, {"role": "assistant", "content": "great"}]}


def test_rows_of_messages_have_their_generation_prompt_as_invocation(tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    splits = chats(tokenizer, write(tmp_path / "rows.jsonl", *map(chat, range(30))))
    assert tokenizer.decode(splits.invocation) == "[assistant]"
    assert all(
        example.prompt[-len(splits.invocation) :] == splits.invocation
        for example in [*splits.train, *splits.dev, *splits.test]
    )


def test_rows_without_one_end_before_an_engine_starts(tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    with pytest.raises(ConfigError, match="invocation=None is not allowed: .* --tuning lora, as there are no messages"):
        chats(tokenizer, write(tmp_path / "rows.jsonl", *map(row, range(30))))
    with pytest.raises(ConfigError, match="not every prompt ends with the generation prompt"):
        chats(
            tokenizer,
            write(
                tmp_path / "rows.jsonl",
                *map(chat, range(20)),
                *({"prompt": f"a {n}", "completion": "b"} for n in range(10)),
            ),
        )
