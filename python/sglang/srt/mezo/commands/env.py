"""``sglang-mezo env``: what a report of a fault should say of the machine."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sglang.srt.mezo import cpu

_PACKAGES = ("sglang-mezo", "sglang", "torch", "transformers", "peft", "datasets", "flashinfer-python", "triton")


def main(arguments: Sequence[str]) -> None:
    for name, value in environment().items():
        print(f"{name:<18} {value}")


def environment() -> dict[str, str]:
    """Versions and hardware, in words."""
    found = {name: _version(name) for name in _PACKAGES}
    kernels = sorted(path.name.partition(".")[0][1:] for path in Path(cpu.__file__).parent.glob("_*.so"))
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **found,
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "accelerator": ", ".join(cards) or "none",
        "CUDA": torch.version.cuda or "none",
        "kernels of C": ", ".join(kernels) or "none built",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
