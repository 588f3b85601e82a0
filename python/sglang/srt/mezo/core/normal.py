"""Box-Muller on 32-bit words, with the same bits on every machine and device, and in ``noise.c``.

Every operation is one that IEEE 754 rounds in one way, each a kernel of its own, so that no compiler contracts two of
them. The logarithm, sine and cosine are those of FreeBSD's msun (Sun Microsystems, 1993): within an ulp of float64, and
the numbers are rounded to float32 then.
"""

import torch

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
_HALF_PI = 1.57079632679489661923
BLOCK = 1 << 15
"""Normal numbers of a stream that belong together: cosines, then as many sines."""
_ROUNDING = 1.5 * 2.0**52  # what is added to it has its whole part in the lowest bits
_OFFSET, _SQRT_HALF, _MANTISSA = (0x3FF00000 - 0x3FE6A09E) << 32, 0x3FE6A09E << 32, (1 << 52) - 1


def pairs(of_radius: torch.Tensor, of_angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers, cosines and sines.

    Args:
        of_radius, of_angle: int32 of one shape, all values equally likely.

    Returns:
        float32 of that shape, twice.
    """
    radius = (_logarithm(_uniform(of_radius)) * -2.0).sqrt()
    cosine, sine = _turn(_uniform(of_angle))
    return (cosine * radius).float(), (sine * radius).float()


def _uniform(words: torch.Tensor) -> torch.Tensor:
    """Numbers inside (0, 1), exactly."""
    return (words.double() + 2147483648.5) * 2.0**-32


def _logarithm(x: torch.Tensor) -> torch.Tensor:
    """Of normal numbers: of 2^exponent (1 + f) with 1 + f about 1."""
    bits = x.view(torch.int64) + _OFFSET
    exponent = ((bits >> 52) - 1023).double()
    f = ((bits & _MANTISSA) + _SQRT_HALF).view(torch.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    remainder = z * _polynomial(w, _LOG[0::2]) + w * _polynomial(w, _LOG[1::2])
    half = f * 0.5 * f
    return exponent * _LN2_HIGH - ((half - (s * (half + remainder) + exponent * _LN2_LOW)) - f)


def _turn(turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of so many turns, from 0 to 1: of what is left of them beside whole quarters, which only swap and
    negate."""
    quarters = turns * 4.0
    shifted = quarters + _ROUNDING
    quarter = shifted.view(torch.int64)
    x = (quarters - (shifted - _ROUNDING)) * _HALF_PI
    z = x * x
    sine = x + x * z * _polynomial(z, _SIN)
    half = z * 0.5
    near = 1.0 - half
    cosine = near + (((1.0 - near) - half) + z * z * _polynomial(z, _COS))
    odd = (quarter & 1).bool()
    cosine, sine = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return (torch.where((quarter + 1 & 2).bool(), -cosine, cosine), torch.where((quarter & 2).bool(), -sine, sine))


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    """Horner's rule; the coefficient of x^0 comes first."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = x * total + coefficient
    return total
