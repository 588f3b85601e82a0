"""What makes a row one that cannot be used, and how that is told."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.texts import Result

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]


def usable(outcomes: Iterable[Result | DataError], on_bad_row: OnBadRow) -> Iterator[Result]:
    """Those that are no error. An error is raised, or logged and left out with ``on_bad_row="skip"``."""
    for outcome in outcomes:
        if not isinstance(outcome, DataError):
            yield outcome
        elif on_bad_row == "raise":
            raise outcome
        else:
            logger.warning("skipped %s", outcome)


def require_choice(options: Sequence[str], label: Any) -> None:
    """Raise DataError where ``label`` is none of the options, or these cannot be told apart."""
    if not options or not all(options):
        raise DataError(f"options={shown(list(options))}: at least one is needed, and none may be empty")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(options):
        raise DataError(f"label={shown(label)} must be an index of the {len(options)} options")
    require_distinct(options, options)


def require_distinct(options: Sequence[str], values: Sequence[Any]) -> None:
    """Between two options that are the same, as text or as tokens, nothing can be chosen or learned."""
    first: dict[Any, int] = {}
    for place, value in enumerate(values):
        if (earlier := first.setdefault(value, place)) != place:
            told = [shown(options[i]) for i in (earlier, place)]
            raise DataError(
                f"options[{earlier}]={told[0]} and options[{place}]={told[1]} are the same tokens: nothing tells one "
                "from the other"
            )


def require_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}={shown(value)} must be a non-empty string")
    require_unicode(name, value)


def require_unicode(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no Unicode text: {error}") from error


def problem(error: Exception, row: SourceRow) -> DataError:
    """Why a row cannot be used, with its place."""
    told = DataError(_reason(error), row.source, row.line)
    told.__cause__ = error
    return told


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.reason
    if isinstance(error, KeyError):
        return f"column {error.args[0]!r} is missing"
    return f"{type(error).__name__}: {error}"
