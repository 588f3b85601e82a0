"""Directions against Philox4x32-10 written with Python's integers, and against what random numbers must look like."""

import math

import numpy as np
import pytest
import torch

from sglang.srt.mezo.noise import direction, initial_uniform, philox4x32, step_seed

SEED = 0x0123456789ABCDEF
CHUNK = 4 << 14  # normal numbers that are drawn at a time


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The generator as Salmon et al. (2011) define it, one block, arbitrary-precision integers."""
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = (high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0)
    return counter


def block(seed: int, number: int, index: int, stream: int = 0) -> tuple[int, ...]:
    return philox((number % 2**32, number >> 32, index, stream), (seed % 2**32, seed >> 32))


def normal(seed: int, index: int, i: int) -> float:
    """Element ``i`` of a Gaussian direction."""
    words = [(word + 0.5) / 2**32 for word in block(seed, i // 4, index)]
    pair = i % 4 // 2
    radius, angle = math.sqrt(-2 * math.log(words[2 * pair])), 2 * math.pi * words[2 * pair + 1]
    return radius * (math.sin(angle) if i % 2 else math.cos(angle))


def words_of(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox4x32(torch.tensor(words_of(counter))[:, None], words_of(key))[:, 0]
    assert tuple(words.tolist()) == words_of(expected) == philox(words_of(counter), words_of(key))


def test_philox_encrypts_every_counter_by_itself():
    counters = torch.randint(0, 2**32, (4, 100), generator=torch.Generator().manual_seed(0))
    untouched = counters.clone()
    words = philox4x32(counters, (7, 2**32 - 1))
    assert [tuple(c) for c in words.T.tolist()] == [philox(tuple(c), (7, 2**32 - 1)) for c in counters.T.tolist()]
    assert counters.equal(untouched)


@pytest.mark.parametrize("index", [0, 3])
def test_gaussian_direction_is_box_muller_on_philox(index):
    z = direction(SEED, index, CHUNK + 50).numpy()
    places = [*range(50), *range(CHUNK - 50, CHUNK + 50)]  # the second chunk goes on where the first one ends
    expected = np.array([normal(SEED, index, i) for i in places], dtype=np.float32)
    np.testing.assert_array_max_ulp(z[places], expected, maxulp=1)


def test_rademacher_direction_is_the_bits_of_philox():
    z = direction(SEED, 2, 1000, "rademacher").tolist()
    expected = [1.0 if block(SEED, i // 128, 2)[i % 128 // 32] >> i % 32 & 1 else -1.0 for i in range(1000)]
    assert z == expected


def test_initial_numbers_are_philox_words_in_a_stream_of_their_own():
    expected = np.array([(block(SEED, i // 4, 5, stream=2)[i % 4] + 0.5) / 2**31 - 1 for i in range(1001)], dtype=np.float32)
    np.testing.assert_array_equal(initial_uniform(SEED, 5, 1001).numpy(), expected)


def test_step_seed_is_a_philox_block_of_the_step_number():
    for step in (0, 1, 12345, 2**32 + 1):
        low, high, _, _ = block(SEED, step, 0, stream=1)
        assert step_seed(SEED, step) == low + (high << 32)


def test_steps_and_runs_have_different_seeds():
    seeds = {step_seed(seed, step) for seed in (0, 1, 2**32) for step in range(300)}
    assert len(seeds) == 900


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_first_numbers_do_not_depend_on_how_many_are_drawn(distribution):
    longest = direction(SEED, 1, 3 * CHUNK + 7, distribution)
    for numel in (1, 2, 3, 5, 127, 129, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2):
        assert direction(SEED, 1, numel, distribution).equal(longest[:numel]), numel


def test_numbers_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    alone = direction(SEED, 0, 200_000)
    try:
        torch.set_num_threads(2)
        assert direction(SEED, 0, 200_000).equal(alone)
    finally:
        torch.set_num_threads(threads)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    z = direction(SEED, 0, 1000)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert direction(SEED, 0, 1000).equal(z)


@pytest.mark.parametrize("seed", [0, 42, SEED, 2**64 - 1])
def test_gaussian_moments_and_distribution(seed):
    n = 400_000
    z = direction(seed, 0, n).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / n), f"moment {power}"
    ordered = torch.special.ndtr(z.sort().values)  # Kolmogorov-Smirnov against the normal distribution
    assert (ordered - (torch.arange(n) + 0.5) / n).abs().max() < 2.0 / math.sqrt(n)


def test_rademacher_signs_are_fair():
    n = 400_000
    z = direction(SEED, 0, n, "rademacher").double()
    assert z.abs().eq(1).all()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_directions_seeds_steps_and_neighbours_are_uncorrelated(distribution):
    n = 200_000
    seeds = (SEED, SEED + 1, SEED + 2**32, step_seed(SEED, 0), step_seed(SEED, 1))
    rows = [direction(seed, index, n, distribution) for seed in seeds for index in (0, 1, 2)]
    rows += [rows[0].roll(shift) for shift in (1, 2, 4, 128, CHUNK)]
    correlation = torch.corrcoef(torch.stack(rows))
    assert (correlation - torch.eye(len(rows))).abs().max() < 5.5 / math.sqrt(n)


def test_initial_numbers_are_uniform_and_not_those_of_a_direction():
    n = 200_000
    u, other = initial_uniform(SEED, 0, n).double(), initial_uniform(SEED, 1, n).double()
    assert u.min() >= -1 and u.max() <= 1
    assert abs(u.mean()) < 5 * math.sqrt(1 / 3 / n)
    assert abs(u.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    correlation = torch.corrcoef(torch.stack([u, other, direction(SEED, 0, n).double()]))
    assert (correlation - torch.eye(3)).abs().max() < 5 / math.sqrt(n)
