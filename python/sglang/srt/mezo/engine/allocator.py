"""Memory for activations: kept by the process between passes, as PyTorch's allocator does on accelerators.

By default glibc gives large blocks back to the system when they are freed, and every page of the next one faults
anew: an activation of 50 MB then takes seven times as long to write. Not for a server, which would keep for good what
its longest request took.
"""

import ctypes
import os

# Keys of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
_LARGEST_BLOCK = 1 << 30


def keep_freed_memory() -> None:
    """Nothing where the C library is another one, or where the user has set its MALLOC_ variables."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
