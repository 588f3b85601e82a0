"""Which rows are drawn: fixed by a seed, and where a task is named those of the paper's code."""

import json
from dataclasses import replace

import pytest

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.sampling import few_of_each, permuted, sets_of_demonstrations, shuffled
from sglang.srt.mezo.data.selection import RowArguments, drawn_rows, with_demonstrations
from sglang.srt.mezo.data.tasks import get_task


@pytest.mark.parametrize("drawn", [shuffled, permuted])
def test_the_order_is_a_function_of_the_seed(drawn):
    order = drawn(range(100), 1)
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert order == drawn(range(100), 1) != drawn(range(100), 2)


def test_the_order_of_a_task_is_that_of_the_papers_code():
    assert permuted(range(1000), 0)[:5] == [993, 859, 298, 553, 672]
    assert sets_of_demonstrations(range(1000), 32, 100)[0][:5] == [326, 390, 945, 681, 633]


def test_few_of_each_class():
    train, dev = few_of_each(range(20), [place % 3 == 0 for place in range(20)], 4, 13)
    assert [place % 3 == 0 for place in train] in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4)
    assert len(dev) == 3 + 4 and not {*train} & {*dev}  # of seven of a class there are three left


@pytest.fixture
def folder(tmp_path) -> str:
    for split, count in (("train", 40), ("validation", 12)):
        rows = [{"sentence": f"{split} {place}", "label": place % 2} for place in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def places(data: RowArguments) -> list[list[int]]:
    return [[row.line - 1 for row in part] for part in drawn_rows(named_data(data.task, data.dataset), data)]


def test_a_task_with_splits_has_the_rows_of_the_papers_code(folder):
    data = RowArguments("sst2", folder, num_train=20, num_dev=10, num_test=5)
    order, tests = permuted(range(40), 0), permuted(range(12), 0)
    assert places(data) == [order[:20], order[20:30], tests[:5]]
    assert places(replace(data, num_train=1000)) == [order[:30], order[30:], tests[:5]]
    assert places(replace(data, num_train=1000, num_dev=None)) == [[], order, tests[:5]]
    assert places(replace(data, train_set_seed=3))[0] == permuted(range(40), 3)[:20]
    assert places(replace(data, num_train=None, num_dev=0, num_test=None)) == [order, [], tests]


def test_the_paper_chooses_by_fewer_rows_of_small_tasks():
    assert {task: RowArguments(task).dev_rows(get_task(task)) for task in ("cb", "copa", "wsc")} == {
        "cb": 100,
        "copa": 100,
        "wsc": 500,
    }


def test_rows_of_a_file_are_held_out(folder):
    train, dev, test = places(RowArguments("sst2", f"{folder}/train.jsonl"))
    assert (len(train), len(dev), len(test)) == (26, 6, 8) and sorted(train + dev + test) == list(range(40))


def test_few_rows_of_each_class_and_all_tests(folder):
    train, dev, test = places(RowArguments("sst2", folder, k=4, train_set_seed=42))
    assert (train, dev) == few_of_each(range(40), [place % 2 for place in range(40)], 4, 42)
    assert test == list(range(12))
    assert len(places(RowArguments("sst2", folder, k=4, num_test=5))[2]) == 5


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"task": None}, "k"),
        ({"task": "text"}, "k"),
        ({"num_train": 100}, "num_train"),
        ({"num_dev": 100}, "num_dev"),
        ({"dev_split": "validation"}, "dev_split"),
        ({"k": 0}, "k"),
    ],
)
def test_few_rows_go_with_a_task_alone(given, field):
    with pytest.raises(ConfigError) as refusal:
        RowArguments(**{"task": "sst2", "k": 16, **given})
    assert refusal.value.field == field


@pytest.mark.parametrize("task", ["copa", "record", "squad"])
def test_few_rows_are_of_classes(folder, task):
    with pytest.raises(ConfigError, match="k=16 is not allowed: none for a task without classes"):
        drawn_rows(named_data(task, folder), RowArguments(task, folder, k=16))


def test_a_row_without_a_class_is_named(folder, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": "no"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:2: label='no' must be a class from 0 to 1"):
        places(RowArguments("sst2", folder, k=1))


def test_rows_are_shown_before_each_other_row(folder):
    named = named_data("sst2", folder)
    shown = with_demonstrations(named, named.rows("validation")[:2], 3, "raise")
    drawn = sets_of_demonstrations(range(40), 3, 2)
    words = (" terrible", " great")
    assert [row.demonstrations for row in shown] == [
        [f"train {place} It was{words[place % 2]}" for place in own] for own in drawn
    ]


def test_no_row_that_is_asked_is_shown_with_its_answer(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"sentence": "row {place}", "label": 1}}\n' for place in range(30)))
    named = named_data("sst2", str(file))
    rows = named.rows("test")
    shown = {words for row in with_demonstrations(named, rows[:20], 32, "raise") for words in row.demonstrations}
    assert shown == {f"row {place} It was great" for place in range(20, 30)}
    with pytest.raises(ConfigError, match=r"num_demonstrations=4 is not allowed: 0 where all rows of .*rows.jsonl"):
        with_demonstrations(named, rows, 4, "raise")


def test_a_bad_row_is_not_shown_nor_drawn(folder, caplog):
    with open(f"{folder}/train.jsonl", "a") as file:
        file.write('{"sentence": null, "label": 0}\n')
    named, few = named_data("sst2", folder), RowArguments("sst2", folder, k=20)
    with pytest.raises(DataError, match="train.jsonl:41: sentence=None must be a string"):
        with_demonstrations(named, named.rows("validation"), 40, "raise")
    with pytest.raises(DataError, match="train.jsonl:41: sentence=None must be a string"):
        places(few)
    shown = with_demonstrations(named, named.rows("validation"), 40, "skip")
    assert all(len(row.demonstrations) == 40 for row in shown) and "skipped" in caplog.text
    assert sorted(places(replace(few, on_bad_row="skip"))[0]) == list(range(40))
