"""Libraries in C that are built with the package where there is a compiler."""

import ctypes
import sysconfig
from pathlib import Path


def load(name: str) -> ctypes.CDLL | None:
    """A library of this folder, or None where it was not built."""
    path = Path(__file__).with_name(name + sysconfig.get_config_var("EXT_SUFFIX"))
    return ctypes.CDLL(str(path)) if path.exists() else None
