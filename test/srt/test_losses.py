"""Option losses and token losses against numpy on whole vocabularies of log-probabilities."""

import math

import numpy as np
import pytest
import torch

from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.scoring.losses import option_cross_entropy, option_scores, split_options
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner, needs_normaliser
from sglang.srt.mezo.scoring.readout import batch_loss, predictions, right_predictions

SLOTS = 6
VOCAB = 50
SINGLE = [Example((2, 3), ((7,), (8,)), 0), Example((2, 4), ((9,), (7,), (1,)), 2), Example((5, 5), ((8,), (6,)), 1)]
MIXED = [
    Example((2, 3), ((7, 8, 9), (8,)), 0),
    Example((2,), ((9,), (7, 7), (1, 2, 3, 4), (5,)), 2),
    Example((5, 6, 6), ((8,), (6,)), 1),
]


class FakeModel:
    """Random logits for every (slot, example, option, token): what a model could say."""

    def __init__(self, examples: list[Example], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.examples = examples
        # Options of one token are all read after the prompt's last token, so they share their logits.
        shared = [rng.normal(0, 3, (SLOTS, VOCAB)) for _ in examples]
        self.logits = [
            [
                np.stack([shared[e], *(rng.normal(0, 3, (SLOTS, VOCAB)) for _ in option[1:])], axis=1)
                for option in example.options
            ]
            for e, example in enumerate(examples)
        ]

    def token_log_probs(self, e: int, option: int) -> np.ndarray:
        """[slots, tokens of the option]"""
        logits = self.logits[e][option]
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return np.stack([log_probs[:, t, token] for t, token in enumerate(self.examples[e].options[option])], axis=1)

    def scores(self, e: int) -> np.ndarray:
        """[slots, options]"""
        return np.stack([self.token_log_probs(e, o).mean(axis=1) for o in range(len(self.examples[e].options))], axis=1)

    def classification_loss(self) -> np.ndarray:
        losses = []
        for e, example in enumerate(self.examples):
            likelihood = np.exp(self.scores(e))
            losses.append(-np.log(likelihood[:, example.label] / likelihood.sum(axis=1)))
        return np.mean(losses, axis=0)

    def token_loss(self) -> np.ndarray:
        gold = [self.token_log_probs(e, example.label) for e, example in enumerate(self.examples)]
        return -np.concatenate(gold, axis=1).mean(axis=1)

    def reads(self, normalised: bool = True) -> torch.Tensor:
        """What a scorer reads: [slots, reads], example by example, option by option, token by token."""
        values = []
        for e, example in enumerate(self.examples):
            for o, option in enumerate(example.options):
                raw = np.stack([self.logits[e][o][:, t, token] for t, token in enumerate(option)], axis=1)
                values.append(self.token_log_probs(e, o) if normalised else raw)
        return torch.from_numpy(np.concatenate(values, axis=1))


def plans_of(examples: list[Example]) -> list[ExamplePlan]:
    return [Planner("lora").plan(example) for example in examples]


@pytest.mark.parametrize("examples", [SINGLE, MIXED], ids=["single-token options", "mixed options"])
def test_classification_loss_is_cross_entropy_over_mean_log_probs(examples):
    model = FakeModel(examples)
    loss = batch_loss(plans_of(examples), model.reads(), "classification")
    np.testing.assert_allclose(loss.mean, model.classification_loss(), rtol=1e-12)


def test_raw_logits_are_enough_for_single_token_options_and_only_there():
    single, mixed = FakeModel(SINGLE), FakeModel(MIXED)
    assert not needs_normaliser(plans_of(SINGLE), "classification")
    loss = batch_loss(plans_of(SINGLE), single.reads(normalised=False), "classification")
    np.testing.assert_allclose(loss.mean, single.classification_loss(), rtol=1e-10)
    assert needs_normaliser(plans_of(MIXED), "classification")
    wrong = batch_loss(plans_of(MIXED), mixed.reads(normalised=False), "classification")
    assert np.abs(wrong.mean.numpy() - mixed.classification_loss()).min() > 1e-3


@pytest.mark.parametrize("examples", [SINGLE, MIXED], ids=["single-token options", "mixed options"])
def test_token_losses_average_over_the_tokens_of_the_right_options(examples):
    model = FakeModel(examples)
    loss = batch_loss(plans_of(examples), model.reads(), "completion")
    assert loss.weight == sum(len(example.options[example.label]) for example in examples)
    np.testing.assert_allclose(loss.mean, model.token_loss(), rtol=1e-12)


@pytest.mark.parametrize("examples", [SINGLE, MIXED], ids=["single-token options", "mixed options"])
def test_the_loss_of_accuracy_is_the_share_of_right_options_with_its_sign_changed(examples):
    model, labels = FakeModel(examples), [example.label for example in examples]
    right = np.stack([model.scores(e).argmax(axis=1) for e in range(len(examples))], axis=1) == labels
    loss = batch_loss(plans_of(examples), model.reads(), "accuracy")
    np.testing.assert_array_equal(loss.mean, -right.mean(axis=1))
    assert 0 < right.mean() < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("objective", ["classification", "completion", "accuracy"])
def test_a_point_that_has_diverged_has_no_loss(objective, value):
    """And no share of right options: the first option is not the best of those that have no numbers."""
    plans = plans_of(MIXED)
    values = torch.zeros(2, sum(len(row.reads) for plan in plans for row in plan.rows))
    values[1] = value
    loss = batch_loss(plans, values, objective).mean
    right = right_predictions(plans, values)
    assert loss[0].isfinite() and right[0] == sum(plan.label == 0 for plan in plans)
    assert not loss[1].isfinite() and right[1].isnan()


@pytest.mark.parametrize("objective", ["classification", "completion", "accuracy"])
def test_pooled_parts_of_a_batch_have_the_loss_of_the_whole(objective):
    whole = FakeModel(MIXED)
    reads = whole.reads()
    cut = sum(len(option) for option in MIXED[0].options)
    first = batch_loss(plans_of(MIXED[:1]), reads[:, :cut], objective)
    rest = batch_loss(plans_of(MIXED[1:]), reads[:, cut:], objective)
    together = batch_loss(plans_of(MIXED), reads, objective)
    pooled = (first.total + rest.total) / (first.weight + rest.weight)
    np.testing.assert_allclose(pooled, together.mean, rtol=1e-12)


@pytest.mark.parametrize("examples", [SINGLE, MIXED], ids=["single-token options", "mixed options"])
def test_predictions_are_the_options_with_the_best_mean(examples):
    model = FakeModel(examples)
    expected = np.stack([model.scores(e).argmax(axis=1) for e in range(len(examples))], axis=1)
    np.testing.assert_array_equal(predictions(plans_of(examples), model.reads()), expected)


def test_an_absent_option_is_never_predicted_and_adds_nothing():
    scores = torch.tensor([[-5.0, -6.0, -1.0, -9.0, -30.0]])
    split = split_options(scores, [2, 3])
    assert split.tolist() == [[[-5.0, -6.0, -torch.inf], [-1.0, -9.0, -30.0]]]
    alone = option_cross_entropy(split[:, :1, :2], torch.tensor([1]))
    assert option_cross_entropy(split, torch.tensor([1, 0]))[0, 0] == alone


def test_scores_are_means_not_sums():
    values = torch.tensor([[-1.0, -2.0, -3.0, -10.0]])
    assert option_scores(values, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1])).tolist() == [[-2.0, -10.0]]


def test_a_difference_of_one_float32_ulp_in_a_logit_reaches_the_loss():
    value = torch.tensor(17.3)
    values = torch.stack([value, torch.nextafter(value, torch.tensor(torch.inf))])[:, None]
    values = torch.cat([values, torch.full((2, 1), 16.9)], dim=1)
    plus, minus = batch_loss([Planner("lora").plan(SINGLE[0])], values, "classification").mean
    ulp, p = (values[1, 0] - values[0, 0]).item(), 1 / (1 + np.exp(16.9 - 17.3))
    np.testing.assert_allclose((plus - minus).item(), ulp * (1 - p), rtol=1e-3)
