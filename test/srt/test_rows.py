"""Files, folders and data sets to rows: every format that users have, however it is named, and what is wrong with
the others."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.rows import SourceRow, has_splits, read_jsonl, read_rows
from sglang.srt.mezo.data.streams import stream_rows

ROWS = [
    {"prompt": "it was", "options": [" great", " bad"], "label": 1},
    {"prompt": "it is", "options": [" so", " not"], "label": 0},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = 'prompt,options,label\nit was,"["" great"", "" bad""]",1\nit is,"["" so"", "" not""]",0\n'
CONTENTS = {
    ".jsonl": LINES.encode(),
    ".ndjson": LINES.encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": TABLE.encode(),
    ".tsv": TABLE.replace(",", "\t").replace('""\t', '"",').encode(),
}
COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def fields(path: Path, split: str = "train") -> list[dict]:
    return [row.whole_fields() for row in read_rows(str(path), split)]


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path: Path, rows: list[dict] = ROWS) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("ending", CONTENTS)
def test_every_format_is_read_however_its_name_is_written(tmp_path, ending, written):
    write(tmp_path / f"rows{written(ending)}", CONTENTS[ending])
    assert fields(tmp_path / f"rows{written(ending)}") == ROWS


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("ending", CONTENTS)
def test_compressed_files_are_read(tmp_path, ending, compression):
    for name in (f"rows{ending}{compression}", f"ROWS{ending}{compression}".upper()):
        write(tmp_path / name, COMPRESSED[compression](CONTENTS[ending]))
        assert fields(tmp_path / name) == ROWS


def test_the_file_in_an_archive_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.jsonl.zip", "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    assert fields(tmp_path / "rows.jsonl.zip") == ROWS


def test_parquet_is_read(tmp_path):
    write_parquet(tmp_path / "rows.Parquet")
    assert fields(tmp_path / "rows.Parquet") == ROWS


def test_what_parquet_adds_to_messages_is_left_out_again(tmp_path):
    """All objects of a column have the same keys there."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    write_parquet(tmp_path / "rows.parquet", [{"messages": messages, "note": None}])
    assert fields(tmp_path / "rows.parquet") == [{"messages": messages, "note": None}]


def test_a_text_file_has_a_row_for_every_line_that_is_not_blank(tmp_path):
    path = write(tmp_path / "book.txt", "two\r\n\rlines\n")
    assert read_rows(path, "train") == [SourceRow({"text": "two"}, path, 1), SourceRow({"text": "lines"}, path, 3)]
    assert fields(Path(write(tmp_path / "BOOK.TXT.gz", gzip.compress(b"two\n\nlines")))) == [
        {"text": "two"},
        {"text": "lines"},
    ]


def test_lines_of_a_text_file_are_those_that_datasets_reads(tmp_path, cache):
    path = write(tmp_path / "odd.txt", "one\u2028two\x0cthree\x85four\nfive\r\nsix \n")
    streamed = [row.fields for row in stream_rows(path, "train")]
    assert fields(Path(path)) == streamed and len(streamed) == 3


def test_json_may_be_an_array_or_lines_or_one_row(tmp_path):
    for content, number in (
        (json.dumps(ROWS), 2),
        (LINES, 2),
        (json.dumps(ROWS[0], indent=1), 1),
        (" \n" + json.dumps(ROWS), 2),
    ):
        assert fields(Path(write(tmp_path / "rows.json", content))) == ROWS[:number]


def test_an_array_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="rows.json: it has no rows"):
        read_rows(write(tmp_path / "rows.json", "[]"), "train")


def test_rows_of_an_array_are_counted(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps([ROWS[0], 5]))
    assert read_rows(path, "train")[1] == SourceRow({}, path, 2, "a JSON object is needed, not int")


def test_jsonl_rows_keep_their_line_numbers(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\n\n   \n{"text": "b"}\n')
    assert read_rows(path, "any") == [SourceRow({"text": "a"}, path, 1), SourceRow({"text": "b"}, path, 4)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path, name):
    write(tmp_path / name, b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "caf\xc3\xa9"}\r\n')
    assert fields(tmp_path / name) == [{"text": "a"}, {"text": "café"}]
    write(tmp_path / "rows.csv", b"\xef\xbb\xbftext\r\na\r\ncaf\xc3\xa9\r\n")
    assert fields(tmp_path / "rows.csv") == [{"text": "a"}, {"text": "café"}]


def test_columns_of_a_table_are_text_but_for_labels_and_lists(tmp_path):
    """An answer of digits is an answer, and the word null a word."""
    path = write(tmp_path / "rows.csv", 'prompt,completion,label\n12 + 30 =, 42,0\nthe word, null,1\n"two\nlines",,x\n')
    assert read_rows(path, "train") == [
        SourceRow({"prompt": "12 + 30 =", "completion": " 42", "label": 0}, path, 2),
        SourceRow({"prompt": "the word", "completion": " null", "label": 1}, path, 3),
        SourceRow({"prompt": "two\nlines", "completion": "", "label": "x"}, path, 4),
    ]


def test_a_table_holds_rows_of_any_task(tmp_path):
    path = write(
        tmp_path / "rows.csv",
        'text,coarse_label,entities,answers_spans\nWho?,3,"[""Ann"", ""Eve""]","{""spans"": [""Ann""]}"\n',
    )
    [row] = read_rows(path, "train")
    assert row.fields == {
        "text": "Who?",
        "coarse_label": 3,
        "entities": ["Ann", "Eve"],
        "answers_spans": {"spans": ["Ann"]},
    }


def test_a_line_may_have_a_length(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "abc"}\n')
    assert len(list(read_jsonl(path, "rows.jsonl", max_line_bytes=16))) == 2
    with pytest.raises(DataError, match="rows.jsonl:2: the line is longer than 15 bytes"):
        list(read_jsonl(path, "rows.jsonl", max_line_bytes=15))


# --- what is wrong with a file ----------------------------------------------------------------------------------------

BROKEN = {
    "rows.csv": (b"prompt,completion\na,b\nc,d,e\n", r":3: more values than the header has columns: \['e'\]"),
    "quoted.csv": (b'prompt,completion\na,"b\n', "not a table: unexpected end of data"),
    "bytes.csv": (b"prompt\ncaf\xe9\n", "not UTF-8 text"),
    "wide.csv": ("prompt\na\n".encode("utf-16"), "not UTF-8 text"),
    "bytes.tsv": (b"prompt\ncaf\xe9\n", "not UTF-8 text"),
    "bytes.txt": (b"caf\xe9", "not UTF-8 text"),
    "bytes.json": (b'[{"text": "caf\xe9"}]', "not JSON: .*can't decode byte 0xe9"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2: not JSON: .*can't decode byte 0xe9"),
    "cut.json": (b'[{"text": "a"}, {"te', "not JSON: "),
    "deep.json": (b"[" * 100_000, "not JSON: maximum recursion depth"),
    "words.json": (b"hello", ":1: not JSON"),
    "words.parquet": (b"hello", "not a Parquet file"),
    "cut.parquet": (b"PAR1" + bytes(50), "not a Parquet file"),
    "empty.parquet": (b"", "not a Parquet file"),
    "words.jsonl.gz": (b"hello", "[Nn]ot a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 100)[:-9], "cannot be decompressed"),
    "words.csv.xz": (b"hello", "cannot be decompressed"),
    "words.csv.bz2": (b"hello", "cannot be read: Invalid data stream"),
    "words.json.zip": (b"hello", "cannot be decompressed"),
    "rows.dat": (b"hello", "the end of a file's name tells its format: .jsonl, .*.parquet, and after it .gz"),
    "rows": (b"hello", "the end of a file's name tells its format"),
    "rows.gz": (b"hello", "the end of a file's name tells its format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    with pytest.raises(DataError, match=f"^{tmp_path / name}.*{reason}"):
        fields(Path(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    "path",
    [
        "missing.jsonl",
        "missing.JSONL.gz",
        "missing.txt",
        "missing.csv",
        "./missing",
        "../missing/folder",
        "/missing",
        "~/missing",
        "a/b/c",
    ],
)
def test_what_is_not_there_is_named(path):
    with pytest.raises(DataError) as caught:
        read_rows(path, "train")
    assert str(caught.value) == f"{path}: no such file or folder"


@pytest.mark.parametrize("url", ["https://example.com/x.jsonl", "hf://datasets/a/b/x.parquet", "s3://bucket/x"])
def test_a_url_is_named_as_it_is(url):
    with pytest.raises(DataError) as caught:
        read_rows(url, "train")
    assert str(caught.value) == f"{url}: nothing is fetched from a URL: download the file and name that"


def test_a_name_that_is_too_long_is_an_error_like_others():
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_rows("./" + "a" * 5000, "train")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl", LINES))
    path.chmod(0)
    with pytest.raises(DataError, match="rows.jsonl: cannot be read: Permission denied"):
        fields(path)


def test_a_data_set_that_cannot_be_reached_is_an_error_in_one_line():
    with pytest.raises(DataError, match="^nobody/nothing: cannot load split 'train': ") as caught:
        read_rows("nobody/nothing", "train")
    assert "\n" not in str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl", "train.JSON", "train.csv", "train.tsv.gz"])
def test_a_folder_gives_the_file_of_the_split(tmp_path, name):
    ending = "." + name.split(".")[1].lower()
    write(tmp_path / name, gzip.compress(CONTENTS[ending]) if name.endswith("gz") else CONTENTS[ending])
    write(tmp_path / "validation.jsonl", '{"text": "b"}\n')
    write(tmp_path / "README.md", "a data set")
    assert fields(tmp_path) == ROWS
    assert fields(tmp_path, "validation") == [{"text": "b"}]


def test_a_split_in_two_files_is_refused(tmp_path):
    for name in ("train.jsonl", "train.csv"):
        write(tmp_path / name, CONTENTS[f".{name.split('.')[1]}"])
    with pytest.raises(DataError, match="more than one file for split 'train': train.csv, train.jsonl"):
        fields(tmp_path)


def test_a_folder_as_the_hub_has_it_is_read_by_datasets(tmp_path, cache):
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    rows = read_rows(str(tmp_path / "set"), "train")
    assert rows[1] == SourceRow(ROWS[1], f"{tmp_path / 'set'}[train]", 2)
    with pytest.raises(DataError, match="cannot load split 'test'") as caught:
        fields(tmp_path / "set", "test")
    assert "\n" not in str(caught.value)


def test_what_datasets_stored_is_read(tmp_path, cache):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one")
    assert fields(tmp_path / "splits") == fields(tmp_path / "one") == ROWS
    assert fields(tmp_path / "splits", "test") == ROWS[:1]
    assert has_splits(str(tmp_path / "splits")) and not has_splits(str(tmp_path / "one"))
    with pytest.raises(DataError, match="cannot load split 'dev'"):
        fields(tmp_path / "splits", "dev")


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_data_set_with_a_script_is_read_as_the_hub_has_converted_it(tmp_path, monkeypatch):
    """``datasets`` itself says that it runs no scripts; there is no hub here to have the conversion from."""
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("")
    asked, real = [], datasets.load_dataset

    def hub(path, config, **given):
        asked.append((path, config, given.get("revision")))
        return real(str(tmp_path / "scripted")) if len(asked) == 1 else [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    [row] = read_rows("some/scripted", "train", "config")
    assert row.fields == {"text": "a"}
    assert asked == [("some/scripted", "config", None), ("some/scripted", "config", "refs/convert/parquet")]
