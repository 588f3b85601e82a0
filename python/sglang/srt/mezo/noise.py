"""Perturbation directions z from a counter-based stream.

Element i of direction k under seed s is a pure function of (s, k, i): it does not depend on the batch, the order of drawing
or how an adapter is sharded, so a step can be replayed from its seed alone. Directions are always drawn on the CPU; the
logarithm and the cosine may differ by an ulp of float64 between kinds of processors, which changes about one number in
10^9 after rounding to float32 (Rademacher directions are exact everywhere). The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Normal numbers come from the
Box-Muller transform in float64, rounded once to float32.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

Distribution = Literal["gaussian", "rademacher"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCKS_PER_CHUNK = 1 << 14  # a chunk's working set stays in the L2 cache

# The fourth counter word separates streams that are drawn for different purposes.
_STREAM_DIRECTION = 0
_STREAM_STEP_SEED = 1
_STREAM_INITIAL = 2

# Random words int64 [4, n] to float32 numbers, in the order of the blocks.
Transform = Callable[[torch.Tensor], torch.Tensor]


def philox4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Encrypt counters to random words.

    Args:
        counter: int64 [4, n]; each entry holds one unsigned 32-bit word.
        key: two unsigned 32-bit words.

    Returns:
        int64 [4, n] of unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter.clone().unbind(0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product wraps in signed int64, but its bits are right; the shift's sign fill is masked away.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c1 = p1.bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c3 = p0.bitwise_and_(_MASK)
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


def step_seed(run_seed: int, step: int) -> int:
    """The 64-bit seed of one step: a function of the run's seed and the step's number only."""
    counter = torch.tensor([[step & _MASK], [step >> 32], [0], [_STREAM_STEP_SEED]])
    low, high, _, _ = philox4x32(counter, _key(run_seed))[:, 0].tolist()
    return low | (high << 32)


def direction(seed: int, index: int, numel: int, distribution: Distribution = "gaussian") -> torch.Tensor:
    """Draw direction ``index`` of the step that has ``seed``.

    Args:
        seed: unsigned 64-bit step seed.
        index: number of the direction within the step (0 for two-point MeZO).
        numel: number of trainable parameters, in the flat order of the adapter.
        distribution: "gaussian" for N(0, 1), "rademacher" for +-1 with equal probability.

    Returns:
        float32 [numel] on the CPU.
    """
    return _draw(seed, index, _STREAM_DIRECTION, numel, *_TRANSFORMS[distribution])


def initial_uniform(seed: int, index: int, numel: int) -> torch.Tensor:
    """Uniform numbers on [-1, 1] for the initial weights of matrix ``index``: float32 [numel] on the CPU."""
    return _draw(seed, index, _STREAM_INITIAL, numel, _uniform, 4)


def _draw(seed: int, index: int, stream: int, numel: int, transform: Transform, per_block: int) -> torch.Tensor:
    out = torch.empty(numel)
    blocks = -(-numel // per_block)
    for first in range(0, blocks, _BLOCKS_PER_CHUNK):
        last = min(first + _BLOCKS_PER_CHUNK, blocks)
        values = transform(philox4x32(_counters(first, last, index, stream), _key(seed)))
        start, stop = first * per_block, min(last * per_block, numel)
        out[start:stop] = values[: stop - start]
    return out


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def _counters(first: int, last: int, index: int, stream: int) -> torch.Tensor:
    block = torch.arange(first, last)
    return torch.stack((block & _MASK, block >> 32, torch.full_like(block, index), torch.full_like(block, stream)))


def _uniform(words: torch.Tensor) -> torch.Tensor:
    """One number a word: int64 [4, n] to float32 [4 n], block after block."""
    return words.T.double().add_(0.5).mul_(2.0**-31).sub_(1.0).flatten().float()


def _gaussian(words: torch.Tensor) -> torch.Tensor:
    """Box-Muller on two pairs of words: int64 [4, n] to float32 [4 n], block after block."""
    uniform = words.double().add_(0.5).mul_(2.0**-32)
    radius = uniform[0::2].log_().mul_(-2.0).sqrt_()
    angle = uniform[1::2].mul_(2.0 * math.pi)
    cosines, sines = radius * angle.cos(), radius * angle.sin()
    return torch.stack((cosines[0], sines[0], cosines[1], sines[1]), dim=1).flatten().float()


def _rademacher(words: torch.Tensor) -> torch.Tensor:
    """One sign a bit: int64 [4, n] to float32 [128 n], block after block, lowest bit first."""
    bits = (words.T.unsqueeze(-1) >> torch.arange(32)) & 1
    return bits.flatten().float().mul_(2.0).sub_(1.0)


_TRANSFORMS = {"gaussian": (_gaussian, 4), "rademacher": (_rademacher, 128)}
