"""Libraries in C that are built with the package where there is a compiler."""

import ctypes
import sysconfig
from pathlib import Path


def load(module: str, name: str) -> ctypes.CDLL | None:
    """A library that lies beside a module, whose ``__file__`` is given; None where it was not built."""
    path = Path(module).with_name(name + sysconfig.get_config_var("EXT_SUFFIX"))
    return ctypes.CDLL(str(path)) if path.exists() else None
