"""Directions that are kept, and those that are drawn where they are needed."""

import math

import pytest
import torch

from sglang.srt.mezo.core import optimizer
from sglang.srt.mezo.core.directions import DrawnDirections, KeptDirections
from sglang.srt.mezo.core.noise import Distribution, direction
from sglang.srt.mezo.core.optimizer import Optimizer, UpdateRule

NUMEL = 70_000
DISTRIBUTIONS: list[Distribution] = ["gaussian", "rademacher"]


def theta() -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_both_add_the_same(distribution):
    kept = KeptDirections([direction(5, k, NUMEL, distribution) for k in range(3)])
    drawn = DrawnDirections(5, 3, distribution)
    assert len(kept) == len(drawn) == 3
    for k, (first, numel) in enumerate([(0, NUMEL), (32, 40_000), (65_536, 100)]):
        base = theta()[first : first + numel]
        expected = base + 0.3 * direction(5, k, NUMEL, distribution)[first : first + numel]
        for directions in (kept, drawn):
            out = torch.empty(numel)
            assert directions.add(k, 0.3, base, out, first) is out
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(kept.add(k, 0.3, base, torch.empty(numel), first), out)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_number_is_beyond_the_largest(distribution):
    z = direction(7, 0, NUMEL, distribution)
    assert KeptDirections([z]).largest == z.abs().max() <= DrawnDirections(7, 1, distribution).largest
    assert math.isnan(KeptDirections([torch.tensor([math.nan, 1.0]), z]).largest)


@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9}, {"optim": "adamw", "weight_decay": 0.1}], ids=str)
def test_a_step_is_the_same_in_stretches(monkeypatch, rule):
    thetas = []
    for stretch in (1 << 20, 32_768, 4096):
        monkeypatch.setattr(optimizer, "_STRETCH", stretch)
        thetas.append(theta())
        one = Optimizer(thetas[-1], [(NUMEL, 1)], UpdateRule("rademacher", **rule))
        for step in range(3):
            one.replay(step, [0.5, -2.0], 0.01)
    assert torch.equal(thetas[0], thetas[1]) and torch.equal(thetas[0], thetas[2])
    assert not torch.equal(thetas[0], theta())


def test_a_step_that_diverges_in_its_last_stretch_changes_none(monkeypatch):
    monkeypatch.setattr(optimizer, "_STRETCH", 4096)
    z, before = torch.ones(NUMEL), theta()
    z[-1] = math.inf
    with pytest.raises(optimizer.DivergedError):
        Optimizer(moved := theta(), [(NUMEL, 1)], UpdateRule()).step(KeptDirections([z]), [1.0], 0.1)
    assert torch.equal(moved, before)
