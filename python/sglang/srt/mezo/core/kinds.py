"""Types of settings: whether a value is of one, how a message calls it, and what a text on a command line stands
for."""

from collections.abc import Collection
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sglang.srt.mezo.core.errors import ConfigError

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list[str]: "a list of strings",
    list[int]: "a list of whole numbers",
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the type: a boolean is no number, a whole number is a number, and a string is neither."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, choice) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, *get_args(kind)) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def described(kind: Any) -> str:
    """The values of a type in words, as JSON has them."""
    if get_origin(kind) in (Union, UnionType):
        choices = [described(choice) for choice in get_args(kind) if choice is not NoneType]
        return ", ".join([*choices, "null"] if NoneType in get_args(kind) else choices)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _NAMES.get(kind, str(kind))


def require_types(settings: Any, unset: Collection[str] = ()) -> None:
    """ConfigError for the first field of a dataclass, those in ``unset`` left out, whose value is not of its type."""
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in unset and not fits(value, kinds[field.name]):
            raise ConfigError(field.name, value, described(kinds[field.name]))


def from_text(name: str, text: str, kind: Any) -> Any:
    """What a text stands for, of several types in the first; ConfigError names the setting where it is no value of its
    type.

    Items of a list have commas between.
    """
    if get_origin(kind) in (Union, UnionType):
        if NoneType in get_args(kind) and text.lower() in _NOTHING:
            return None
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    if get_origin(kind) is list:
        return [from_text(name, item.strip(), *get_args(kind)) for item in text.split(",") if item.strip()]
    choices = (
        {str(choice): choice for choice in get_args(kind)}
        if get_origin(kind) is Literal
        else _WORDS
        if kind is bool
        else None
    )
    try:
        return kind(text) if choices is None else choices[text if text in choices else text.lower()]
    except (KeyError, ValueError):
        raise ConfigError(name, text, described(kind)) from None
