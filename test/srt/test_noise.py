"""Directions against Philox4x64-10 written with Python's integers, and against what random numbers must look like."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from drawn import whole
from sglang.srt.mezo.core import noise, normal, philox
from sglang.srt.mezo.core.directions import LowRankDirections
from sglang.srt.mezo.core.noise import add_direction, direction, initial_uniform, numel_of, step_seed

SEED = 0x0123456789ABCDEF
BLOCK = 1 << 15  # normal numbers that are drawn together
WORD = 2**64


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("first", "numel"), [(0, 10), (1, 100), (BLOCK, BLOCK), (3 * BLOCK + 5, 9 * BLOCK), (11 * BLOCK - 1, 2)]
)
def test_a_stretch_is_that_of_the_whole_direction(distribution, first, numel):
    whole = direction(SEED, 3, 12 * BLOCK + 5, distribution)
    assert torch.equal(direction(SEED, 3, numel, distribution, first), whole[first : first + numel])


def reference(counter: int, key: tuple[int, int]) -> tuple[int, ...]:
    """The generator as Salmon et al. (2011) define it, one block of 64-bit words, arbitrary-precision integers."""
    words = [counter >> 64 * i & (WORD - 1) for i in range(4)]
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B97F4A7C15) % WORD, (key[1] + i * 0xBB67AE8584CAA73B) % WORD
        high0, low0 = divmod(words[0] * 0xD2E7470EE14C6C93, WORD)
        high1, low1 = divmod(words[2] * 0xCA5A826395121157, WORD)
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
    return tuple(words)


def raw(seed: int, stream: int, index: int, place: int) -> int:
    """64-bit word ``place`` of a stream. NumPy steps the counter before it encrypts it."""
    return reference(place // 4 + 1, (seed, stream << 32 | index))[place % 4]


def uniform(seed: int, stream: int, index: int, place: int) -> float:
    """32-bit word ``place`` of a stream, a signed number, as one inside (0, 1)."""
    word = raw(seed, stream, index, place // 2) >> 32 * (place % 2) & 0xFFFFFFFF
    return ((word + 2**31) % 2**32 + 0.5) / 2**32


def normal_number(seed: int, index: int, i: int) -> float:
    """Element ``i`` of a Gaussian direction."""
    pair = i - i % BLOCK + i % (BLOCK // 2)
    radius = math.sqrt(-2 * math.log(uniform(seed, 0, index, pair)))
    angle = 2 * math.pi * uniform(seed, 0, index, pair + BLOCK // 2)
    return radius * (math.cos(angle) if i % BLOCK < BLOCK // 2 else math.sin(angle))


def in_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kernel_of_a_gpu_draws_the_same_bits():
    """By Triton's interpreter."""
    code = f"""
import torch
from sglang.srt.mezo.core import normal_triton
from sglang.srt.mezo.core.noise import direction
for seed, index, first, count in (({SEED}, 3, 0, 1), (2**64 - 1, 0, 5, 2), (1, 1, 400_001, 1)):
    drawn = normal_triton.blocks(seed, index, first, count, torch.device("cpu"))
    print(torch.equal(drawn, direction(seed, index, count * {BLOCK}, first=first * {BLOCK})))
"""
    assert in_python(code, TRITON_INTERPRET="1").split() == ["True"] * 3


def test_the_kernel_of_a_gpu_is_compiled_without_a_fused_operation():
    """Which would round once where ``normal`` rounds twice."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from sglang.srt.mezo.core.normal_triton import OPTIONS, _fill
kinds = {"out": "*fp32", "seed": "i64", "key": "i64", "counter": "i64", "COUNTS": "constexpr"}
source = triton.compiler.ASTSource(_fill, kinds, {"COUNTS": OPTIONS["COUNTS"]})
told = {name: value for name, value in OPTIONS.items() if name != "COUNTS"}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=told).asm["ptx"])
"""
    ptx = in_python(code)
    assert "fma" not in ptx and ptx.count("mul.rn.f64") > 100 and ptx.count("sqrt.rn.f64") == ptx.count("sqrt") == 8


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (WORD - 1, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ],
)
def test_the_reference_gives_the_known_answers_of_random123(word, expected):
    assert reference(sum(word << 64 * i for i in range(4)), (word, word)) == tuple(
        int(word, 16) for word in expected.split()
    )


@pytest.mark.parametrize(("seed", "key", "count"), [(0, 0, 0), (SEED, 2**63 + 5, 1), (WORD - 1, WORD - 1, 2**40)])
def test_words_are_the_same_on_every_device(seed, key, count):
    ours = philox._on_device(seed, key, count, 100, torch.device("cpu"))
    assert torch.equal(ours, philox.words(seed, key, count, 100, torch.device("cpu")))
    first = [word - WORD if word >= WORD // 2 else word for word in reference(count + 1, (seed, key))]
    assert ours[:4].tolist() == first


def test_pairs_of_every_kind_of_word_are_box_muller():
    edges = [-(2**31), 1 - 2**31, 2**31 - 1, *(k * 2**29 + d for k in range(-3, 4) for d in (-1, 0, 1))]
    words = torch.tensor(edges, dtype=torch.int32)
    of_radius, of_angle = torch.meshgrid(words, words, indexing="ij")
    cosines, sines = normal.pairs(of_radius, of_angle)
    radius = torch.sqrt(-2 * torch.log((of_radius.double() + 2.0**31 + 0.5) / 2**32))
    angle = (of_angle.double() + 2.0**31 + 0.5) / 2**32 * 2 * math.pi
    for ours, theirs in ((cosines, angle.cos() * radius), (sines, angle.sin() * radius)):
        # The angle itself is rounded in the reference.
        assert (ours.double() - theirs).abs().le(6e-8 * theirs.abs() + 1e-15 * radius).all()


@pytest.mark.parametrize("index", [0, 3])
def test_gaussian_direction_is_box_muller_on_philox(index):
    z = direction(SEED, index, BLOCK + 50).numpy()
    # Cosines, sines, and the second block.
    places = [*range(50), *range(BLOCK // 2 - 50, BLOCK // 2 + 50), *range(BLOCK - 50, BLOCK + 50)]
    expected = np.array([normal_number(SEED, index, i) for i in places], dtype=np.float32)
    np.testing.assert_array_max_ulp(z[places], expected, maxulp=1)


def test_rademacher_direction_is_the_bits_of_philox():
    z = direction(SEED, 2, 1000, "rademacher").tolist()
    expected = [1.0 if raw(SEED, 0, 2, i // 64) >> i % 64 & 1 else -1.0 for i in range(1000)]
    assert z == expected


def test_initial_numbers_are_philox_words_in_a_stream_of_their_own():
    expected = np.array([2 * uniform(SEED, 2, 5, i) - 1 for i in range(1001)], dtype=np.float32)
    np.testing.assert_array_equal(initial_uniform(SEED, 5, 1001).numpy(), expected)


def test_step_seed_is_the_first_word_of_the_step():
    for step in (0, 1, 12345, 2**32 + 1):
        assert step_seed(SEED, step) == raw(SEED, 1, 0, 4 * step)


def test_steps_and_runs_have_different_seeds():
    seeds = {step_seed(seed, step) for seed in (0, 1, 2**32) for step in range(300)}
    assert len(seeds) == 900


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_first_numbers_do_not_depend_on_how_many_are_drawn(distribution):
    longest = direction(SEED, 1, 3 * BLOCK + 7, distribution)
    for numel in (1, 2, 3, 5, 127, 129, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 2):
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
    rows += [rows[0].roll(shift) for shift in (1, 2, 4, 128, BLOCK)]
    correlation = torch.corrcoef(torch.stack(rows))
    assert (correlation - torch.eye(len(rows))).abs().max() < 5.5 / math.sqrt(n)


@pytest.mark.skipif(noise.LIBRARY is None, reason="the library was not built")
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("first", "numel"),
    [
        *((0, 1), (0, 300), (5, 1000), (255, 70_000), (256 * 9 + 8, 248), (1 << 40, 100), (0, 300_000)),
        *((BLOCK // 2 - 3, 7), (BLOCK // 2, BLOCK // 2), (BLOCK - 1, 2), (5 * BLOCK + 100, BLOCK // 2)),
    ],
)
def test_the_library_adds_what_numpy_and_pytorch_draw(monkeypatch, distribution, first, numel):
    base = torch.randn(numel)
    for scale in (0.37, -1e-3, 0.0, math.inf):
        ours = add_direction(2**64 - 3, 2**32 - 1, scale, base, torch.empty(numel), distribution, first)
        with monkeypatch.context() as patch:
            patch.setattr(noise, "LIBRARY", None)
            theirs = add_direction(2**64 - 3, 2**32 - 1, scale, base, torch.empty(numel), distribution, first)
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), scale
    in_place = base.clone()
    assert add_direction(1, 0, 0.5, in_place, in_place, distribution, first) is in_place
    assert torch.equal(in_place, add_direction(1, 0, 0.5, base, torch.empty(numel), distribution, first))


@pytest.mark.parametrize(
    "base",
    [torch.zeros(8, dtype=torch.float64), torch.zeros(16)[::2], torch.zeros(7)],
    ids=["type", "stride", "length"],
)
def test_what_cannot_be_added_to_is_refused(base):
    for distribution in ("gaussian", "rademacher"):
        with pytest.raises(ValueError):
            add_direction(1, 0, 1.0, base, torch.empty(8), distribution)


SHAPES = [(3, 50), (40, 2), (7, 7)]


def low_rank_direction(seed: int, index: int, shapes, rank: int, distribution="gaussian") -> torch.Tensor:
    return whole(LowRankDirections(seed, index + 1, shapes, rank, distribution), index, numel_of(shapes))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_directions_are_products_of_factors(rank, distribution):
    z = low_rank_direction(SEED, 4, SHAPES, rank, distribution)
    rows, columns = (sum(shape[i] for shape in SHAPES) for i in (0, 1))
    left = direction(SEED, 4, rank * rows, distribution).double()
    for (r, c), matrix in zip(SHAPES, z.split([r * c for r, c in SHAPES])):
        u, left = left[: rank * r].view(r, rank), left[rank * r :]
        matrix = matrix.view(r, c).double()
        assert torch.linalg.matrix_rank(matrix, rtol=1e-5) <= min(rank, r, c)
        assert distribution == "rademacher" or torch.linalg.matrix_rank(matrix, rtol=1e-5) == min(rank, r, c)
        # What u does not span is not in the matrix.
        rest = matrix - u @ torch.linalg.pinv(u, rtol=1e-10) @ matrix
        assert rest.norm() < 1e-5 * matrix.norm()
    assert left.numel() == 0


@pytest.mark.parametrize(("first", "numel"), [(0, 279), (0, 1), (149, 3), (151, 1), (160, 119), (278, 1), (230, 0)])
def test_a_stretch_of_a_low_rank_direction_is_that_of_the_whole(first, numel):
    directions = LowRankDirections(SEED, 2, SHAPES, 3, "gaussian")
    base = torch.randn(279)
    expected = directions.add(1, 0.3, base, torch.empty(279))
    out = torch.empty(numel)
    assert directions.add(1, 0.3, base[first : first + numel], out, first) is out
    assert torch.equal(out, expected[first : first + numel])
    assert whole(directions, 1, 279).abs().max() <= directions.largest


def test_low_rank_directions_share_right_factors_within_an_interval():
    def right_space(step: int) -> torch.Tensor:
        z = low_rank_direction(step_seed(SEED, step, interval=10), 0, [(1, 50)], 1)
        return z / z.norm() * z[0].sign()

    first, ninth, tenth = (right_space(step) for step in (0, 9, 10))
    assert torch.allclose(first, ninth, atol=1e-6)
    assert not torch.allclose(first, tenth, atol=1e-2)
    assert len({step_seed(SEED, step, interval=10) for step in range(1000)}) == 1000


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_low_rank_directions_have_variance_one_and_are_uncorrelated(distribution):
    rows = torch.stack(
        [
            low_rank_direction(step_seed(1, step), k, [(20, 30), (30, 20)], 2, distribution)
            for step in range(2000)
            for k in (0, 1)
        ]
    ).double()
    assert rows.square().mean() == pytest.approx(1, abs=0.02)
    assert rows.mean(dim=0).abs().max() < 5.5 / math.sqrt(len(rows)) * 1.5
    assert abs((rows[0::2] * rows[1::2]).mean()) < 0.02


def test_initial_numbers_are_uniform_and_not_those_of_a_direction():
    n = 200_000
    u, other = initial_uniform(SEED, 0, n).double(), initial_uniform(SEED, 1, n).double()
    assert u.min() >= -1 and u.max() <= 1
    assert abs(u.mean()) < 5 * math.sqrt(1 / 3 / n)
    assert abs(u.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    correlation = torch.corrcoef(torch.stack([u, other, direction(SEED, 0, n).double()]))
    assert (correlation - torch.eye(3)).abs().max() < 5 / math.sqrt(n)
