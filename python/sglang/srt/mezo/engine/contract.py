"""The contract with SGLang: names of it that we import or hook, and of its objects that we use, what each is, and why.

Where a version of SGLang has them all as they are here, our hooks and calls fit; ``sglang-mezo check`` says which do
not.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sglang.srt.mezo.engine.upstream_source import UpstreamSource


class Point(NamedTuple):
    """A name of SGLang's.

    what: parameters of a function (= where there is a default, "(...)" for whatever it takes), "class", "property",
        "module" or "value".
    """

    module: str
    name: str
    what: str
    why: str


class Difference(NamedTuple):
    """Where a version does not keep the contract; ``found`` is None where the name is not there."""

    point: Point
    found: str | None

    def __str__(self) -> str:
        point, name = self.point, f"{self.point.module}.{self.point.name}"
        now = "is not there" if self.found is None else f"is {self.found} there, and {point.what} here"
        return f"{name} {now}: {point.why}"


def differences(source: UpstreamSource) -> Iterator[Difference]:
    """What of the contract a version of SGLang does not keep."""
    for point in points():
        found = source.signature(point.module, point.name)
        if found != point.what and not _does_as_well(found, point.what):
            yield Difference(point, found)


def _does_as_well(found: str | None, what: str) -> bool:
    """Whether it is used in the same way: called, whatever the parameters are, or read."""
    return (what == "(...)" and (found or "").startswith("(")) or {found, what} == {"property", "value"}


def points() -> Iterator[Point]:
    """The contract, from ``contract.toml``."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for module, names in table.items():
        for name, (what, why) in names.items():
            yield Point(module, name, what, why)
