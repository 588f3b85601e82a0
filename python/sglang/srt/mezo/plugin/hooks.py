"""Hooks into SGLang that hold, or stop the process.

SGLang logs what goes wrong in a plugin and serves on without it. A server that lost one of our hooks would answer
with stale KV or the wrong adapter, so every failure here raises StartRefused, which no `except Exception` stops.
"""

import functools
import pkgutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from sglang.srt.mezo.plugin import overlay

registered = False
"""Whether all hooks are in force in this process."""


def require_registered() -> None:
    """Raise RuntimeError unless the plugin is registered: our platform cannot do without it."""
    if not registered:
        raise RuntimeError(
            "the platform of sglang-mezo is active but its plugin is not: "
            "call sglang.srt.plugins.load_plugins() first, and name `mezo` and `mezo_cpu` in SGLANG_PLUGINS if that is "
            "set"
        )


class StartRefused(SystemExit):
    """Ends the process with one line on stderr and exit status 1."""

    def __init__(self, reason: str):
        super().__init__(f"sglang-mezo refuses to start: {reason}")


@dataclass(frozen=True)
class Hook:
    """One function of SGLang that calls one of ours.

    `function` gets (*args) for kind "before", (result, *args) for "after" and (original, *args) for "around";
    it is taken as a callable that returns it where importing it early would pull in modules of SGLang.
    """

    module: str
    attribute: str
    kind: Literal["before", "after", "around"]
    function: Callable
    why: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.attribute}"


def install(hook: Hook) -> None:
    """Apply `hook` when its module is imported (at once if it already is) and check that it took hold."""
    overlay.on_import(hook.module, lambda module: _apply(hook))


def _apply(hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hook.target in HookRegistry._patched:
        # The registry wraps a target once: whatever comes later is dropped without a word.
        raise StartRefused(f"{hook.target} is hooked by another plugin already ({hook.why})")
    HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
    try:
        is_method = isinstance(pkgutil.resolve_name(hook.target.rpartition(".")[0]), type)
        with _no_search() if is_method else nullcontext():
            # Only this target: apply_hooks() would wrap another plugin's target twice if its own application has led
            # here.
            HookRegistry._apply_target(hook.target, HookRegistry._hooks[hook.target])
    except Exception as error:
        raise StartRefused(f"the hook on {hook.target} did not take hold ({hook.why}): {error}") from error
    HookRegistry._patched.add(hook.target)


@contextmanager
def _no_search():
    """Without SGLang's search of all modules for copies of a hooked function: 0.05 s, and modules hold no copies of
    methods."""
    from sglang.srt.plugins import hook_registry

    search = hook_registry._propagate_patch
    hook_registry._propagate_patch = lambda *_: 0
    try:
        yield
    finally:
        hook_registry._propagate_patch = search


def wrap_static(module: ModuleType, class_name: str, name: str, after: Callable) -> None:
    """Call `after(*args)` after a static method that other plugins hook too: the registry takes one hook of all."""
    owner = getattr(module, class_name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, staticmethod(wrapped))
