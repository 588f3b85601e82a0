"""The updates against numpy and torch.optim in float64, the schedules against Transformers."""

import math

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from drawn import whole
from sglang.srt.mezo.core.directions import DrawnDirections, KeptDirections
from sglang.srt.mezo.core.errors import DivergedError
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.optimizer import Optimizer, UpdateRule, learning_rate_at

TRANSFORMERS_NAME = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def random_theta(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def optimizer(theta: torch.Tensor, **rule) -> Optimizer:
    return Optimizer(theta, [(theta.numel(), 1)], UpdateRule(**rule))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("projected_grads", [[1.5], [0.5, -3.0, 2.0, 0.0]], ids=["one direction", "four directions"])
def test_update_is_the_mean_over_directions(projected_grads, weight_decay):
    theta = random_theta(500)
    z = [direction(9, k, 500) for k in range(len(projected_grads))]
    estimate = np.mean([g * z_k.double().numpy() for g, z_k in zip(projected_grads, z)], axis=0)
    before = theta.double().numpy()
    expected = before - 0.05 * (estimate + weight_decay * before)
    optimizer(theta, weight_decay=weight_decay).step(KeptDirections(z), projected_grads, 0.05)
    np.testing.assert_allclose(theta, expected, atol=1e-6)


RULES = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "adamw": {"optim": "adamw"},
    "adamw, decay": {"optim": "adamw", "weight_decay": 0.1},
}
OVERFLOWS = [
    ([1e30], 1e30),
    ([3e38], 1e6),
    ([1e30], 1e300),
    ([-1e38], 3e38),
    ([math.nan], 1e-3),
    ([math.inf], 1e-3),
    ([1.0], math.nan),
]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("projected_grads", "learning_rate"), OVERFLOWS)
def test_a_step_that_does_not_end_in_finite_numbers_is_not_taken(rule, projected_grads, learning_rate):
    """The steps after it are those of an optimizer that has never met it, to the last bit."""
    theta, untouched = random_theta(300), random_theta(300)
    ours, other = optimizer(theta, **rule), optimizer(untouched, **rule)
    for step in range(4):
        for one in (ours, other):
            one.step(DrawnDirections(step, 1, "gaussian"), [0.5 - step], 0.02)
        with pytest.raises(DivergedError, match="learning_rate=.*projected_grad=.*finite numbers"):
            ours.step(DrawnDirections(9, 1, "gaussian"), projected_grads, learning_rate)
        assert torch.equal(theta, untouched)


def test_a_second_moment_that_overflows_alone_is_refused_too():
    theta = random_theta(10)
    with pytest.raises(DivergedError):
        optimizer(theta, optim="adamw").step(DrawnDirections(1, 1, "gaussian"), [1e25], 1e-6)
    assert torch.equal(theta, random_theta(10))


def test_theta_stays_within_the_largest_number_that_it_may_hold():
    theta = torch.zeros(4)
    one = Optimizer(theta, [(4, 1)], UpdateRule(), largest=100.0)
    one.step(KeptDirections([torch.tensor([1.0, -1.0, 0.5, 0.0])]), [100.0], 1.0)
    before = theta.clone()
    for z in ([1.0, 0.0, 0.0, 0.0], [0.0, -0.01, 0.0, 0.0]):
        with pytest.raises(DivergedError, match="at most 100"):
            one.step(KeptDirections([torch.tensor(z)]), [1.0], 1.0)
        assert torch.equal(theta, before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ({"momentum": 0.9}, lambda p, decay: torch.optim.SGD(p, momentum=0.9)),
        ({"optim": "adamw"}, lambda p, decay: torch.optim.AdamW(p, weight_decay=decay)),
        (
            {"optim": "adamw", "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 0.1},
            lambda p, decay: torch.optim.AdamW(p, betas=(0.5, 0.7), eps=0.1, weight_decay=decay),
        ),
    ],
    ids=["momentum", "adamw", "adamw, other constants"],
)
def test_momentum_and_adamw_are_those_of_torch_on_the_estimated_gradient(rule, reference, weight_decay):
    theta = random_theta(300)
    parameter = torch.nn.Parameter(theta.double())
    ours, theirs = optimizer(theta, weight_decay=weight_decay, **rule), reference([parameter], weight_decay)
    for step in range(8):
        z, grads, rate = [direction(step, k, 300) for k in range(2)], [1.5 - step, 0.1 * step], 0.02 / (step + 1)
        parameter.grad = (grads[0] * z[0] + grads[1] * z[1]).double() / 2
        theirs.param_groups[0]["lr"] = rate
        if "momentum" in rule:  # torch adds its decay to the gradient; ours is decoupled, as AdamW's
            parameter.data.mul_(1 - rate * weight_decay)
        theirs.step()
        ours.step(KeptDirections(z), grads, rate)
        np.testing.assert_allclose(theta, parameter.detach(), atol=1e-6)


def test_update_refuses_directions_without_a_projected_gradient():
    for rule in ({}, {"momentum": 0.9}):
        with pytest.raises(ValueError):
            optimizer(torch.zeros(3), **rule).step(KeptDirections([torch.ones(3)] * 2), [1.0], 0.1)


def test_shapes_must_be_those_of_theta():
    with pytest.raises(ValueError, match="5 parameters, and its shapes 6"):
        Optimizer(torch.zeros(5), [(2, 3)], UpdateRule())


@pytest.mark.parametrize(
    "rule", [{}, {"distribution": "rademacher"}, {"momentum": 0.9}, {"optim": "adamw"}, {"perturbation_rank": 2}]
)
def test_replay_repeats_the_update_bit_for_bit(rule):
    live, replayed = random_theta(10_000), random_theta(10_000)
    rule = UpdateRule(weight_decay=0.01, **rule)
    shapes = [(20, 100), (400, 20)]
    ours, theirs = Optimizer(live, shapes, rule), Optimizer(replayed, shapes, rule)
    for seed, grads in ((77, [0.3, -1.7, 2.5]), (78, [0.0, 1.0, 1.0])):
        directions = ours.directions(seed, 3)
        ours.step(KeptDirections([whole(directions, k, live.numel()) for k in range(3)]), grads, 0.013)
        theirs.replay(seed, grads, 0.013)
    assert live.equal(replayed)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_mezo_steps_descend_a_quadratic(distribution):
    """Algorithm 1 on L = theta' H theta / 2, with exact losses: the parts work together, signs and scales included."""
    numel, eps = 20, 1e-3
    curvature = torch.linspace(0.5, 2.0, numel, dtype=torch.float64)
    theta = random_theta(numel)

    def loss(at: torch.Tensor) -> float:
        return (curvature * at.double().square()).sum().item() / 2

    start, sgd = loss(theta), optimizer(theta)
    for step in range(400):
        z = [direction(step, k, numel, distribution) for k in range(2)]
        grads = [(loss(theta.double() + eps * z_k) - loss(theta.double() - eps * z_k)) / (2 * eps) for z_k in z]
        sgd.step(KeptDirections(z), grads, 0.04)
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
    schedule = dict(
        learning_rate=peak, lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, max_steps=max_steps
    )
    # Past the end of a cosine Transformers would go up again; a run never asks for that.
    places = range(max_steps + 1 if lr_scheduler_type == "cosine" else len(expected))
    actual = [learning_rate_at(step, **schedule) for step in places]
    np.testing.assert_allclose(actual, [expected[step] for step in places], rtol=1e-12, atol=1e-18)
