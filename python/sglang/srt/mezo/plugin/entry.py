"""Entry point of SGLang's plugin group: the version guard, and the table of everything that we hook."""

from importlib.metadata import version
from types import ModuleType

from sglang.srt.mezo.plugin import (
    adapter_loading,
    alora_serving,
    flushing,
    hooks,
    isolation,
    online,
    overlay,
    platform,
    prefix_serving,
    upstream_models,
)
from sglang.srt.mezo.plugin.hooks import StartRefused, install

SGLANG_VERSION = "0.5.23"

# OPT's projections, which upstream's LoRA does not list.
OPT_LORA_TARGETS = ("out_proj", "fc1", "fc2")
# Of these the one that is split by rows under tensor parallelism and that upstream does not list as such.
OPT_ROW_PARALLEL_TARGETS = ("fc2",)


def register() -> None:
    """Install the overlay, the backends and the hooks in this process; ends it where any of them cannot hold."""
    if hooks.registered:
        return
    check_version()
    try:
        overlay.install()
        _register_targets()
        _register_cpu_backends()
        for part in (adapter_loading, alora_serving, prefix_serving, flushing, isolation, upstream_models):
            for hook in part.HOOKS:
                install(hook)
        online.register()
    except Exception as error:
        raise StartRefused(f"{type(error).__name__}: {error}") from error
    hooks.registered = True


def check_version() -> None:
    """End the process unless the SGLang beside us is the one that the hooks are written for."""
    found = version("sglang")
    if found != SGLANG_VERSION:
        raise StartRefused(
            f"it needs sglang=={SGLANG_VERSION} and found {found} (pip install sglang=={SGLANG_VERSION})"
        )


def _register_targets() -> None:
    """Let OPT's module names through the command line and the LoRA memory pool."""
    from sglang.srt.utils import common

    _extend(common.SUPPORTED_LORA_TARGET_MODULES, OPT_LORA_TARGETS)
    overlay.on_import("sglang.srt.server_args", _extend_command_line)
    overlay.on_import(
        "sglang.srt.lora.utils",
        lambda module: _extend(module.ROW_PARALLELISM_LINEAR_LORA_NAMES, OPT_ROW_PARALLEL_TARGETS),
    )


def _extend_command_line(server_args: ModuleType) -> None:
    """--lora-target-modules holds a copy of the list, made when the module is imported: mostly before any plugin."""
    (argument,) = server_args.ServerArgs.__annotations__["lora_target_modules"].__metadata__
    _extend(argument.choices, OPT_LORA_TARGETS)


def _register_cpu_backends() -> None:
    """Put our attention and LoRA backends in the place of upstream's torch_native ones, on our platform only.

    The name stays: command line choices are fixed, and parts of SGLang know this one as the backend without kernels.
    """
    if not platform.is_active():
        return
    from sglang.srt.mezo.plugin import cpu_backends

    cpu_backends.install()


def _extend(names: list[str], more: tuple[str, ...]) -> None:
    names.extend(name for name in more if name not in names)
