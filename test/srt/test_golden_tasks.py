"""Every task against what the official code made of the same rows: texts, token ids, cuts, demonstrations, drawn rows.

What differs by design is listed here: ``INDEX``.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2TokenizerFast, RobertaTokenizer

from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.data.masked import MaskedEncoder
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.sampling import sets_of_demonstrations
from sglang.srt.mezo.data.splits import DataArguments, drawn_rows, written_test
from sglang.srt.mezo.data.tasks import Task, final, get_task
from sglang.srt.mezo.scoring.plan import ExamplePlan
from sglang.srt.mezo.scoring.readout import batch_loss

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the official encodings are not here")

INDEX = ("trec", "mnli", "snli")
"""Tasks whose classes are numbered as in the data set's Hugging Face schema; the official code for masked language
models numbers them otherwise, so that the index of the right option differs, and not the option."""
FILES = (
    "sst2",
    "sst5",
    "trec",
    "mnli",
    "snli",
    "rte",
    "mrpc",
    "cb",
    "copa",
    "boolq",
    "wic",
    "wsc",
    "multirc",
    "record",
)
WRITTEN = ("squad", "drop")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row_of(golden: dict) -> dict:
    """The row that the official code was given."""
    if "data" in golden:
        return golden["data"]
    return lines(SHARED / "data" / get_task(golden["task"]).name / f"{golden['split']}.jsonl")[golden["row"]]


def cases(family: str, *names: str) -> list:
    if not GOLDEN.is_dir():
        return []
    rows = [row for name in (*names, "edge") for row in lines(GOLDEN / f"{name}.jsonl")]
    tasks = {get_task(name) for name in names}
    rows = [row for row in rows if row["family"] == family and get_task(row["task"]) in tasks]
    return [pytest.param(row, id=f"{row['task']}-{row['split']}-{row['row']}") for row in rows]


def goldens(name: str) -> list[dict]:
    return lines(GOLDEN / f"{name}.jsonl") if GOLDEN.is_dir() else []


def files() -> list[str]:
    return [str(GOLDEN / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]


@pytest.fixture(scope="module")
def opt():
    """OPT's tokenizer with the BOS token of the goldens."""
    tokenizer = GPT2TokenizerFast(*files(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def roberta():
    return RobertaTokenizer(*files())


@pytest.mark.parametrize("golden", cases("decoder", *FILES))
def test_a_choice_is_the_official_one(golden, opt):
    task, row, official = get_task(golden["task"]), row_of(golden), golden["opt"]
    text = final(task.render(row))
    assert (text.prompt, list(text.options)) == (golden["prompt"], golden["options"])
    gold = golden["gold"] if isinstance(golden["gold"], list) else [golden["gold"]]
    assert sorted(text.right or (text.label,)) == sorted(gold) and text.label == golden["train_gold"]
    assert demonstration(task, row) == golden["icl_demo"]
    calibration = task.calibration(text)
    assert calibration == golden["sfc"]["prompt"]
    assert [(calibration + option).strip(" ") for option in text.options] == golden["sfc"]["full"]
    [example] = Encoder(opt, 2048, task).encode(row)
    assert [len(option) for option in example.options] == official["option_lens"]
    assert [len(example.prompt) + len(option) for option in example.options] == official["full_lens"]
    assert [*example.prompt, *example.options[example.label]] == official["gold_ids"]
    if "option_ids" in official:
        assert list(map(list, example.options)) == official["option_ids"]


@pytest.mark.parametrize("golden", cases("decoder", *WRITTEN))
def test_an_answer_is_the_official_one(golden, opt):
    task, row, official = get_task(golden["task"]), row_of(golden), golden["opt"]
    text = final(task.render(row))
    assert (text.prompt, text.options, list(text.answers)) == (
        golden["prompt"],
        (golden["train_option"],),
        golden["answers"],
    )
    assert text.prompt + text.options[0] == golden["full_gold_text"] and demonstration(task, row) == golden["icl_demo"]
    [example] = Encoder(opt, 2048, task).encode(row)
    assert [len(example.options[0])] == official["option_lens"]
    assert [*example.prompt, *example.options[0]] == official["gold_ids"]


LONG = [case for case in cases("decoder", *FILES, *WRITTEN) if "truncated_gold" in case.values[0]]


@pytest.mark.parametrize("golden", LONG)
def test_a_long_row_loses_what_the_official_code_cuts(golden, opt):
    task, cut = get_task(golden["task"]), golden["truncated_gold"]
    assert task.max_new_tokens in (None, cut["max_new_tokens"])
    [example] = Encoder(opt, cut["max_length"], task, right_only=True).encode(row_of(golden))
    assert [*example.prompt, *example.options[0]] == cut["ids"] and len(example.options[0]) == cut["option_len"]


@pytest.mark.parametrize("golden", cases("mlm", *FILES))
def test_a_masked_row_is_the_official_one(golden, roberta):
    task, official = get_task(golden["task"]), golden["roberta"]
    [example] = MaskedEncoder(roberta, 512, task).encode(row_of(golden))
    assert (list(example.prompt), example.mask) == (official["ids"], official["mask_pos"])
    words = [word for option in example.options for word in option]
    gold = official["label_word_ids"][golden["options"].index(golden["gold_word"])]
    assert sorted(words) == sorted(official["label_word_ids"]) and words[example.label] == gold
    if task.name not in INDEX:
        assert words == official["label_word_ids"]


def demonstration(task: Task, row: dict) -> str:
    return final(task.render(row)).demonstration


@pytest.mark.parametrize("golden", goldens("icl"), ids=lambda one: one["task"])
def test_demonstrations_are_the_official_ones(golden, opt):
    task, cut = get_task(golden["task"]), golden["truncated"]
    folder = SHARED / "data" / task.name
    train, test = (lines(folder / f"{split}.jsonl") for split in ("train", "validation"))
    shown = [demonstration(task, train[place]) for place in golden["demos"]["rows"]]
    row = SourceRow(test[golden["eval"]["row"]], "golden", 1, demonstrations=shown)
    text = final(task.render(row.fields), shown)
    if task.max_new_tokens is None:
        [example] = Encoder(opt, 2048, task).encode_rows([row])
        [short] = Encoder(opt, cut["max_length"], task).encode_rows([row])
        assert [text.prompt + option for option in text.options] == golden["full"]
        assert [len(example.prompt) + len(option) for option in example.options] == golden["opt"]["full_lens"]
        assert [len(option) for option in example.options] == golden["opt"]["option_lens"] == cut["option_lens"]
        if short.options[0] == max(short.options, key=len):  # the official code cuts before each option anew
            assert [*short.prompt, *short.options[0]] == cut["ids_first"]
    else:
        written = written_test(task, "completion")
        [example] = Encoder(opt, 2048, task, generation=written).encode_rows([row])
        [short] = Encoder(opt, cut["max_length"], task, generation=written).encode_rows([row])
        assert [text.prompt] == golden["full"] and list(short.prompt) == cut["ids_first"]


@pytest.mark.parametrize("golden", goldens("sampling"), ids=lambda one: f"{one['task']}-{one['kind']}")
def test_drawn_rows_are_the_official_ones(golden):
    if golden["kind"] == "icl_demos_per_eval_sample":
        sets = sets_of_demonstrations(range(golden["pool_train"]), golden["num_train"], golden["sets"])
        assert sets[:3] == golden["demo_rows_of_first_3"] and len(sets) == golden["sets"]
        return
    wanted = {name: golden[name] for name in ("num_train", "num_dev")}
    data = DataArguments(
        golden["task"],
        str(SHARED / "data" / get_task(golden["task"]).name),
        num_test=golden["num_eval"],
        train_set_seed=golden["seed"],
        **wanted,
    )
    parts = drawn_rows(named_data(data.task, data.dataset), data)
    for name, rows in zip(("train", "dev", "eval"), parts):
        places = [row.line - 1 for row in rows]
        first, last = golden[f"{name}_rows_first"], golden.get(f"{name}_rows_last", [])
        assert len(places) == golden[f"{name}_len"]
        assert places[: len(first)] == first and places[len(places) - len(last) :] == last


@pytest.mark.parametrize("golden", goldens("kshot"), ids=lambda one: f"{one['task']}-{one['k']}-{one['seed']}")
def test_few_rows_are_the_official_ones(golden):
    data = DataArguments(
        golden["task"],
        str(SHARED / "data" / golden["folder"]),
        test_split="validation",
        k=golden["k"],
        train_set_seed=golden["seed"],
    )
    train, dev, test = (
        [row.line - 1 for row in part] for part in drawn_rows(named_data(data.task, data.dataset), data)
    )
    assert train == golden["train_rows"] and dev == golden["dev_rows"]
    assert len(test) == golden["test_len"] and test[:5] == golden["test_rows_first"]


@pytest.mark.parametrize("golden", goldens("loss"), ids=lambda one: one["case"])
def test_a_loss_is_the_official_one(golden):
    """But for an option's token with the number of the pad token, which is no padding here and counts."""
    log_probs = torch.tensor(golden["logits"], dtype=torch.float64).log_softmax(dim=-1)
    counts, labels, reads, plans = [], [], [], []
    alone = golden["num_options"] is None
    for row, (ids, length) in enumerate(zip(golden["input_ids"], golden["option_len"])):
        places = range(len(ids) - length, len(ids))
        read = [log_probs[row, place - 1, ids[place]].item() for place in places]
        if alone and golden["pad_token_id"] in ids[-length:]:
            read = [value for place, value in zip(places, read) if ids[place] != golden["pad_token_id"]]
        reads += read
        counts.append(len(read))
        labels.append(0 if alone else golden["labels"][row])
    first = 0
    while first < len(counts):
        count = 1 if alone else golden["num_options"][first]
        lengths = counts[first : first + count]
        of_read = tuple(option for option, length in enumerate(lengths) for _ in range(length))
        plans.append(ExamplePlan((), of_read, tuple(lengths), labels[first], right=(labels[first],)))
        first += count
    objective = "completion" if alone else "classification"
    assert batch_loss(plans, torch.tensor([reads]), objective).mean.item() == pytest.approx(golden["loss"], abs=1e-6)
