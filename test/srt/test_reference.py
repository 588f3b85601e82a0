"""Evaluations by Transformers and PEFT, in batches, against a plain loop over one unpadded sequence at a time, which is
written here and in ``oracle.py``: nothing of the package's is used on it but the tokens of rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import oracle
from foreign_adapters import saved
from foreign_prefixes import saved_prefix
from sglang.srt.mezo.adapters.foreign import read_foreign
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.objective import Generation
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.metrics import f1
from sglang.srt.mezo.experiments.reference import evaluate_examples, load_reference, measure_by_transformers
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.evaluate import EvaluateArguments, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments, adapted_model
from sglang.srt.mezo.training.rewards import Writer
from test_examples import ROOT
from test_prefix_oracle import UnshiftedPrefix
from test_zero_shot import folder  # noqa: F401

ASSETS = ROOT / "examples" / "assets"
OPT, ROBERTA = (ModelArguments(str(ASSETS / name), "float32") for name in ("opt-reviews", "roberta-reviews"))
REVIEWS = str(ASSETS / "reviews")


class Plain(oracle.Scores):
    """A loop over single sequences through a model of Transformers', with the adapter in a folder, if any."""

    def __init__(self, path: str, adapter: Path | str | None = None):
        self.model = oracle.load(path)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def scores(self, example: Example) -> torch.Tensor:
        return torch.stack([self.token_log_probs(example, option).mean() for option in example.options])

    def accuracy(self, examples: list[Example]) -> float:
        right = [self.scores(one).argmax().item() in (one.right or (one.label,)) for one in examples]
        return sum(right) / len(right)

    def written(self, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        """The likeliest tokens, by a whole forward pass for each, up to the end of the text."""
        tokens: list[int] = []
        while len(tokens) < new_tokens and 2 not in tokens:
            tokens.append(int(self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
        return [token for token in tokens if token != 2]


def examples_of(model: ModelArguments, **arguments) -> list[Example]:
    asked = read_evaluation(model, EvaluateArguments(**arguments))
    return [example for _, example in asked.examples]


def reviews(model: ModelArguments, count: int = 20) -> list[Example]:
    return examples_of(model, task="sst2", dataset=REVIEWS, split="test", rows=count)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """PEFT folders of random adapters of the OPT model, by kind."""
    made, base = tmp_path_factory.mktemp("adapters"), oracle.load(OPT.model)
    invocation = read_checkpoint(OPT.model)[1](" It was", add_special_tokens=False).input_ids
    shifted = saved_prefix(base, made / "prefix", tokens=3)
    unshifted = read_foreign(str(shifted), adapted_model(OPT.model, base.config))
    unshifted.spec = replace(unshifted.spec, positions="unshifted")
    unshifted.save_pretrained(made / "unshifted")
    return {
        "none": None,
        "lora": saved(base, made / "lora"),
        "alora": saved(base, made / "alora", alora_invocation_tokens=invocation),
        "prefix": shifted,
        "unshifted": made / "unshifted",
    }


def plain(adapters, kind: str) -> Plain:
    if kind == "unshifted":
        loop = Plain.__new__(Plain)
        loop.model = UnshiftedPrefix(OPT.model, PrefixAdapter.from_pretrained(adapters[kind])).model
        return loop
    return Plain(OPT.model, adapters[kind])


KINDS = ("none", "lora", "alora", "prefix", "unshifted")


@pytest.mark.parametrize(("model", "task"), [(OPT, "sst2"), (ROBERTA, "sst2"), (OPT, "copa"), (OPT, "record")])
@torch.no_grad()
def test_options_are_scored_as_one_by_one(folder, model, task):
    rows = {"dataset": REVIEWS, "split": "test", "rows": 20} if task == "sst2" else {"dataset": str(folder / task)}
    arguments = EvaluateArguments(task=task, per_device_eval_batch_size=8, **rows)
    asked = read_evaluation(model, arguments)
    metrics, told = measure_by_transformers(model, asked, arguments)
    loop, examples = Plain(model.model), [example for _, example in asked.examples]
    for example, one in zip(examples, told, strict=True):
        scores = loop.scores(example)
        differences = torch.tensor(one["scores"]) - scores  # of single tokens only differences are read
        assert (differences - differences.mean()).abs().max() < 1e-5
        assert one["prediction"] == scores.argmax() and one["correct"] == (scores.argmax() in example_right(example))
    loss = loop.option_losses(examples).mean() if task == "sst2" else loop.token_loss(examples)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["accuracy"] == loop.accuracy(examples) and metrics["examples"] == len(told)
    assert len({one["source"] for one in told}) == len(told)


@torch.no_grad()
def test_a_row_with_one_entity_counts_as_the_official_code_has_it_and_a_completion_not(folder, tmp_path):
    """Whatever batch they are in."""
    [*rows] = map(json.loads, (folder / "record" / "validation.jsonl").read_text().splitlines())
    rows[0] |= {"entities": rows[0]["answers"][:1], "answers": rows[0]["answers"][:1]}
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = [{"prompt": "Is it", "completion": " so"}, {"prompt": "It was", "options": [" a", " b"], "label": 1}] * 3
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    for given in ({"task": "record", "dataset": "record.jsonl"}, {"dataset": "mixed.jsonl", "objective": "completion"}):
        found = []
        for batch_size in (1, 5, 64):
            given["dataset"] = str(tmp_path / Path(given["dataset"]).name)
            arguments = EvaluateArguments(per_device_eval_batch_size=batch_size, **given)
            metrics, told = measure_by_transformers(OPT, read_evaluation(OPT, arguments), arguments)
            found.append(metrics["accuracy"])
        right = [one["correct"] for one in told if "correct" in one]
        assert found == [pytest.approx(sum(right) / len(right))] * 3
        assert len(right) == (len(rows) if "task" in given else 3)
    assert right.count(True) in (0, 3)


def example_right(example: Example) -> tuple[int, ...]:
    return example.right or (example.label,)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_is_scored_as_one_by_one(adapters, kind):
    examples = reviews(OPT)
    reference = load_reference(OPT, adapters[kind] and str(adapters[kind]))
    metrics = evaluate_examples(reference, examples, "classification", 8)
    loop = plain(adapters, kind)
    assert metrics["loss"] == pytest.approx(loop.option_losses(examples).mean().item(), abs=2e-5)
    assert metrics["accuracy"] == loop.accuracy(examples)
    others = Plain(OPT.model).option_losses(examples).mean().item()
    assert (kind == "none") == (metrics["loss"] == pytest.approx(others, abs=1e-3))
    assert reference.tokens == sum(example.longest - 1 for example in examples)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_are_written_as_one_by_one(adapters, kind):
    """They end with a full stop, some earlier than others."""
    tokenizer = read_checkpoint(OPT.model)[1]
    begun = [one.prompt for one in reviews(OPT, 7)]
    prompts = [text + after[1 : 3 + i] for i, (text, after) in enumerate(zip(begun, begun[1:]))]
    examples = [Example(prompt, columns={"answers": ["good"]}) for prompt in prompts]
    writer = Writer.of(Generation("f1", None, 12, 0.0, "."), tokenizer)
    told: list[dict] = []
    reference = load_reference(OPT, adapters[kind] and str(adapters[kind]))
    metrics = evaluate_examples(reference, examples, "f1", 4, writer, told=told)
    loop = plain(adapters, kind)
    texts = [tokenizer.decode(loop.written(example.prompt, 12)).partition(".")[0] for example in examples]
    assert [one["completion"] for one in told] == texts
    assert kind != "none" or len({len(text.split()) for text in texts}) > 1
    assert metrics == {"loss": -metrics["f1"], "f1": pytest.approx(sum(f1(text, ["good"]) for text in texts) / 6)}


@torch.no_grad()
def test_questions_are_answered_and_learned(folder):
    arguments = EvaluateArguments(task="squad", dataset=str(folder / "squad"))
    asked = read_evaluation(OPT, arguments)
    metrics, told = measure_by_transformers(OPT, asked, arguments)
    loop, tokenizer = Plain(OPT.model), read_checkpoint(OPT.model)[1]
    texts = [tokenizer.decode(loop.written(one.prompt, 50)).partition("\n")[0] for _, one in asked.examples]
    assert [one["completion"] for one in told] == texts
    grades = [f1(text, one.columns["answers"]) for text, (_, one) in zip(texts, asked.examples)]
    assert metrics["f1"] == pytest.approx(sum(grades) / len(grades)) and [one["f1"] for one in told] == grades
    learned = examples_of(OPT, task="squad", dataset=str(folder / "squad"), objective="completion")
    found = evaluate_examples(load_reference(OPT), learned, "completion", 16)
    assert found == {"loss": pytest.approx(loop.token_loss(learned).item(), abs=1e-5)}


@torch.no_grad()
def test_options_are_calibrated_as_one_by_one(folder):
    arguments = EvaluateArguments(task="copa", dataset=str(folder / "copa"), calibrated=True)
    asked = read_evaluation(OPT, arguments)
    _, told = measure_by_transformers(OPT, asked, arguments)
    loop = Plain(OPT.model)
    for (_, example), nothing, one in zip(asked.examples, asked.nothing, told, strict=True):
        gains = [
            (loop.token_log_probs(example, own).sum() - loop.token_log_probs(nothing, same).sum()).item()
            for own, same in zip(example.options, nothing.options)
        ]
        assert one["scores"] == pytest.approx(gains, abs=1e-4)


def test_a_prefix_of_an_encoder_and_sampling_are_not_evaluated(adapters):
    with pytest.raises(ConfigError, match="PEFT has no prefixes"):
        load_reference(ROBERTA, str(adapters["prefix"]))
    writer = Writer.of(Generation("f1", None, 5, 0.7, None), read_checkpoint(OPT.model)[1])
    with pytest.raises(ConfigError, match="temperature"):
        evaluate_examples(load_reference(OPT), reviews(OPT, 1), "f1", 1, writer)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({"tp_size": 2}, {}, "tp_size=2 is not allowed: 1 with transformers"),
        ({"max_total_tokens": 500}, {}, "max_total_tokens=500 is not allowed: null with transformers"),
        ({}, {"max_tokens_per_batch": 1}, "max_tokens_per_batch=1 is not allowed: 4096 with transformers"),
    ],
)
def test_settings_of_an_engine_are_refused_where_there_is_none(folder, model, arguments, message):
    asked = EvaluateArguments(task="copa", dataset=str(folder / "copa"), **arguments)
    with pytest.raises(ConfigError, match=message):
        measure_by_transformers(replace(OPT, **model), read_evaluation(OPT, asked), asked)


def test_an_adapter_that_is_none_is_named_by_its_flag(folder):
    asked = EvaluateArguments(task="copa", dataset=str(folder / "copa"), adapter="/nowhere")
    with pytest.raises(
        ConfigError, match="^adapter='/nowhere' is not allowed: an adapter of this model: a folder with"
    ):
        read_evaluation(OPT, asked)
