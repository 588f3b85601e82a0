"""Projected gradients against z . grad L of a function whose gradient is known."""

import itertools
import math

import pytest
import torch

from sglang.srt.mezo.core.estimator import forward_passes, projected_grads, with_baselines
from sglang.srt.mezo.core.noise import direction

EPS = 1e-4


def losses_around(numel: int = 50, count: int = 6):
    """Losses of sum(exp(theta)) at theta + EPS z, theta - EPS z and theta, and z . grad L, for several z."""
    theta = torch.linspace(-1, 1, numel, dtype=torch.float64)
    z = [direction(1, k, numel).double() for k in range(count)]
    plus, minus = ([(theta + sign * EPS * z_k).exp().sum().item() for z_k in z] for sign in (1, -1))
    return plus, minus, [theta.exp().sum().item()] * count, [torch.dot(z_k, theta.exp()).item() for z_k in z]


def test_two_sided_estimates_have_an_error_of_second_order():
    plus, minus, _, exact = losses_around()
    assert projected_grads(plus, minus, EPS) == pytest.approx(exact, abs=1e-5)


def test_one_sided_estimates_have_an_error_of_first_order():
    plus, _, at_theta, exact = losses_around()
    estimates = projected_grads(plus, at_theta, EPS, "one_sided")
    assert estimates == pytest.approx(exact, abs=100 * EPS)
    assert estimates != pytest.approx(exact, abs=1e-5)


SIGNED = [torch.tensor(z, dtype=torch.float64) for z in itertools.product((-1, 1), repeat=4)]
"""All directions of four random signs."""
SLOPE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def leave_one_out(z, curvature: float = 0.0) -> list[float]:
    """Estimates from losses at 0.1 z_k, whose gradient at 0 is SLOPE."""
    losses = [(0.1 * z_k @ SLOPE + curvature * (0.1 * z_k).square().sum()).item() for z_k in z]
    return projected_grads(*with_baselines(losses, "leave_one_out"), 0.1, "leave_one_out")


def test_leaving_one_out_compares_directions_free_of_the_curvature_that_they_share():
    for z in itertools.combinations(SIGNED, 3):
        exact = [(z_k - sum(z_j for z_j in z if z_j is not z_k) / 2).dot(SLOPE).item() for z_k in z]
        assert leave_one_out(z, curvature=50.0) == pytest.approx(exact)


def test_leaving_one_out_is_unbiased():
    pairs = list(itertools.product(SIGNED, repeat=2))
    gradients = [sum(grad * z_k for grad, z_k in zip(leave_one_out(z), z)) / 2 for z in pairs]
    assert (sum(gradients) / len(pairs)).tolist() == pytest.approx(SLOPE.tolist())


def test_what_each_loss_is_compared_with():
    assert with_baselines([1.0, 2.0, 3.0, 5.0], "two_sided") == ([1.0, 3.0], [2.0, 5.0])
    assert with_baselines([1.0, 2.0, 3.0], "one_sided") == ([2.0, 3.0], [1.0, 1.0])
    assert with_baselines([1.0, 2.0, 6.0], "leave_one_out") == ([1.0, 2.0, 6.0], [4.0, 3.5, 1.5])
    for losses in ([1.7e308, 1.7e308, 0.0], [math.inf, -math.inf, 0.0]):
        assert not any(map(math.isfinite, with_baselines(losses, "leave_one_out")[1])), "the run ends with it"
    assert [forward_passes(estimator, 3) for estimator in ("two_sided", "one_sided", "leave_one_out")] == [6, 4, 3]


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided", "leave_one_out"])
def test_scaled_estimates_do_not_depend_on_the_size_of_loss_and_step(estimator):
    plus, minus, at_theta, _ = losses_around()
    other = {"two_sided": minus, "one_sided": at_theta, "leave_one_out": with_baselines(plus, "leave_one_out")[1]}[
        estimator
    ]
    evaluated, sides = (plus + minus, 2) if estimator == "two_sided" else (plus, 1)
    scaled = projected_grads(plus, other, EPS, estimator, scale_by_loss_std=True)
    deviation = torch.tensor(evaluated, dtype=torch.float64).std(correction=1).item()
    assert scaled == pytest.approx([(a - b) / (sides * deviation) for a, b in zip(plus, other)])
    assert projected_grads([7 * x for x in plus], [7 * x for x in other], 1.0, estimator, True) == pytest.approx(scaled)


def test_equal_losses_say_nothing_about_the_slope():
    assert projected_grads([2.0, 2.0], [1.5, 1.5], EPS, "one_sided", scale_by_loss_std=True) == [0.0, 0.0]
    assert projected_grads([2.0], [2.0], EPS) == [0.0]
    assert projected_grads([2.0, 2.0], [2.0, 2.0], EPS, scale_by_loss_std=True) == [0.0, 0.0]
