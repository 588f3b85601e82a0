"""What happens when SGLang imports a module: it gets ours, in upstream's place or beside it, or a callback runs after
it.

Both are one finder at the head of sys.meta_path. Upstream's files stay as they are, and a module that a process
never needs is never imported on our account (a hook applied eagerly would import the scheduler in the detokenizer).
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_PACKAGE_DIR = Path(__file__).resolve().parents[1]


def model_file(name: str) -> Path:
    """Path of our model `name`: in the wheel below our package, in the source tree beside upstream's models."""
    installed = _PACKAGE_DIR / "_models" / f"{name}.py"
    return installed if installed.exists() else _PACKAGE_DIR.parent / "models" / f"{name}.py"


# It imports every model module, once, when it is imported itself.
MODEL_REGISTRY = "sglang.srt.models.registry"
# Module names that are served from our files; upstream has the first as well.
OUR_MODULES = {f"sglang.srt.models.{name}": model_file(name) for name in ("opt", "roberta_mlm")}

Callback = Callable[[ModuleType], None]


class _CallbackLoader(importlib.abc.Loader):
    """Runs the callbacks once the module is fully executed."""

    def __init__(self, inner: importlib.abc.Loader, callbacks: list[Callback]):
        self._inner = inner
        self._callbacks = callbacks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        for callback in self._callbacks:
            callback(module)

    def __getattr__(self, name: str) -> object:
        # inspect and pkgutil ask loaders for get_source and the like.
        return getattr(self._inner, name)


class _OverlayFinder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in OUR_MODULES:
            return importlib.util.spec_from_file_location(fullname, OUR_MODULES[fullname])
        if fullname not in self.callbacks:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self.callbacks[fullname])
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                return spec
        return None


_FINDER = _OverlayFinder()


def install() -> None:
    """Put the finder first on sys.meta_path, once, and replace what has been imported before that.

    Raises FileNotFoundError where a file of ours is missing.
    """
    for path in OUR_MODULES.values():
        if not path.exists():
            raise FileNotFoundError(f"model file {path} is missing; install sglang-mezo again")
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name, path in OUR_MODULES.items():
        if not is_ours(sys.modules.get(name), path):
            sys.modules.pop(name, None)
    on_import(MODEL_REGISTRY, register_models)


def is_ours(module: ModuleType | None, path: Path) -> bool:
    """Whether `module` was loaded from `path`."""
    return module is not None and Path(getattr(module, "__file__", None) or "").resolve() == path.resolve()


def on_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` when module `name` has been imported: at once if it already is."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
    else:
        _FINDER.callbacks.setdefault(name, []).append(callback)


def register_models(registry: ModuleType) -> None:
    """Make our classes the registered ones, whether the registry has read upstream's before us or failed on ours.

    The registry skips a model module that does not import; here the error gets out.
    """
    for name, path in OUR_MODULES.items():
        module = importlib.import_module(name)
        if not is_ours(module, path):
            raise ImportError(f"{name} was loaded from {module.__file__} instead of {path}")
        entry = module.EntryClass
        for model_class in entry if isinstance(entry, list) else [entry]:
            registry.ModelRegistry.models[model_class.__name__] = model_class
