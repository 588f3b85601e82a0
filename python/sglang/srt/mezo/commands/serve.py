"""``sglang-mezo serve``: the same server as ``sglang serve --enable-mezo``."""

import os
import sys
from collections.abc import Sequence

from sglang.srt.mezo.engine.server import serve
from sglang.srt.mezo.service.wire.settings import ENABLE_VARIABLE
from sglang.srt.mezo.training.arguments import status_of


def main(arguments: Sequence[str]) -> None:
    os.environ[ENABLE_VARIABLE] = "1"
    sys.exit(status_of(lambda: serve(arguments)))
