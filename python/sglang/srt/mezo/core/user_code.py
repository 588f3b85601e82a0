"""Code of the user's, by name."""

import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from sglang.srt.mezo.core.errors import ConfigError, one_line

Made = TypeVar("Made")


def user_object(field: str, name: str, needed: str, make: Callable[[Any], Made]) -> Made:
    """What ``make`` makes of that which ``name`` names, ``module:attribute``; modules of the working directory are
    found as well.

    Args:
        field: setting that has the name.
        needed: what is allowed there, in words.

    Raises:
        ConfigError: there is none, or ``make`` cannot do with it.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if ":" not in name:
            raise ValueError("no colon")
        return make(pkgutil.resolve_name(name))
    except Exception as error:  # whatever the module raises
        raise ConfigError(field, name, f"{needed} ({type(error).__name__}: {one_line(error)})") from error
