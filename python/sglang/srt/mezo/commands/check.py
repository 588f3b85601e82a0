"""``sglang-mezo check``: whether an SGLang has everything that we hook and call, as it is needed; or whether this
machine has what an experiment needs.

sglang-mezo check                        # the one beside us
sglang-mezo check --against 0.5.22       # another version, from the package index, without installing it
sglang-mezo check --against FILE.whl
sglang-mezo check --reproduction table1  # memory, model, data, disk for an experiment, before it runs
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from sglang.srt.mezo.commands.experiment import ExperimentArguments, opened
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.engine.contract import differences
from sglang.srt.mezo.engine.upstream_source import UpstreamSource
from sglang.srt.mezo.experiments.readiness import needs_of
from sglang.srt.mezo.training.arguments import build, read, status_of


@dataclass(frozen=True)
class CheckArguments:
    """Which SGLang is looked at, or for which experiment; ConfigError names the field at fault."""

    against: Optional[str] = setting(None, "Version in the package index, or a wheel; the installed one by default.")
    reproduction: Optional[str] = setting(None, "An experiment, by its name or its folder, in the place of an SGLang.")

    def __post_init__(self):
        require_settings(self)
        if self.reproduction is not None and self.against is not None:
            raise ConfigError("against", self.against, "nothing beside reproduction: they are two questions")


def main(arguments: Sequence[str]) -> None:
    found = 0

    def check() -> None:
        nonlocal found
        (wanted,) = build((CheckArguments,), read(arguments, (CheckArguments,), __doc__))
        found = report(wanted.against) if wanted.reproduction is None else report_needs(wanted.reproduction)

    sys.exit(status_of(check) or min(found, 1))


def report(against: str | None) -> int:
    """Say what does not fit; returns how much that is."""
    with tempfile.TemporaryDirectory() as folder:
        source = (
            UpstreamSource.installed() if against is None else UpstreamSource.of_wheel(wheel(against, Path(folder)))
        )
        found = list(differences(source))
    for difference in found:
        print(difference)
    print(f"sglang {source.version}: {f'{len(found)} differences' if found else 'everything is as it is needed'}")
    return len(found)


def report_needs(name: str) -> int:
    """Say what this machine lacks for an experiment; returns how much that is."""
    needs = needs_of(opened(name, ExperimentArguments(), make=False).experiment)
    for need in needs:
        print(f"{'enough ' if need.enough else 'MISSING'} {need.what}: {need.found}")
    return sum(not need.enough for need in needs)


def wheel(against: str, folder: Path) -> Path:
    """The wheel itself, or that of a version, downloaded by pip.

    Raises:
        ConfigError: there is none.
    """
    if against.endswith(".whl"):
        if not Path(against).is_file():
            raise ConfigError("against", against, "a version, or a wheel that is there")
        return Path(against)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        f"sglang=={against}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise ConfigError("against", against, f"a version that pip can download as a wheel ({reason})")
    return wheels[0]
