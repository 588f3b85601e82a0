"""Words of NumPy's Philox4x64-10 (Salmon et al., SC 2011) on any device: of a stream, from any place on."""

import numpy as np
import torch

WORDS = 4
"""Of 64 bits, from one count."""

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_HALF = 0xFFFFFFFF


def generator(seed: int, key: int, count: int = 0) -> np.random.Philox:
    """NumPy's own. ``count`` is what its counter stands at; the first word comes from the next."""
    return np.random.Philox(key=np.array([seed, key], np.uint64), counter=count)


def words(seed: int, key: int, count: int, counts: int, device: torch.device) -> torch.Tensor:
    """The words of so many counts.

    Args:
        seed, key: unsigned 64-bit numbers.

    Returns:
        int64 [4 counts], the bits of NumPy's unsigned numbers.
    """
    if device.type == "cpu":
        return torch.from_numpy(generator(seed, key, count).random_raw(WORDS * counts).view(np.int64))
    return _on_device(seed, key, count, counts, device)


def _on_device(seed: int, key: int, count: int, counts: int, device: torch.device) -> torch.Tensor:
    c0 = torch.arange(count + 1, count + 1 + counts, device=device)  # NumPy steps the counter before it encrypts it
    c1, c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0), torch.zeros_like(c0)
    for i in range(10):
        k0, k1 = signed(seed + i * WEYL[0]), signed(key + i * WEYL[1])
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 64 bits, as of unsigned numbers. Sums and products of int64 keep the lower 64 bits."""
    a0, a1, b0, b1 = a & _HALF, _upper(a), b & _HALF, b >> 32
    middle = a1 * b0 + _upper(a0 * b0)
    other = a0 * b1 + (middle & _HALF)
    return a1 * b1 + _upper(middle) + _upper(other), a * signed(b)


def _upper(a: torch.Tensor) -> torch.Tensor:
    return a >> 32 & _HALF


def signed(number: int) -> int:
    """The signed number with the same lower 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
