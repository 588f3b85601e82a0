"""What every task makes of a row, letter by letter; the official encodings of real rows are in test_golden_tasks."""

import sys
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.selection import RowArguments, drawn_rows
from sglang.srt.mezo.data.tasks import TASKS, TextExample, final, get_task

PAIR = {"sentence1": "It rained all day.", "sentence2": "The day was wet.", "label": 1}
NLI = {"premise": "It rained all day.", "hypothesis": "The day was wet.", "label": 1}
NO_YES, YES_NO = ("No", "Yes"), ("Yes", "No")
RENDERED = {
    "sst2": ({"sentence": " a fine film . ", "label": 1}, "a fine film . It was", (" terrible", " great"), 1),
    "sst5": (
        {"text": "a fine film .", "label": 3},
        "a fine film . It was",
        (" terrible", " bad", " okay", " good", " great"),
        3,
    ),
    "trec": (
        {"text": "Who wrote it ?", "coarse_label": 3},
        "Question: Who wrote it ?\nType of answer:",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        3,
    ),
    "mnli": (
        NLI,
        'Suppose It rained all day. Can we infer that "The day was wet."? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        1,
    ),
    "snli": (
        NLI,
        'Suppose It rained all day. Can we infer that "The day was wet."? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        1,
    ),
    "cb": (
        NLI,
        'Suppose It rained all day. Can we infer that "The day was wet."? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        1,
    ),
    "rte": (PAIR, 'It rained all day.\nDoes this mean that "The day was wet." is true? Yes or No?\n', YES_NO, 1),
    "mrpc": (
        PAIR,
        "It rained all day.\nThe day was wet.\nDo these two sentences mean the same? Yes or No?\n",
        NO_YES,
        1,
    ),
    "copa": (
        {
            "premise": "The day was wet. ",
            "choice1": "I'm here.",
            "choice2": "I slept.",
            "question": "cause",
            "label": 1,
        },
        "The day was wet because",
        (" i'm here.", " I slept."),
        1,
    ),
    "boolq": (
        {"passage": "Rain is water.", "question": "is rain wet", "label": 1},
        "Rain is water. Is rain wet?\n",
        YES_NO,
        0,
    ),
    "wic": (
        {"word": "rain", "sentence1": "The rain fell.", "sentence2": "It rained.", "label": 0},
        'Does the word "rain" have the same meaning in these two sentences? Yes, No?\nThe rain fell.\nIt rained.\n',
        NO_YES,
        0,
    ),
    "wsc": (
        {"text": "Ann saw Eve, and She left.", "span1_text": "Ann", "span2_text": "She", "label": 1},
        'Ann saw Eve, and She left.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        NO_YES,
        1,
    ),
    "multirc": (
        {"paragraph": "\nIt rained.", "question": "Was it wet?", "answer": "yes", "label": 1},
        'It rained.\nQuestion: Was it wet?\nI found this answer "yes". Is that correct? Yes or No?\n',
        NO_YES,
        1,
    ),
    "record": (
        {
            "passage": "Ann met Eve.\n@highlight\nEve left",
            "query": "Then @placeholder slept.",
            "entities": ["Ann", "Eve"],
            "answers": ["Eve"],
        },
        "Ann met Eve.\n- Eve left\n-",
        (" Then Ann slept.", " Then Eve slept."),
        1,
    ),
    "squad": (
        {
            "title": "Rain",
            "context": "Rain is water.",
            "question": " What is rain? ",
            "answers": {"text": ["water", "wet"]},
        },
        "Title: Rain\nContext: Rain is water.\nQuestion: What is rain?\nAnswer:",
        (" water\n",),
        0,
    ),
    "drop": (
        {"passage": "Two and two.", "question": "How many?", "answers_spans": {"spans": ["four", "4"]}},
        "Passage: Two and two.\nQuestion: How many?\nAnswer:",
        (" four\n",),
        0,
    ),
}


def test_every_task_is_looked_at_and_on_its_page():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert RENDERED.keys() == TASKS.keys()
    assert [name for name in TASKS if f"`{name}`" not in page] == []
    assert [task.name for task in TASKS.values() if f"`{task.dataset[0]}`" not in page] == []


@pytest.mark.parametrize("name", RENDERED)
def test_a_row_in_words(name):
    row, prompt, options, label = RENDERED[name]
    text = final(get_task(name).render(row))
    assert (text.prompt, text.options, text.label) == (prompt, options, label)


@pytest.mark.parametrize("name", RENDERED)
def test_every_prompt_ends_with_the_invocation(name):
    task, (row, *_) = get_task(name), RENDERED[name]
    if name == "copa":
        assert task.invocation is None
    else:
        assert final(task.render(row)).prompt.endswith(task.invocation)


MASKED = {
    "sst2": ("a fine film .  It was|.", (" terrible", " great")),
    "sst5": ("a fine film . It was|.", (" terrible", " bad", " okay", " good", " great")),
    "trec": ("|: Who wrote it ?", (" Expression", " Entity", " Description", " Human", " Location", " Number")),
    "mnli": ("It rained all day?|, the day was wet.", (" Yes", " Maybe", " No")),
    "snli": ("It rained all day?|, the day was wet.", (" Yes", " Maybe", " No")),
    "rte": ("It rained all day?|, the day was wet.", (" Yes", " No")),
    "mrpc": ("It rained all day.|, the day was wet.", (" No", " Yes")),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_row_in_words_around_a_mask(name):
    task, (row, *_, label) = get_task(name), RENDERED[name]
    if name not in MASKED:
        with pytest.raises(DataError, match=f"task {name} has no form for masked language models"):
            task.render_masked(row)
        return
    text = task.render_masked(row)
    before, after = (
        "".join(piece if isinstance(piece, str) else piece[0] for piece in part) for part in (text.before, text.after)
    )
    around, words = MASKED[name]
    assert (f"{before}|{after}", text.options, text.label) == (around if name != "sst2" else " " + around, words, label)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": 2}, "label=2 must be a class from 0 to 1"),
        ("sst2", {"label": True}, "label=True must be a class"),
        ("trec", {"coarse_label": -1}, "coarse_label=-1 must be a class from 0 to 5"),
        ("rte", {"sentence2": None}, "sentence2=None must be a string"),
        ("copa", {"question": "why"}, "question='why' must be cause or effect"),
        ("record", {"answers": ["Bob"]}, "answers=.'Bob'. are none of the entities"),
        ("record", {"entities": []}, "entities=.. must be a list of strings, one at least"),
        ("squad", {"answers": {"text": []}}, "answers=.. must be a list of strings, one at least"),
        ("squad", {"answers": None}, "answers=None must be an object with 'text'"),
        ("squad", {"answers": ["text"]}, "answers=.* must be an object with 'text'"),
        ("drop", {"answers_spans": {"types": []}}, "answers_spans=.* must be an object with 'spans'"),
        ("drop", {"answers_spans": {"spans": [4]}}, "answers_spans=4 must be a string"),
        ("wic", {"word": "\ud800"}, "word is no Unicode text"),
    ],
)
def test_what_is_wrong_with_a_row(name, change, message):
    with pytest.raises(DataError, match=message):
        get_task(name).render(RENDERED[name][0] | change)


def test_published_results_are_of_the_official_rows():
    """Of ../shared/golden/README.md, section 3: 2,210 of SST-5 are its test rows; the official code takes the
    development rows of SNLI, as of GLUE."""
    splits = {name: get_task(name).eval_split for name in ("sst2", "sst5", "trec", "mnli", "snli", "rte", "mrpc")}
    assert splits == {
        **dict.fromkeys(("sst2", "snli", "rte", "mrpc"), "validation"),
        **dict.fromkeys(("sst5", "trec"), "test"),
        "mnli": "validation_matched",
    }


def test_a_row_without_a_common_judgement_is_passed_over():
    assert not get_task("snli").is_labelled(NLI | {"label": -1}) and get_task("snli").is_labelled(NLI)


def test_all_right_answers_of_a_row_count():
    row = RENDERED["record"][0] | {"answers": ["Eve", "Ann"]}
    text = get_task("record").render(row)
    assert (text.label, text.right) == (1, (0, 1))


def test_demonstrations_stand_before_the_prompt():
    text = TextExample("Is it? ", (" no", " yes"), 1)
    assert text.demonstration == "Is it?  yes"
    assert final(text, ["\nIt is. yes", "It is not. no\n"]).prompt == "It is. yes\n\nIt is not. no\n\nIs it? "


# --- a user's own -----------------------------------------------------------------------------------------------------

OWN = """
from sglang.srt.mezo.data.tasks import Task, TextExample


class Weather(Task):
    name = "weather"
    dataset = ("mine/weather",)
    invocation = "\\nWas it wet?"

    def render(self, row):
        return TextExample(f"{row['report']}\\nWas it wet?", (" no", " yes"), row["wet"])


class Bare(Task):
    def render(self, row):
        return TextExample(row["reports"][0].strip() + " Wet?", (" no", " yes"), row["wet"])


class NoTask:
    pass


class Unfinished(Task):
    name = "unfinished"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_tasks", None)


def test_a_task_of_ones_own(own):
    task = get_task("my_tasks:Weather")
    assert final(task.render({"report": "Rain.", "wet": 1})).prompt == "Rain.\nWas it wet?"


def test_a_task_that_says_no_more_than_it_must(own):
    assert get_task("my_tasks:Bare").name == "Bare"
    with pytest.raises(
        ConfigError, match="dataset=None is not allowed: a hub name, folder or file, as task Bare names"
    ):
        named_data("my_tasks:Bare", None)
    assert named_data("my_tasks:Bare", "rows.jsonl").path == "rows.jsonl"


@pytest.mark.parametrize("row", ['{"reports": [], "wet": 1}', '{"reports": [null], "wet": 1}'])
def test_whatever_a_task_makes_of_a_bad_row_names_the_row(own, row):
    (own / "rows.jsonl").write_text('{"reports": ["Rain."], "wet": 1}\n' + row + "\n")
    named = named_data("my_tasks:Bare", "rows.jsonl")
    with pytest.raises(DataError, match="rows.jsonl:2: (IndexError|AttributeError): "):
        drawn_rows(named, RowArguments("my_tasks:Bare", "rows.jsonl", k=1))


@pytest.mark.parametrize(
    "name", ["my_tasks:NoTask", "my_tasks:Unfinished", "my_tasks:none", "nowhere:Task", "os:path", ":"]
)
def test_what_is_no_task_is_refused(own, name):
    with pytest.raises(ConfigError, match=f"task='{name}' is not allowed: module:Class, a Task of"):
        get_task(name)
