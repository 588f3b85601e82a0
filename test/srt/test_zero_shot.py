"""What the engine makes of the rows of every task, row by row, against Transformers alone, in float32.

Real rows on a real model are in ``benchmarks/zero_shot.py``.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_process import EngineProcess
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.tasks import final, get_task
from sglang.srt.mezo.training.evaluate import EvaluateArguments, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments
from test_examples import ROOT
from test_tasks import RENDERED

MODEL = ROOT / "examples" / "assets" / "opt-reviews"
ARGUMENTS = ModelArguments(str(MODEL), "float32")
WRITTEN = ("squad", "drop")


def measured(engine, arguments: EvaluateArguments):
    from sglang.srt.mezo.training.evaluate import measure_on, read_evaluation

    return measure_on(engine, str(MODEL), read_evaluation(ARGUMENTS, arguments), arguments)


@pytest.fixture(scope="module")
def engine():
    process = EngineProcess(
        model_path=str(MODEL), r=1, target_modules=(), num_slots=1, dtype="float32", max_total_tokens=8000
    )
    yield process
    process.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each task's row, and another one with another answer, as its training and its validation rows."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (row, *_) in RENDERED.items():
        rows = [row, {column: other(column, value) for column, value in row.items()}]
        for split in ("train", get_task(name).eval_split):
            (folder / name).mkdir(exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


def other(column: str, value):
    """Words in another order, and the first class."""
    if isinstance(value, int):
        return 0
    if isinstance(value, str) and column not in ("question", "query"):
        return " ".join(reversed(value.split(" ")))
    return value


class Oracle:
    def __init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def log_probs(self, prompt: str, option: str) -> torch.Tensor:
        """Of the option's tokens."""
        before = self.tokenizer(prompt).input_ids
        return self.read(before, self.tokenizer(prompt + option).input_ids[len(before) :])

    @torch.no_grad()
    def read(self, prompt: list[int], option: list[int]) -> torch.Tensor:
        read = self.model(torch.tensor([[*prompt, *option]])).logits[0].log_softmax(-1)
        return read[torch.arange(len(prompt) - 1, len(prompt) + len(option) - 1), option]

    @torch.no_grad()
    def written(self, prompt: str, new_tokens: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


def texts(folder, name: str, order: list[str], demonstrations: int = 0) -> list:
    """The rows in words, in the order of their sources."""
    task, split = get_task(name), get_task(name).eval_split
    rows = [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_text().splitlines()]
    return [final(task.render(rows[int(source.rpartition(":")[2]) - 1])) for source in order]


@pytest.mark.parametrize("name", [name for name in RENDERED if name not in WRITTEN])
def test_options_are_scored_as_in_transformers(engine, folder, oracle, name):
    metrics, told = engine.call(measured, EvaluateArguments(task=name, dataset=str(folder / name)))
    rows = texts(folder, name, [one["source"] for one in told])
    right = []
    for text, one in zip(rows, told, strict=True):
        scores = torch.stack([oracle.log_probs(text.prompt, option).mean() for option in text.options])
        differences = torch.tensor(one["scores"]) - scores  # of single tokens only differences are read
        assert (differences - differences.mean()).abs().max() < 1e-5
        assert one["prediction"] == scores.argmax()
        right.append(scores.argmax().item() in (text.right or (text.label,)))
        assert one["correct"] == right[-1]
    assert metrics["accuracy"] == sum(right) / len(right) and metrics["examples"] == 2


@pytest.mark.parametrize("name", WRITTEN)
def test_answers_are_written_as_in_transformers(engine, folder, oracle, name):
    metrics, told = engine.call(measured, EvaluateArguments(task=name, dataset=str(folder / name)))
    rows = texts(folder, name, [one["source"] for one in told])
    assert [one["completion"].strip() for one in told] == [oracle.written(text.prompt, 50) for text in rows]
    assert metrics["f1"] == pytest.approx(sum(one["f1"] for one in told) / 2)
    learned, _ = engine.call(measured, EvaluateArguments(task=name, dataset=str(folder / name), objective="completion"))
    losses = torch.cat([oracle.log_probs(text.prompt, text.options[0]) for text in rows])
    assert learned["loss"] == pytest.approx(-losses.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", ["sst2", "copa", "record", "cb"])
def test_options_are_calibrated(engine, folder, oracle, name):
    task = get_task(name)
    metrics, told = engine.call(measured, EvaluateArguments(task=name, dataset=str(folder / name), calibrated=True))
    rows = texts(folder, name, [one["source"] for one in told])
    for text, one in zip(rows, told, strict=True):
        nothing = task.calibration(text)
        gains = [
            (oracle.log_probs(text.prompt, option).sum() - oracle.log_probs(nothing, option).sum()).item()
            for option in text.options
        ]
        assert one["scores"] == pytest.approx(gains, abs=1e-4)  # sums over some ten tokens
        assert one["prediction"] == max(range(len(gains)), key=gains.__getitem__)


@pytest.mark.parametrize("name", ["sst2", "squad"])
def test_demonstrations_stand_before_each_row(engine, folder, oracle, name):
    arguments = EvaluateArguments(task=name, dataset=str(folder / name), num_demonstrations=2)
    _, told = engine.call(measured, arguments)
    plain = texts(folder, name, [one["source"] for one in told])
    shown = [text.demonstration for text in texts(folder, name, [":1", ":2"])]
    for text, one in zip(plain, told, strict=True):
        orders = (shown, shown[::-1])
        if name == "squad":
            assert one["completion"].strip() in [oracle.written(final(text, order).prompt, 50) for order in orders]
            continue
        found = [
            torch.stack([oracle.log_probs(final(text, order).prompt, option).sum() for option in text.options])
            for order in orders
        ]
        gaps = [scores[1] - scores[0] for scores in found]
        assert min(abs(one["scores"][1] - one["scores"][0] - gap) for gap in gaps) < 1e-5


def test_a_long_row_loses_its_first_tokens(engine, folder, oracle):
    arguments = EvaluateArguments(task="multirc", dataset=str(folder / "multirc"), max_length=20)
    _, told = engine.call(measured, arguments)
    text = texts(folder, "multirc", [told[0]["source"]])[0]
    prompt = oracle.tokenizer(text.prompt).input_ids
    options = [oracle.tokenizer(text.prompt + option).input_ids[len(prompt) :] for option in text.options]
    kept = 20 - max(map(len, options))
    scores = [oracle.read([prompt[0], *prompt[1 - kept :]], option).mean().item() for option in options]
    assert len(prompt) > 20 and told[0]["scores"] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"task": None, "dataset": "rows.jsonl", "calibrated": True}, "calibrated"),
        ({"task": None, "dataset": "rows.jsonl", "num_demonstrations": 3}, "num_demonstrations"),
        ({"task": "text", "dataset": "rows.jsonl", "num_demonstrations": 3}, "num_demonstrations"),
        ({"objective": "f1", "calibrated": True}, "calibrated"),
        ({"num_demonstrations": -1}, "num_demonstrations"),
    ],
)
def test_what_goes_with_a_task_alone(given, field):
    with pytest.raises(ConfigError) as refusal:
        replace(EvaluateArguments(task="sst2"), **given)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("model", "task", "given"),
    [
        ("opt-reviews", "squad", {"calibrated": True}),
        ("roberta-reviews", "sst2", {"calibrated": True}),
        ("roberta-reviews", "sst2", {"num_demonstrations": 2}),
    ],
)
def test_what_a_model_or_a_task_cannot_be_asked_is_refused(folder, model, task, given):
    asked = EvaluateArguments(task=task, dataset=str(folder / task), **given)
    with pytest.raises(ConfigError) as refusal:
        read_evaluation(ModelArguments(str(MODEL.with_name(model)), "float32"), asked)
    assert refusal.value.field in given
