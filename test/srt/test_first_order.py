"""First-order fine-tuning and linear probing, against plain loops of Transformers, PEFT and scikit-learn."""

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import oracle
from sglang.srt.mezo.adapters.foreign import read_foreign
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.splits import DataArguments, Splits
from sglang.srt.mezo.experiments.first_order import (
    FirstOrderArguments,
    batches,
    first_order,
    read_splits,
    training_loss,
)
from sglang.srt.mezo.experiments.linear_probing import linear_probing
from sglang.srt.mezo.experiments.reference import Reference, evaluate_examples, load_reference, measure_by_transformers
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.evaluate import EvaluateArguments, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments, adapted_model
from test_reference import OPT, REVIEWS, ROBERTA, Plain, examples_of, reviews
from test_zero_shot import folder  # noqa: F401

DATA = DataArguments(
    task="sst2", dataset=REVIEWS, dev_split="validation", test_split="test", num_train=8, num_dev=12, num_test=10
)
HIGH = {"lora": 5e-3, "prefix": 3e-2, "full": 1e-3, "head": 5e-3}
"""Learning rates that show within a few steps."""


def splits_of(model: ModelArguments, data: DataArguments) -> Splits:
    """The examples of a run."""
    return read_splits(model, data, *read_checkpoint(model.model))


# --- the training loss ------------------------------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("model", "task"), [(OPT, "sst2"), (ROBERTA, "sst2"), (OPT, "copa"), (OPT, "record")])
def test_the_gradient_is_that_of_a_plain_loop(folder, model, task):
    batch = reviews(model, 6) if task == "sst2" else examples_of(model, task=task, dataset=str(folder / task))
    for objective in ("classification", "completion"):
        reference, loop = load_reference(model), Plain(model.model)
        loss = training_loss(reference, reference.plan(batch), objective)
        theirs = loop.option_losses(batch).mean() if objective == "classification" else loop.token_loss(batch)
        assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
        assert loss.item() == evaluate_examples(reference, batch, objective, len(batch))["loss"]
        loss.backward()
        theirs.backward()
        ours, others = gradients(reference.model), gradients(loop.model)
        assert ours.keys() == others.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=2e-5, msg=name)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", HIGH)
def test_each_tuning_learns_and_its_folder_is_what_it_reports(tuning, tmp_path):
    """All steps are of the same eight examples."""
    arguments = FirstOrderArguments(
        tuning=tuning, learning_rate=HIGH[tuning], max_steps=5, lr_scheduler_type="constant"
    )
    summary = first_order(OPT, DATA, arguments, str(tmp_path))
    losses = summary["losses"]
    assert losses[1] < losses[0] and losses[-1] < losses[1] and len(losses) == summary["steps"] == 5
    trained = summary.get("adapter_dir") or summary["model_dir"]
    adapter = tuning in ("lora", "prefix")
    loop = Plain(OPT.model, trained) if adapter else Plain(trained)
    with torch.no_grad():
        tests = splits_of(OPT, DATA).test
        assert summary["loss"] == pytest.approx(loop.option_losses(tests).mean().item(), abs=1e-5)
        assert summary["accuracy"] == loop.accuracy(tests)
        base = Plain(OPT.model)
        assert summary["zero_shot_loss"] == pytest.approx(base.option_losses(tests).mean().item(), abs=1e-5)
        assert summary["zero_shot_accuracy"] == base.accuracy(tests)
    if adapter:
        read_foreign(trained, adapted_model(OPT.model, base.model.config))
        assert set(load_file(Path(trained) / "adapter_model.safetensors")) == adapter_names(tuning)
    else:
        before, after = base.model.state_dict(), loop.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"lm_head.weight"} if tuning == "head" else len(changed) > 60
    json.dumps(summary)


def adapter_names(tuning: str) -> set[str]:
    if tuning == "prefix":
        return {"prompt_embeddings"}
    layers = (f"base_model.model.model.decoder.layers.{layer}.self_attn" for layer in range(4))
    return {f"{layer}.{name}.lora_{ab}.weight" for layer in layers for name in ("q_proj", "v_proj") for ab in "AB"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_masked_language_model_learns(tuning, tmp_path):
    arguments = FirstOrderArguments(tuning=tuning, learning_rate=2e-3, max_steps=5, lr_scheduler_type="constant")
    summary = first_order(ROBERTA, DATA, arguments, str(tmp_path))
    assert summary["losses"][-1] < summary["losses"][0]
    trained = tmp_path / ("adapter" if tuning == "lora" else "model")
    loop = Plain(ROBERTA.model, trained) if tuning == "lora" else Plain(str(trained))
    with torch.no_grad():
        loss = loop.option_losses(splits_of(ROBERTA, DATA).test).mean().item()
    assert summary["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_seed_decides_everything(tmp_path):
    data = replace(DATA, num_train=20, num_test=4)
    arguments = FirstOrderArguments(tuning="prefix", num_train_epochs=2, eval_steps=2)
    runs = [first_order(OPT, data, replace(arguments, seed=seed), str(tmp_path))["losses"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 6  # two short batches among them


def test_the_best_state_on_the_development_set_is_kept(tmp_path):
    """The first step moves nothing, as the learning rate warms up from 0, and all others go much too far."""
    arguments = FirstOrderArguments(learning_rate=3.0, warmup_steps=3, max_steps=4, eval_steps=1)
    summary = first_order(OPT, DATA, arguments, str(tmp_path))
    losses = [one["eval_loss"] for one in summary["evaluations"]]
    assert [one["step"] for one in summary["evaluations"]] == [1, 2, 3, 4]
    assert summary["best_step"] == 1 and min(losses) == losses[0] < min(losses[1:]) - 1
    assert summary["loss"] == pytest.approx(summary["zero_shot_loss"], abs=1e-6)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in held.items() if "lora_B" in name)
    reference = load_reference(OPT, str(tmp_path / "adapter"))
    assert evaluate_examples(reference, splits_of(OPT, DATA).dev, "classification", 16)["loss"] == pytest.approx(
        losses[0], abs=1e-5
    )


def test_the_best_state_may_be_the_most_accurate(tmp_path):
    """The first of several, as in the paper's runs of RoBERTa."""
    arguments = FirstOrderArguments(learning_rate=1e-2, max_steps=12, eval_steps=2, metric_for_best_model="accuracy")
    summary = first_order(OPT, DATA, arguments, str(tmp_path))
    scores = [one["eval_accuracy"] for one in summary["evaluations"]]
    assert summary["best_step"] == 2 * (1 + scores.index(max(scores)))
    with pytest.raises(ConfigError, match="metric_for_best_model='f1' is not allowed: one of eval_loss, eval_accuracy"):
        first_order(OPT, DATA, replace(arguments, metric_for_best_model="f1"), str(tmp_path))


def test_epochs_and_what_is_counted(tmp_path):
    """Ten examples in batches of four; tokens are counted by hand."""
    arguments = FirstOrderArguments(tuning="head", num_train_epochs=2, per_device_train_batch_size=4)
    data = replace(DATA, num_train=10, num_test=5)
    summary = first_order(OPT, data, arguments, str(tmp_path))
    assert [(one["step"], one["epoch"]) for one in summary["evaluations"]] == [(3, 1.0), (6, 2.0)]
    assert all(0 <= one["eval_accuracy"] <= 1 for one in summary["evaluations"])
    assert summary["steps"] == summary["forward_passes"] == summary["backward_passes"] == 6
    splits = splits_of(OPT, data)
    evaluated, trained = (sum(len(one.prompt) for one in part) for part in ((*splits.dev, *splits.test), splits.train))
    assert (summary["eval_tokens"], summary["train_tokens"]) == (2 * evaluated, 2 * trained)
    assert summary["num_trainable_params"] == 2048 * 256
    order = [batch for _, batch in zip(range(6), batches(10, arguments))]
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2] and order[:3] != order[3:]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:], [])) == list(range(10))


def test_words_are_learned_and_written(folder, tmp_path):
    """Of SQuAD the first answer is learned, and the model's own is graded."""
    data = DataArguments(task="squad", dataset=str(folder / "squad"), num_train=1, num_dev=1)
    arguments = FirstOrderArguments(tuning="full", learning_rate=2e-3, max_steps=16, lr_scheduler_type="constant")
    summary = first_order(OPT, data, arguments, str(tmp_path))
    assert summary["losses"][-1] < 0.5 < summary["losses"][0] and summary["loss"] == -summary["f1"]
    assert (
        "accuracy" not in summary and summary["zero_shot_f1"] == 0 and "eval_accuracy" not in summary["evaluations"][0]
    )
    answers = EvaluateArguments(task="squad", dataset=str(folder / "squad"))
    trained = replace(OPT, model=summary["model_dir"])
    assert measure_by_transformers(trained, read_evaluation(trained, answers), answers)[0]["f1"] == summary["f1"] > 0


def test_a_right_option_is_learned_and_all_are_chosen_from(folder, tmp_path):
    data = DataArguments(task="copa", dataset=str(folder / "copa"), num_train=1, num_dev=1)
    summary = first_order(OPT, data, FirstOrderArguments(max_steps=2, learning_rate=1e-2), str(tmp_path))
    tests = examples_of(OPT, task="copa", dataset=str(folder / "copa"))
    with torch.no_grad():
        loop = Plain(OPT.model, summary["adapter_dir"])
        assert summary["loss"] == pytest.approx(loop.token_loss(tests).item(), abs=1e-5)
        assert summary["accuracy"] == loop.accuracy(tests)


REFUSED = {
    "a prefix of an encoder": (ROBERTA, {}, {"tuning": "prefix"}, "tuning"),
    "the head of an encoder": (ROBERTA, {}, {"tuning": "head"}, "tuning"),
    "half precision": (replace(OPT, dtype="float16"), {}, {}, "dtype"),
    "all in bfloat16": (replace(OPT, dtype="bfloat16"), {}, {"tuning": "full"}, "dtype"),
    "ranks": (replace(OPT, tp_size=2), {}, {}, "tp_size"),
    "an unknown module": (OPT, {}, {"target_modules": ["o_proj"]}, "target_modules"),
    "a stream": (OPT, {"task": "text", "streaming": True, "num_train": None}, {}, "streaming"),
    "one option to choose from": (OPT, {"task": "squad"}, {"objective": "classification"}, "objective"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(folder, case, tmp_path):
    model, rows, settings, field = REFUSED[case]
    data = replace(DATA, **rows)
    if data.task == "squad":
        data = DataArguments(task="squad", dataset=str(folder / "squad"), num_train=1, num_dev=1)
    with pytest.raises(ConfigError) as refusal:
        first_order(model, data, FirstOrderArguments(**settings), str(tmp_path))
    assert refusal.value.field == field and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning": "alora"},
        {"objective": "accuracy"},
        {"learning_rate": 0.0},
        {"target_modules": []},
        {"target_modules": ["q_proj"], "tuning": "full"},
        {"lr_scheduler_type": "cosine"},
    ],
    ids=str,
)
def test_settings_that_there_are_not_are_refused(settings):
    with pytest.raises(ConfigError) as refusal:
        FirstOrderArguments(**settings)
    assert refusal.value.field == next(iter(settings))


# --- linear probing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden(model: ModelArguments, examples: list[Example]) -> torch.Tensor:
    """What the head reads, by the model's parts."""
    whole, found = oracle.load(model.model), []
    for example in examples:
        ids = torch.tensor([example.prompt])
        if example.mask is None:
            found.append(whole.model(ids).last_hidden_state[0, -1])
            continue
        head = whole.lm_head
        found.append(head.layer_norm(torch.nn.functional.gelu(head.dense(whole.roberta(ids)[0][0, example.mask]))))
    return torch.stack(found)


@pytest.fixture
def linear_model(monkeypatch):
    """Of scikit-learn, which lies beside the other packages (scripts/setup.sh)."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "scikit-learn")
    return pytest.importorskip("sklearn.linear_model")


@pytest.mark.parametrize("model", [OPT, ROBERTA])
def test_probing_is_a_regression_on_what_the_head_reads(model, linear_model):
    data = replace(DATA, num_train=60, num_test=80)
    summary, splits = linear_probing(model, data), splits_of(model, data)
    features = [hidden(model, part).double().numpy() for part in (splits.train, splits.test)]
    labels = [[one.label for one in part] for part in (splits.train, splits.test)]
    plain = linear_model.LogisticRegression(C=summary["C"], fit_intercept=model is ROBERTA, max_iter=5000)
    plain.fit(features[0], labels[0])
    assert summary["train_accuracy"] == pytest.approx(plain.score(features[0], labels[0]), abs=0.02)
    assert summary["accuracy"] == pytest.approx(plain.score(features[1], labels[1]), abs=0.02)
    assert summary["accuracy"] > 0.8 and summary["backward_passes"] == 0
    assert summary["num_trainable_params"] == (256 if model is OPT else 129)
    reference = Reference(oracle.load(model.model))
    with torch.no_grad():
        ours = reference.features(reference.plan(splits.test[:9]))
    torch.testing.assert_close(ours.double().numpy(), features[1][:9], rtol=1e-4, atol=1e-4)


def test_probing_of_what_it_cannot_do_is_refused(folder, linear_model, monkeypatch):
    with pytest.raises(ConfigError, match="head-tuning"):
        linear_probing(OPT, DataArguments(task="copa", dataset=str(folder / "copa"), num_train=1, num_dev=1))
    with pytest.raises(ConfigError, match="num_train=1 "):
        linear_probing(OPT, replace(DATA, num_train=1))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"sglang-mezo\[experiments\]"):
        linear_probing(OPT, DATA)


def test_a_rare_class_has_fewer_folds(linear_model, caplog):
    with caplog.at_level(logging.WARNING):
        few = DataArguments(task="sst2", dataset=REVIEWS, test_split="test", k=3, num_test=10)
        summary = linear_probing(OPT, few)
    assert "3 folds instead of 5" in caplog.text and math.isfinite(summary["C"])
