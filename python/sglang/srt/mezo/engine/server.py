"""SGLang's server, as its command line starts it."""

from collections.abc import Sequence

from sglang.srt.mezo.core.errors import UsageError

_PLUGIN = "mezo"  # our entry point's name


def serve(arguments: Sequence[str]) -> None:
    """``sglang serve`` with these arguments; returns when the server has ended.

    Raises:
        UsageError: SGLang's variables leave our plugin out: its server would serve, and train nothing.
    """
    from sglang.cli.serve import serve
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, _get_excluded_dists, load_plugins_by_group

    if _PLUGIN not in load_plugins_by_group(GENERAL_PLUGINS_GROUP, _get_excluded_dists()):
        raise UsageError(
            f"SGLang does not load the plugin {_PLUGIN!r} of sglang-mezo: name `mezo` and `mezo_cpu` in SGLANG_PLUGINS "
            "if that is set, and leave SGLANG_PLATFORM unset"
        )
    serve(None, list(arguments))
