"""Whole texts in blocks, and texts that are read as they are needed: the same blocks as plain lists give."""

import gzip
import json
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from transformers import AutoTokenizer

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.examples import Encoder, Example
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.splits import DataArguments, Splits, load_splits
from sglang.srt.mezo.data.streams import TextStream, stream_rows
from tiny import tiny_tokenizer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
LENGTH = 16
WORDS = "the plot is thin but the acting is superb and nobody left before the very end of it".split()
TEXTS = [" ".join(WORDS[number % 7 : number % 7 + 1 + number * 5 % 11] * (1 + number % 4)) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "opt-reviews")


def rows_of(texts: list[str]) -> list[SourceRow]:
    return [SourceRow({"text": text}, "texts", number) for number, text in enumerate(texts, 1)]


def write(path: Path, texts: list[str], **more: object) -> str:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return str(path)


def tokens_of(examples: list[Example]) -> list[list[int]]:
    return [[*example.prompt, *example.options[0]] for example in examples]


def packed(tokenizer, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    """By one long list, as the programs of Transformers group texts: what does not fill a block is dropped."""
    long = []
    for text in texts:
        long += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return [long[start : start + length] for start in range(0, len(long) - length + 1, length)]


def cut(tokenizer, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    pieces = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def streamed(tokenizer, texts: list[str], pack: bool) -> TextStream:
    return TextStream(lambda: rows_of(texts), Encoder(tokenizer, LENGTH), pack, "raise")


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pack", "oracle"), [(True, packed), (False, cut)])
def test_blocks_are_those_of_one_long_list(tokenizer, pack, oracle):
    stream = streamed(tokenizer, TEXTS, pack)
    expected = oracle(tokenizer, TEXTS)
    assert tokens_of([*stream]) == expected and len(expected) > 40
    assert tokens_of([*stream]) == expected  # again from the first
    assert tokens_of([*stream.after(7).after(2)]) == expected[9:]
    assert all(len(example.prompt) == 1 and example.label == 0 for example in stream)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_that_ends_with_the_end_gets_no_second(adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    ids = tokenizer("a plot")["input_ids"] + [2]
    [*blocks] = TextStream(lambda: rows_of(["a plot</s>", "a plot"] * 5), Encoder(tokenizer, len(ids)), True, "raise")
    assert tokens_of(blocks) == [ids] * 10


def test_a_blank_text_is_passed_over_and_a_bad_one_is_not(tokenizer):
    texts = [*TEXTS[:3], "", " \n", *TEXTS[3:]]
    assert tokens_of([*streamed(tokenizer, texts, True)]) == packed(tokenizer, TEXTS)
    rows = [*rows_of(TEXTS), SourceRow({"text": 7}, "texts", 61), SourceRow({"text": None}, "texts", 62)]
    with pytest.raises(DataError, match="^texts:61: text=7 must be a non-empty string"):
        [*TextStream(lambda: rows, Encoder(tokenizer, LENGTH), True, "raise")]
    kept = TextStream(lambda: rows, Encoder(tokenizer, LENGTH), True, "skip")
    assert tokens_of([*kept]) == packed(tokenizer, TEXTS)


def test_rows_are_read_as_they_are_needed(tokenizer):
    read = 0

    def rows():
        nonlocal read
        while True:
            for row in rows_of(TEXTS):
                read += 1
                yield row

    [*islice(TextStream(rows, Encoder(tokenizer, LENGTH), True, "raise"), 3)]
    assert 0 < read <= 256
    tracemalloc.start()
    blocks = iter(TextStream(rows, Encoder(tokenizer, LENGTH), True, "raise"))
    held = []
    for _ in range(3):
        for _ in islice(blocks, 5000):
            pass
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert read > 5000 and held[2] - held[1] < 100_000


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "txt", "tsv", "parquet", "shards", "folder", "saved", "saved split"]
)
def test_every_kind_of_file_is_streamed(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, TEXTS, source="here")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(Path(write(tmp_path / "plain", TEXTS)).read_bytes()))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "txt":
        path.write_text("\n\n".join(TEXTS))
    elif kind == "tsv":
        path.write_text("number\ttext\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(TEXTS)))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS, "number": range(len(TEXTS))}), path)
    elif kind == "shards":
        path.mkdir()
        for number in range(3):
            write(path / f"train-{number:05}-of-00003.jsonl", TEXTS[20 * number : 20 * number + 20])
    elif kind == "folder":
        path.mkdir()
        write(path / "train.jsonl", TEXTS)
        (path / "validation.txt").write_text("of another format")
    else:
        dataset = Dataset.from_dict({"text": TEXTS})
        (DatasetDict(train=dataset) if kind == "saved split" else dataset).save_to_disk(path)
    texts = [row.fields["text"] for row in named_data("text", str(path)).texts("train")]
    assert [text for text in texts if text] == TEXTS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("nobody/nothing", r"nobody/nothing\[train\]: cannot be read behind row 0: "),
        ("https://nowhere/rows.jsonl", "nothing is fetched from a URL"),
        (__file__, "the end of a file's name tells its format: .jsonl, "),
    ],
)
def test_what_cannot_be_streamed(path, message):
    with pytest.raises(DataError, match=message):
        [*stream_rows(path, "train")]


def test_a_row_without_a_text_and_a_line_that_is_no_json_are_named(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", TEXTS[:3])
    with open(path, "a") as file:
        file.write('{"prompt": "it was", "completion": " great"}\n')
    encoder, rows = Encoder(tokenizer, LENGTH), named_data("text", path).texts
    for pack in (True, False):
        with pytest.raises(DataError, match=r"rows.jsonl\[train\]:4: .*text"):
            [*TextStream(lambda: rows("train"), encoder, pack, "raise")]
    with open(path, "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"rows.jsonl\[train\]: cannot be read behind row 0: .*JSON"):
        [*rows("train")]


def test_a_file_has_no_configuration(tmp_path):
    path = write(tmp_path / "rows.jsonl", TEXTS)
    for read in (
        lambda: [*named_data("text", path, "small").texts("train")],
        lambda: named_data("text", path, "small").rows("train"),
    ):
        with pytest.raises(ConfigError, match="dataset_config='small' is not allowed: none for .*rows.jsonl"):
            read()


# --- splits -----------------------------------------------------------------------------------------------------------


def load(tokenizer, path: str, **settings) -> Splits:
    given = {"task": "text", "dataset": path, "streaming": True, "pack": True, **settings}
    return load_splits(tokenizer, LENGTH, (), DataArguments(**given))


def test_the_first_blocks_are_held_out_and_never_trained_on(tokenizer, tmp_path):
    path, expected = write(tmp_path / "rows.jsonl", TEXTS), packed(tokenizer, TEXTS)
    splits = load(tokenizer, path, num_dev=4, num_test=3)
    assert tokens_of(splits.dev) == expected[:4] and tokens_of(splits.test) == expected[4:7]
    assert tokens_of([*splits.train]) == expected[7:] == tokens_of([*splits.train])
    assert splits.objective == "completion" and len(splits.known) == 8
    assert tokens_of([*load(tokenizer, path, num_dev=0, num_test=0).train]) == expected


def test_named_splits_are_streamed_too(tokenizer, tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", TEXTS[:20])
    splits = load(tokenizer, str(tmp_path), dev_split="validation", num_dev=2, num_test=3)
    assert tokens_of(splits.dev) == packed(tokenizer, TEXTS[:20])[:2]
    assert tokens_of(splits.test) == packed(tokenizer, TEXTS)[:3]
    assert tokens_of([*splits.train]) == packed(tokenizer, TEXTS)[3:]
    assert splits.shared == {"test in dev": 2}
    every = load(tokenizer, str(tmp_path), test_split="validation", num_dev=2, num_test=None)
    assert tokens_of(every.test) == packed(tokenizer, TEXTS[:20])


def test_a_stream_that_is_shorter_than_what_is_held_out(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", TEXTS)
    blocks = len(packed(tokenizer, TEXTS))
    with pytest.raises(
        DataError, match=f"no block of max_length={LENGTH} tokens is left .* behind the {blocks} of num_dev"
    ):
        load(tokenizer, path)
    assert len([*load(tokenizer, path, num_dev=blocks - 2, num_test=1).train]) == 1


def test_texts_at_hand_are_packed_too(tokenizer, tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", TEXTS[:20])
    splits = load(tokenizer, str(tmp_path), streaming=False, test_split="validation", num_test=None, num_dev=0)
    lengths = {len(block) for block in tokens_of(splits.train + splits.test)}
    assert lengths == {LENGTH} and abs(len(splits.train) - len(packed(tokenizer, TEXTS))) <= 1
    with pytest.raises(DataError, match="60 texts together have fewer than max_length=100000 tokens"):
        load_splits(
            tokenizer, 100_000, (), DataArguments(task="text", dataset=str(tmp_path), pack=True, num_dev=0, num_test=0)
        )


def test_rows_of_texts_are_texts_whatever_else_they_hold(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", TEXTS, prompt="it was", completion=" great")
    given = {"dataset": path, "num_dev": 0, "num_test": 0}
    texts = load_splits(tokenizer, 512, (), DataArguments(task="TEXT", **given)).train
    assert all(len(example.prompt) == 1 for example in texts)
    assert len(load_splits(tokenizer, 512, (), DataArguments(**given)).train[0].prompt) > 1


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"streaming": True},
            "streaming=True is not allowed: false unless task=text, as only whole texts can be streamed",
        ),
        ({"pack": True, "task": "sst2"}, "pack=True is not allowed: false unless task=text"),
        ({"task": "text", "streaming": True, "num_train": 5}, "num_train=5 is not allowed: none beside streaming"),
        (
            {"task": "text", "streaming": True, "num_test": None},
            "num_test=None is not allowed: a number beside streaming",
        ),
        ({"max_length": 1}, "max_length=1 is not allowed: at least 2"),
        ({"streaming": "yes"}, "streaming='yes' is not allowed: true or false"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataArguments(dataset="rows.jsonl", **settings)


def test_texts_need_a_data_set(tokenizer):
    with pytest.raises(ConfigError, match="dataset=None is not allowed: a hub name, folder or file"):
        named_data("text", None)


def test_packing_needs_an_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="pack=True is not allowed: false for a tokenizer without an EOS token"):
        load(tokenizer, write(tmp_path / "rows.jsonl", TEXTS))
