"""Perturbation directions z from a counter-based stream.

Element i of direction k under seed s is a pure function of (s, k, i): it does not depend on the batch, the order of
drawing or how an adapter is sharded, so a step can be replayed from its seed alone. Directions are always drawn on the
CPU; the logarithm and the cosine may differ by an ulp of float64 between kinds of processors, which changes about one
number in 10^9 after rounding to float32 (Rademacher directions are exact everywhere). The generator is NumPy's
Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream NumPy guarantees.
Normal numbers come from the Box-Muller transform in float64, rounded once to float32.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from sglang.srt.mezo.core.library import load

Distribution = Literal["gaussian", "rademacher"]

Shapes = Sequence[tuple[int, int]]
"""(rows, columns) of the matrices that a flat vector holds one after the other."""

_BLOCK = 1 << 15  # normal numbers that belong together; a stream can be entered at multiples of it
_BLOCK_COUNTS: dict[Distribution, int] = {"gaussian": _BLOCK // 8, "rademacher": _BLOCK // 256}  # steps of the counter
LARGEST_GAUSSIAN = math.sqrt(-2.0 * math.log(2.0**-33))
"""No normal number that is drawn is larger, up or down."""

_BLOCKS_AT_ONCE = 8  # enough work for several threads

# [256, 8]: the signs that the bits of a byte stand for, lowest bit first.
_SIGNS = torch.tensor([[1.0 if octet >> bit & 1 else -1.0 for bit in range(8)] for octet in range(256)])

LIBRARY = load(__file__, "_noise")
if LIBRARY is not None:
    LIBRARY.mezo_add_signs.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float),
        *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    ]
    LIBRARY.mezo_add_signs.restype = None

# Streams that are drawn for different purposes.
_DIRECTION, _STEP_SEED, _INITIAL, _BASIS = range(4)


def numel_of(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


def step_seed(run_seed: int, step: int, interval: int = 1) -> int:
    """The 64-bit seed of one step: a function of the run's seed and the step's number only.

    Args:
        interval: steps in a row whose seeds share their upper half, which low-rank directions take their basis from.
    """
    seed = int(_generator(run_seed, _STEP_SEED, 0, step).random_raw())
    if interval == 1:
        return seed
    first = int(_generator(run_seed, _STEP_SEED, 0, step - step % interval).random_raw())
    return first >> 32 << 32 | seed & 0xFFFFFFFF


def direction(
    seed: int, index: int, numel: int, distribution: Distribution = "gaussian", first: int = 0
) -> torch.Tensor:
    """Draw direction ``index`` of the step that has ``seed``, or a stretch of it.

    Args:
        seed: unsigned 64-bit step seed.
        index: number of the direction within the step (0 for two-point MeZO), below 2^32.
        numel: how many numbers; of the whole direction, as many as there are trainable parameters, in the flat order
            of the adapter.
        distribution: "gaussian" for N(0, 1), "rademacher" for +-1 with equal probability.
        first: of the numbers in the whole direction.

    Returns:
        float32 [numel] on the CPU.
    """
    block, skipped = divmod(first, _BLOCK)
    generator = _generator(seed, _DIRECTION, index, block * _BLOCK_COUNTS[distribution])
    return _draw(generator, skipped + numel, distribution)[skipped:]


def add_direction(
    seed: int,
    index: int,
    scale: float,
    base: torch.Tensor,
    out: torch.Tensor,
    distribution: Distribution = "gaussian",
    first: int = 0,
) -> torch.Tensor:
    """out = base + scale z, of the numbers of ``direction`` from ``first`` on; returns ``out``.

    Args:
        base, out: float32 [n] on the CPU, contiguous, which may be the same.
    """
    if LIBRARY is None or distribution != "rademacher":
        return torch.add(base, direction(seed, index, out.numel(), distribution, first), alpha=scale, out=out)
    for vector in (base, out):
        if not (vector.dtype is torch.float32 and vector.is_contiguous() and vector.device.type == "cpu"):
            raise ValueError(f"a contiguous float32 vector on the CPU is needed, not {vector.dtype} on {vector.device}")
    if base.numel() != out.numel():
        raise ValueError(f"base has {base.numel()} numbers, and out {out.numel()}")
    LIBRARY.mezo_add_signs(out.data_ptr(), base.data_ptr(), out.numel(), scale, seed, _DIRECTION << 32 | index, first)
    return out


def low_rank_direction(
    seed: int, index: int, shapes: Shapes, rank: int, distribution: Distribution = "gaussian"
) -> torch.Tensor:
    """Like ``direction``, but u v' / sqrt(rank) in every matrix (LOZO, arXiv 2410.07698, with Gaussian u and v).

    Args:
        seed: v depends on its upper half only, so that seeds of ``step_seed`` with an interval share it.
        shapes: of the matrices that the adapter's flat vector holds.
        rank: columns of u and v.
        distribution: of the numbers of u and v.

    Returns:
        float32 [parameters] on the CPU; every number has mean 0 and variance 1.
    """
    left = _draw(_generator(seed, _DIRECTION, index), rank * sum(rows for rows, _ in shapes), distribution)
    right = _draw(_generator(seed >> 32, _BASIS, index), rank * sum(columns for _, columns in shapes), distribution)
    matrices, row, column = [], 0, 0
    for rows, columns in shapes:
        u = left[row * rank : (row + rows) * rank].view(rows, rank)
        v = right[column * rank : (column + columns) * rank].view(columns, rank)
        matrix = torch.zeros(rows, columns)
        for i in range(rank):  # term by term, as a matrix product may add in any order
            matrix += u[:, i, None] * v[:, i]
        matrices.append(matrix.flatten())
        row, column = row + rows, column + columns
    return torch.cat(matrices).div_(math.sqrt(rank))


def initial_uniform(seed: int, index: int, numel: int) -> torch.Tensor:
    """Uniform numbers on [-1, 1] for the initial weights of matrix ``index``: float32 [numel] on the CPU."""
    words = torch.from_numpy(_words(_generator(seed, _INITIAL, index), numel))
    return words.double().add_(2.0**31 + 0.5).mul_(2.0**-31).sub_(1.0).float()


def _generator(seed: int, stream: int, index: int, counter: int = 0) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream << 32 | index], np.uint64), counter=counter)


def _words(generator: np.random.Philox, count: int) -> np.ndarray:
    """The next 32-bit words of a stream as signed numbers, the lower half of each 64 bits first."""
    return generator.random_raw(-(-count // 2)).astype("<u8", copy=False).view("<i4")[:count]


def _draw(generator: np.random.Philox, numel: int, distribution: Distribution) -> torch.Tensor:
    return _rademacher(generator, numel) if distribution == "rademacher" else _gaussian(generator, numel)


def _gaussian(generator: np.random.Philox, numel: int) -> torch.Tensor:
    """Box-Muller, block after block: radii from the first half of a block's words, angles from the second.

    The first half of the numbers are the cosines, the second the sines.
    """
    out = torch.empty(numel)
    size = min(_BLOCKS_AT_ONCE, -(-numel // _BLOCK)) * _BLOCK
    for start in range(0, numel, size):
        uniform = (
            torch.from_numpy(_words(generator, size))
            .double()
            .add_(2.0**31 + 0.5)
            .mul_(2.0**-32)
            .view(-1, 2, _BLOCK // 2)
        )
        radius = uniform[:, 0].log_().mul_(-2.0).sqrt_()
        angle = uniform[:, 1].mul_(2.0 * math.pi)
        sine = angle.sin().mul_(radius)
        numbers = torch.stack((angle.cos_().mul_(radius), sine), dim=1).flatten()
        out[start : start + size] = numbers[: numel - start]
    return out


def _rademacher(generator: np.random.Philox, numel: int) -> torch.Tensor:
    """One sign a bit, lowest bit first."""
    octets = generator.random_raw(-(-numel // 64)).astype("<u8", copy=False).view(np.uint8)
    return _SIGNS.index_select(0, torch.from_numpy(octets).int()).view(-1)[:numel]
