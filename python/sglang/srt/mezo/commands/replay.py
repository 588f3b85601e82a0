"""``sglang-mezo replay``: an adapter from a run's seed log, without a model.

sglang-mezo replay --run runs/mine --step 120 --output adapter-120
"""

import sys
from collections.abc import Sequence

from sglang.srt.mezo.training.arguments import build, read, status_of
from sglang.srt.mezo.training.replay import ReplayArguments, replay

KINDS = (ReplayArguments,)


def main(arguments: Sequence[str]) -> None:
    sys.exit(status_of(lambda: print(replay(*build(KINDS, read(_named(arguments), KINDS, __doc__))))))


def _named(arguments: Sequence[str]) -> list[str]:
    """``sglang-mezo replay RUN --step N`` as well."""
    first, *rest = arguments or ["--help"]
    return ["--run", first, *rest] if not first.startswith("-") else [first, *rest]
