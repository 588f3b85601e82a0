"""Perturbation directions z from a counter-based stream.

Element i of direction k under seed s is a pure function of (s, k, i): it does not depend on the batch, the order of
drawing, how weights are sharded or which device draws it, so a step can be replayed from its seed alone. The generator
is NumPy's Philox4x64-10, whose stream NumPy guarantees; what is made of its words has the same bits everywhere
(``normal``). On the CPU ``noise.c`` draws, where that is built, and ``normal_triton`` on a GPU.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch

from sglang.srt.mezo.core import normal, philox
from sglang.srt.mezo.core.library import load

logger = logging.getLogger(__name__)

Distribution = Literal["gaussian", "rademacher"]

Shape = tuple[int, ...]
"""(rows, columns) of a matrix, or (numbers,) of a vector."""
Shapes = Sequence[Shape]
"""Of the matrices and vectors that a flat vector holds one after the other."""

LARGEST_GAUSSIAN = math.sqrt(-2.0 * math.log(2.0**-33))
"""No normal number that is drawn is larger, up or down."""

_SIGNS = 64 * philox.WORDS  # from one count
# Numbers that are drawn at a time: enough for several threads, or for a device.
_AT_ONCE, _AT_ONCE_ON_DEVICE = 1 << 18, 1 << 24
_CPU = torch.device("cpu")

LIBRARY = load(__file__, "_noise")
if LIBRARY is not None:
    for function in (LIBRARY.mezo_add_signs, LIBRARY.mezo_add_normal):
        function.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float),
            *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
        ]
        function.restype = None

# Streams that are drawn for different purposes.
_DIRECTION, _STEP_SEED, _INITIAL, _BASIS, _SAMPLE = range(5)


def numel_of(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def step_seed(run_seed: int, step: int, interval: int = 1) -> int:
    """The 64-bit seed of one step: a function of the run's seed and the step's number only.

    Args:
        interval: steps in a row whose seeds share their upper half, which low-rank directions take their basis from.
    """
    seed = _first_word(run_seed, step)
    if interval == 1:
        return seed
    return _first_word(run_seed, step - step % interval) >> 32 << 32 | seed & 0xFFFFFFFF


def direction(
    seed: int, index: int, numel: int, distribution: Distribution = "gaussian", first: int = 0
) -> torch.Tensor:
    """Draw direction ``index`` of the step that has ``seed``, or a stretch of it.

    Args:
        seed: unsigned 64-bit step seed.
        index: number of the direction within the step (0 for two-point MeZO), below 2^32.
        numel: how many numbers; of the whole direction, as many as there are trainable parameters, in the flat order
            of what is trained.
        distribution: "gaussian" for N(0, 1), "rademacher" for +-1 with equal probability.
        first: of the numbers in the whole direction.

    Returns:
        float32 [numel] on the CPU.
    """
    return _numbers(seed, _DIRECTION << 32 | index, numel, distribution, first)


def add_direction(
    seed: int,
    index: int,
    scale: float,
    base: torch.Tensor,
    out: torch.Tensor,
    distribution: Distribution = "gaussian",
    first: int = 0,
) -> torch.Tensor:
    """out = base + scale z, rounded once, of the numbers of ``direction`` from ``first`` on; returns ``out``.

    Args:
        base, out: float32 [n] on one device, contiguous, which may be the same.
    """
    for vector in (base, out):
        if not (vector.dtype is torch.float32 and vector.is_contiguous() and vector.device == out.device):
            raise ValueError(f"contiguous float32 on {out.device} is needed, not {vector.dtype} on {vector.device}")
    if base.numel() != out.numel():
        raise ValueError(f"base has {base.numel()} numbers, and out {out.numel()}")
    return _add(seed, _DIRECTION << 32 | index, scale, base, out, distribution, first)


def low_rank_factors(
    seed: int, index: int, shapes: Shapes, rank: int, distribution: Distribution = "gaussian"
) -> tuple[list[torch.Tensor], ...]:
    """Of direction ``index``, which is u v' / sqrt(rank) in every matrix, and u in every vector (LOZO, arXiv
    2410.07698, with Gaussian u and v).

    Args:
        seed: v depends on its upper half only, so that seeds of ``step_seed`` with an interval share it.
        shapes: of the matrices and vectors.
        rank: columns of u and v.
        distribution: of the numbers of u and v.

    Returns:
        u [rows, rank] and v [columns, rank] of each matrix, u [numbers, 1] and v [0, 1] of each vector: float32 on
        the CPU.
    """
    ranks = [rank if len(shape) == 2 else 1 for shape in shapes]
    rows = [own * shape[0] for own, shape in zip(ranks, shapes)]
    columns = [rank * shape[1] if len(shape) == 2 else 0 for shape in shapes]
    left = _numbers(seed, _DIRECTION << 32 | index, sum(rows), distribution)
    right = _numbers(seed >> 32, _BASIS << 32 | index, sum(columns), distribution)
    return tuple(
        [part.view(-1, own) for own, part in zip(ranks, drawn.split(lengths))]
        for drawn, lengths in ((left, rows), (right, columns))
    )


def initial_uniform(seed: int, index: int, numel: int) -> torch.Tensor:
    """Uniform numbers on [-1, 1] for the initial weights of matrix ``index``: float32 [numel] on the CPU."""
    words = philox.words(seed, _INITIAL << 32 | index, 0, -(-numel // (2 * philox.WORDS)), _CPU)
    return words.view(torch.int32)[:numel].double().add_(2.0**31 + 0.5).mul_(2.0**-31).sub_(1.0).float()


def sample_uniform(seed: int, index: int, place: int) -> float:
    """Where on [0, 1) token ``place`` of the ``index``-th text is drawn that a step with ``seed`` has written."""
    return (int(philox.generator(seed, _SAMPLE << 32 | index, place).random_raw()) >> 11) * 2.0**-53


def _first_word(run_seed: int, step: int) -> int:
    return int(philox.generator(run_seed, _STEP_SEED << 32, step).random_raw())


def _numbers(seed: int, key: int, numel: int, distribution: Distribution, first: int = 0) -> torch.Tensor:
    """Of the stream ``key``, from ``first`` on: float32 [numel] on the CPU."""
    zeros = torch.zeros(numel)
    return _add(seed, key, 1.0, zeros, zeros, distribution, first)


def _add(
    seed: int, key: int, scale: float, base: torch.Tensor, out: torch.Tensor, distribution: Distribution, first: int
) -> torch.Tensor:
    """out = base + scale numbers of the stream ``key``; returns ``out``."""
    if LIBRARY is not None and out.device.type == "cpu":
        add = LIBRARY.mezo_add_signs if distribution == "rademacher" else LIBRARY.mezo_add_normal
        add(out.data_ptr(), base.data_ptr(), out.numel(), scale, seed, key, first)
        return out
    at_once = _AT_ONCE if out.device.type == "cpu" else _AT_ONCE_ON_DEVICE
    for start in range(0, out.numel(), at_once):
        stretch = slice(start, start + at_once)
        z = _drawn(seed, key, first + start, out[stretch].numel(), distribution, out.device)
        torch.add(base[stretch], z, alpha=scale, out=out[stretch])
    return out


def _drawn(
    seed: int, key: int, first: int, numel: int, distribution: Distribution, device: torch.device
) -> torch.Tensor:
    """Numbers of a stream from ``first`` on: float32 [numel] on the device."""
    counts = normal.BLOCK // (_SIGNS if distribution == "rademacher" else 2 * philox.WORDS)
    start, stop = first // normal.BLOCK, -(-(first + numel) // normal.BLOCK)
    if distribution == "gaussian" and has_kernel(device.type):
        from sglang.srt.mezo.core import normal_triton

        return normal_triton.blocks(seed, key, start, stop - start, device)[first - start * normal.BLOCK :][:numel]
    words = philox.words(seed, key, start * counts, (stop - start) * counts, device)
    numbers = _rademacher(words) if distribution == "rademacher" else _gaussian(words)
    return numbers[first - start * normal.BLOCK :][:numel]


@cache
def has_kernel(device_type: str) -> bool:
    """Whether normal numbers are drawn by a kernel of Triton there: where that is, and gives the bits of the CPU."""
    if device_type != "cuda":
        return False
    try:
        from sglang.srt.mezo.core import normal_triton
    except ImportError:
        return False
    found = normal_triton.blocks(1, 2, 3, 1, torch.device(device_type)).cpu()
    counts = normal.BLOCK // (2 * philox.WORDS)
    same = torch.equal(found, _gaussian(philox.words(1, 2, 3 * counts, counts, _CPU)))
    if not same:
        logger.warning(
            "Triton's normal numbers are not those of the CPU: they are drawn by PyTorch, which takes longer"
        )
    return same


def _rademacher(words: torch.Tensor) -> torch.Tensor:
    """One sign a bit, lowest bit first."""
    octets = words.view(torch.uint8)[:, None]
    bits = octets >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.flatten().float().mul_(2.0).sub_(1.0)


def _gaussian(words: torch.Tensor) -> torch.Tensor:
    """Block after block: radii from the first half of its words, angles from the second; cosines, then sines."""
    halves = words.view(torch.int32).view(-1, 2, normal.BLOCK // 2)
    return torch.stack(normal.pairs(halves[:, 0], halves[:, 1]), dim=1).flatten()
