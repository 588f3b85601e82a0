"""The update against numpy in float64, the schedules against Transformers."""

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from sglang.srt.mezo.noise import direction
from sglang.srt.mezo.optimizer import apply_update, learning_rate_at, replay_update

TRANSFORMERS_NAME = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def random_theta(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("projected_grads", [[1.5], [0.5, -3.0, 2.0, 0.0]], ids=["one direction", "four directions"])
def test_update_is_the_mean_over_directions(projected_grads, weight_decay):
    theta = random_theta(500)
    z = [direction(9, k, 500) for k in range(len(projected_grads))]
    estimate = np.mean([g * z_k.double().numpy() for g, z_k in zip(projected_grads, z)], axis=0)
    before = theta.double().numpy()
    expected = before - 0.05 * (estimate + weight_decay * before)
    apply_update(theta, z, projected_grads, 0.05, weight_decay)
    np.testing.assert_allclose(theta, expected, atol=1e-6)


def test_update_refuses_directions_without_a_projected_gradient():
    with pytest.raises(ValueError):
        apply_update(torch.zeros(3), [torch.ones(3)] * 2, [1.0], 0.1, 0.0)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_replay_repeats_the_update_bit_for_bit(distribution):
    live, replayed = random_theta(10_000), random_theta(10_000)
    grads = [0.3, -1.7, 2.5]
    apply_update(live, [direction(77, k, 10_000, distribution) for k in range(3)], grads, 0.013, 0.01)
    replay_update(replayed, 77, grads, 0.013, 0.01, distribution)
    assert live.equal(replayed)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_mezo_steps_descend_a_quadratic(distribution):
    """Algorithm 1 on L = theta' H theta / 2, with exact losses: the parts work together, signs and scales included."""
    numel, eps = 20, 1e-3
    curvature = torch.linspace(0.5, 2.0, numel, dtype=torch.float64)
    theta = random_theta(numel)

    def loss(at: torch.Tensor) -> float:
        return (curvature * at.double().square()).sum().item() / 2

    start = loss(theta)
    for step in range(400):
        z = [direction(step, k, numel, distribution) for k in range(2)]
        grads = [(loss(theta.double() + eps * z_k) - loss(theta.double() - eps * z_k)) / (2 * eps) for z_k in z]
        apply_update(theta, z, grads, 0.04, 0.0)
    assert loss(theta) < 1e-4 * start


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("lr_scheduler_type", ["constant", "linear", "cosine"])
def test_schedules_agree_with_transformers(lr_scheduler_type, warmup_steps):
    max_steps, peak = 40, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(TRANSFORMERS_NAME[lr_scheduler_type], optimizer, warmup_steps, max_steps)
    expected = []
    for _ in range(max_steps + 3):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule = dict(learning_rate=peak, lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, max_steps=max_steps)
    # Past the end of a cosine Transformers would go up again; a run never asks for that.
    places = range(max_steps + 1 if lr_scheduler_type == "cosine" else len(expected))
    actual = [learning_rate_at(step, **schedule) for step in places]
    np.testing.assert_allclose(actual, [expected[step] for step in places], rtol=1e-12, atol=1e-18)
