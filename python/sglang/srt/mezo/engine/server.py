"""SGLang's server, as its command line starts it."""

from collections.abc import Sequence


def serve(arguments: Sequence[str]) -> None:
    """``sglang serve`` with these arguments; returns when the server has ended."""
    from sglang.cli.serve import serve

    serve(None, list(arguments))
