"""``sglang-mezo serve``: ``sglang serve`` with fine-tuning on."""

import os
import sys

from sglang.srt.mezo.service.wire.settings import ENABLE_VARIABLE

_USAGE = """Usage: sglang-mezo serve --model-path MODEL [any flag of `sglang serve`] [--mezo-...]

The same server as `sglang serve --enable-mezo`. `sglang-mezo serve --help` lists all flags."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if arguments[0] != "serve":
        raise SystemExit(f"sglang-mezo: {arguments[0]!r} is not a command\n\n{_USAGE}")
    os.environ[ENABLE_VARIABLE] = "1"
    from sglang.srt.mezo.engine.server import serve

    serve(arguments[1:])


if __name__ == "__main__":
    main()
