"""Errors that a user can cause and mend. Each message names the field or file, the value, and what is allowed."""

import reprlib

_MOST_CHARACTERS = 300

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlist = _short.maxtuple = _short.maxdict = 20


def shown(value: object) -> str:
    """A value as a message shows it: ``repr``, cut where it is long or deep."""
    text = _short.repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def one_line(error: BaseException) -> str:
    """What an exception of another library says, on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


class MezoError(Exception):
    """Base of every error that sglang-mezo raises on purpose."""


class ConfigError(MezoError, ValueError):
    """A configuration field has a value that cannot work."""

    def __init__(self, field: str, value: object, allowed: str):
        super().__init__(field, value, allowed)
        self.field = field
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.field}={shown(self.value)} is not allowed: {self.allowed}"


class UsageError(MezoError, ValueError):
    """A command line cannot be read."""


class BaseModelError(ConfigError):
    """A run or an adapter belongs to another base model than the one that the engine has loaded."""

    def __init__(self, value: object, trained_on: object):
        super().__init__(
            "base_model", value, f"the run belongs to another one, {trained_on!r}, or to other weights under this name"
        )


class DataError(MezoError, ValueError):
    """A row or a file of training data cannot be used."""

    def __init__(self, reason: str, source: str | None = None, line: int | None = None):
        super().__init__(reason, source, line)
        self.reason = reason
        self.source = source
        self.line = line

    def __str__(self) -> str:
        where = [str(part) for part in (self.source, self.line) if part is not None]
        return ": ".join([":".join(where), self.reason] if where else [self.reason])


class CapacityError(MezoError, RuntimeError):
    """The engine has no room (adapter slots, rank, KV tokens, request rows) for what was asked."""


class LogError(MezoError, ValueError):
    """A seed log cannot be read, or does not belong to the adapter it is replayed on."""


class DamagedError(MezoError, ValueError):
    """A file of a run or of an adapter is not as it was written."""

    def __init__(self, path: object, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.reason}"


class DivergedError(MezoError, RuntimeError):
    """A loss, or what a step makes of the adapter, is infinite or not a number; the adapter and the seed log are
    those of the step before."""


class RewardError(MezoError, RuntimeError):
    """A reward failed, or is not one finite number for each completion; the run ends at its last step."""


class RankError(MezoError, RuntimeError):
    """A tensor-parallel rank has died, or no longer agrees with the first."""

    def __init__(self, rank: int, exit_code: int | None):
        super().__init__(rank, exit_code)
        self.rank = rank
        self.exit_code = exit_code

    def __str__(self) -> str:
        if self.exit_code is None:
            return f"theta of tensor-parallel rank {self.rank} is not that of rank 0: the run ends at its last step"
        return (
            f"tensor-parallel rank {self.rank} has ended with {self.exit_code}: the run ends, and goes on with "
            "resume_from_checkpoint"
        )
