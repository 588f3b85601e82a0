"""Settings, each said once, at its field: the default, the bounds, what it does, who may set it, what a run may change
of it.

What checks them, the command lines, the server's list of hyperparameters, the rules of a run that resumes and the
reference page all read it there.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.kinds import described, fits

Number = int | float

LARGEST = 1_000_000
"""Of what multiplies weights, perturbations or steps: nothing is learned beyond it, and float32 has room for the
products."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be; None bounds nothing. ``words`` say it where the numbers would not."""

    above: Number | None = None
    at_least: Number | None = None
    below: Number | None = None
    at_most: Number | None = None
    words: str | None = None

    def problem(self, value: Number) -> str | None:
        """What is allowed on the side on which the value is not within the bounds; None where it is."""
        over = (self.at_most is not None and value > self.at_most) or (self.below is not None and value >= self.below)
        # No comparison holds for what is no number.
        positive = self.above is None or value > self.above
        enough = self.at_least is None or value >= self.at_least
        if positive and enough and not over:
            return None
        if self.words is not None or self.below is not None:
            return str(self)
        if over:
            return f"at most {self.at_most}"
        if not positive:
            return "a positive number" if self.above == 0 else f"above {self.above}"
        return "zero or more" if self.at_least == 0 else f"at least {self.at_least}"

    def __str__(self) -> str:
        if self.words is not None:
            return self.words
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        named = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{name} {bound}" for name, bound in named.items() if bound is not None)


@dataclass(frozen=True)
class Setting:
    """What a field says of itself.

    Attributes:
        help: what it does, in a sentence.
        bounds: of its numbers.
        follows: the default depends on other settings, and is settled by the class.
        job: whether a job of a server may set it, and within which bounds of the server's.
        resume: whether a run that goes on must have it as it was.
    """

    help: str
    bounds: Bounds
    follows: bool
    job: Bounds | None
    resume: Literal["same", "any"]


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    above: Number | None = None,
    at_least: Number | None = None,
    below: Number | None = None,
    at_most: Number | None = None,
    words: str | None = None,
    follows: bool = False,
    job: bool | Bounds = False,
    resume: Literal["same", "any"] = "same",
) -> Any:
    """A field of a dataclass of settings; see ``Bounds`` and ``Setting``. Without ``default`` it must be given."""
    bounds = Bounds(above, at_least, below, at_most, words)
    of_job = Bounds() if job is True else job or None
    return field(default=default, metadata={"setting": Setting(help, bounds, follows, of_job, resume)})


def setting_of(one: "Field[Any]") -> Setting:
    """What a field that ``setting`` made says of itself."""
    return one.metadata["setting"]


def names(kind: type, *, job: bool = False, resume: Literal["same", "any"] | None = None) -> list[str]:
    """Fields of a class of settings: of all, those that a job may set, or those that a run that resumes may change
    or not."""
    return [
        one.name
        for one in fields(kind)
        if (not job or setting_of(one).job is not None) and resume in (None, setting_of(one).resume)
    ]


def require_settings(settings: Any) -> None:
    """ConfigError for the first field whose value is not of its type, or not within its bounds.

    What follows from other settings may be None.
    """
    kinds = get_type_hints(type(settings))
    for one in fields(settings):
        value, own = getattr(settings, one.name), setting_of(one)
        if own.follows and value is None:
            continue
        if not fits(value, kinds[one.name]):
            raise ConfigError(one.name, value, described(kinds[one.name]))
        if isinstance(value, int | float) and (allowed := own.bounds.problem(value)) is not None:
            raise ConfigError(one.name, value, allowed)


def rows(kind: type) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, type, default, bounds, what it does) of every field, in words, for a page."""
    kinds = get_type_hints(kind)
    for one in fields(kind):
        own = setting_of(one)
        yield one.name, described(kinds[one.name]), _default(one), str(own.bounds), own.help


def _default(one: "Field[Any]") -> str:
    """As JSON has it; nothing where the field must be given, or what it is depends on others."""
    return "" if one.default is MISSING or setting_of(one).follows else json.dumps(one.default)
