"""MeZO (arXiv 2305.17333) inside SGLang: fine-tuning with forward passes only.

What a program needs is here by name: ``from sglang.srt.mezo import MezoConfig, MezoEngine, MezoTrainer, finetune``.
"""

from importlib import import_module

__version__ = "0.1.0"

_HERE = {
    "AdapterSpec": "adapters.adapter",
    "ConfigError": "core.errors",
    "DataArguments": "data.splits",
    "DataError": "core.errors",
    "MezoConfig": "core.config",
    "MezoEngine": "engine.handle",
    "MezoError": "core.errors",
    "MezoTrainer": "training.trainer",
    "ModelArguments": "training.finetune",
    "PrefixSpec": "adapters.prefix_adapter",
    "WeightsSpec": "adapters.weights",
    "finetune": "training.finetune",
}
"""Names of the package and the modules that have them, each imported when it is asked for: SGLang imports this
package in every process that it starts."""

__all__ = ["__version__", *_HERE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HERE])
