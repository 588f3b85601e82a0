"""The normal numbers of ``noise`` on a GPU, in one kernel: Philox4x64-10 and Box-Muller with the bits of ``normal``.

Operations of float64 are those of ``normal`` in its order, each rounded once: the compiler is told to fuse none.
"""

import torch
import triton
import triton.language as tl

from sglang.srt.mezo.core.normal import BLOCK
from sglang.srt.mezo.core.philox import MULTIPLIERS, WEYL, signed

OPTIONS = {"COUNTS": 128, "enable_fp_fusion": False}
"""Counts of the radii of a program, which has as many of the angles; and what the compiler is told."""

_HALF_COUNTS = tl.constexpr(BLOCK // 16)  # of the radii of a block, 8 halves of words from each
_BLOCK = tl.constexpr(BLOCK)

_M0, _M1 = map(tl.constexpr, MULTIPLIERS)
_W0, _W1 = map(tl.constexpr, WEYL)
_OFFSET = tl.constexpr((0x3FF00000 - 0x3FE6A09E) << 32)
_SQRT_HALF = tl.constexpr(0x3FE6A09E << 32)
_MANTISSA = tl.constexpr((1 << 52) - 1)
_ROUNDING = tl.constexpr(1.5 * 2.0**52)


def blocks(seed: int, key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers of ``count`` blocks from block ``first`` on: float32 [count * BLOCK].

    Args:
        seed, key: unsigned 64-bit numbers.
    """
    out = torch.empty(count * BLOCK, device=device)
    grid = (count * (BLOCK // 16) // OPTIONS["COUNTS"],)
    counter = first * BLOCK // 8 + 1  # NumPy steps the counter before it encrypts it
    _fill[grid](out, signed(seed), signed(key), counter, **OPTIONS)
    return out


@triton.jit(do_not_specialize=["seed", "key", "counter"])
def _fill(out, seed, key, counter, COUNTS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    block, part = program // (_HALF_COUNTS // COUNTS), program % (_HALF_COUNTS // COUNTS)
    place = part * COUNTS + tl.arange(0, COUNTS).to(tl.int64)
    count = counter + block * (2 * _HALF_COUNTS) + place
    r0, r1, r2, r3 = _words(count, seed, key, COUNTS)
    a0, a1, a2, a3 = _words(count + _HALF_COUNTS, seed, key, COUNTS)
    to = out + block * _BLOCK + place * 8
    _store(to, r0, a0)
    _store(to + 2, r1, a1)
    _store(to + 4, r2, a2)
    _store(to + 6, r3, a3)


@triton.jit
def _words(count, seed, key, COUNTS: tl.constexpr):
    """The four words of each count."""
    c0 = count.to(tl.uint64)
    c1 = tl.zeros((COUNTS,), tl.uint64)
    c2 = tl.zeros((COUNTS,), tl.uint64)
    c3 = tl.zeros((COUNTS,), tl.uint64)
    k0 = tl.zeros((COUNTS,), tl.uint64) + seed.to(tl.int64).to(tl.uint64)
    k1 = tl.zeros((COUNTS,), tl.uint64) + key.to(tl.int64).to(tl.uint64)
    m0 = tl.full((COUNTS,), _M0, tl.uint64)
    m1 = tl.full((COUNTS,), _M1, tl.uint64)
    w0 = tl.full((COUNTS,), _W0, tl.uint64)
    w1 = tl.full((COUNTS,), _W1, tl.uint64)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _store(to, of_radius, of_angle):
    """The pairs of numbers of two words: of their lower halves, then of their upper ones."""
    cosine, sine = _pair(of_radius.to(tl.int32), of_angle.to(tl.int32))
    tl.store(to, cosine)
    tl.store(to + _BLOCK // 2, sine)
    cosine, sine = _pair((of_radius >> 32).to(tl.int32), (of_angle >> 32).to(tl.int32))
    tl.store(to + 1, cosine)
    tl.store(to + 1 + _BLOCK // 2, sine)


@triton.jit
def _pair(of_radius, of_angle):
    radius = tl.sqrt(_logarithm(_uniform(of_radius)) * -2.0)
    cosine, sine = _turn(_uniform(of_angle))
    return (cosine * radius).to(tl.float32), (sine * radius).to(tl.float32)


@triton.jit
def _uniform(word):
    return (word.to(tl.float64) + 2147483648.5) * 2.3283064365386963e-10


@triton.jit
def _logarithm(x):
    bits = x.to(tl.int64, bitcast=True) + _OFFSET
    exponent = ((bits >> 52) - 1023).to(tl.float64)
    f = ((bits & _MANTISSA) + _SQRT_HALF).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    even = 6.666666666666735130e-01 + w * (
        2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)
    )
    odd = 3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01)
    remainder = z * even + w * odd
    half = f * 0.5 * f
    low = s * (half + remainder) + exponent * 1.90821492927058770002e-10
    return exponent * 6.93147180369123816490e-01 - ((half - low) - f)


@triton.jit
def _turn(turns):
    quarters = turns * 4.0
    shifted = quarters + _ROUNDING
    quarter = shifted.to(tl.int64, bitcast=True)
    x = (quarters - (shifted - _ROUNDING)) * 1.57079632679489661923
    z = x * x
    of_sine = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
    of_sine = 2.75573137070700676789e-06 + z * of_sine
    of_sine = -1.98412698298579493134e-04 + z * of_sine
    of_sine = 8.33333333332248946124e-03 + z * of_sine
    of_sine = -1.66666666666666324348e-01 + z * of_sine
    sine = x + x * z * of_sine
    of_cosine = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
    of_cosine = -2.75573143513906633035e-07 + z * of_cosine
    of_cosine = 2.48015872894767294178e-05 + z * of_cosine
    of_cosine = -1.38888888888741095749e-03 + z * of_cosine
    of_cosine = 4.16666666666666019037e-02 + z * of_cosine
    half = z * 0.5
    near = 1.0 - half
    cosine = near + (((1.0 - near) - half) + z * z * of_cosine)
    is_odd = (quarter & 1) != 0
    swapped_cosine = tl.where(is_odd, sine, cosine)
    swapped_sine = tl.where(is_odd, cosine, sine)
    return (
        tl.where(((quarter + 1) & 2) != 0, -swapped_cosine, swapped_cosine),
        tl.where((quarter & 2) != 0, -swapped_sine, swapped_sine),
    )
