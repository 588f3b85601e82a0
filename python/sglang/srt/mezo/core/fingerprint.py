"""Which model a folder holds: a digest that changes with the configuration or the weights, and is quick to take at any
size.

The folder's name and place do not count, nor when its files were written.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

_CONFIGURATIONS = ("config.json", "params.json")
_INDEX = "model.safetensors.index.json"
_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Of weights; the first kind that a folder has is what an engine loads."""

_NAMES = ("_name_or_path", "transformers_version")  # in a configuration: who wrote it, and where it lay
_WHOLE = 32 << 20  # bytes of weights that are read as a whole
_SPOTS = 1024  # that are looked at where there is more, in all files together
_SPOT = 256  # bytes


def fingerprint(path: Path, weights: bool = True) -> str:
    """A digest, "sha256:" and 32 hexadecimal digits.

    Args:
        path: a model's folder, or its one file.
        weights: False for a model whose weights are made up from its configuration.

    Where there is much of them, weights count with their files' sizes, the names and shapes of their tensors, and a few
    bytes of each tensor, of a thousand at most: training changes them all, and a single number that somebody changes
    may be missed.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for name in _CONFIGURATIONS:
            if (path / name).is_file():
                configuration = json.loads((path / name).read_text())
                kept = {key: value for key, value in configuration.items() if key not in _NAMES}
                digest.update(json.dumps(kept, sort_keys=True).encode())
    files = (_weights(path) if path.is_dir() else [path]) if weights else []
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes):
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        if sum(sizes) <= _WHOLE:
            digest.update(file.read_bytes())
        else:
            for part in _parts(file, size, _SPOTS // len(files) + 1):
                digest.update(part)
    return f"sha256:{digest.hexdigest()[:32]}"


def _weights(folder: Path) -> list[Path]:
    """The files that hold the weights; others of their kind may lie beside them."""
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    kinds = (sorted(folder.glob(kind)) for kind in _KINDS)
    return next(filter(None, kinds), [])


def _parts(file: Path, size: int, spots: int) -> Iterator[bytes]:
    """What names the tensors, and bytes from the middle of each, or of as many as are wanted."""
    with open(file, "rb") as opened:
        middles = [place * size // spots for place in range(spots)]
        if file.suffix == ".safetensors":
            start = 8 + int.from_bytes(opened.read(8), "little")
            header = opened.read(start - 8)
            yield header
            offsets = [tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"]
            middles = [start + (first + last) // 2 for first, last in offsets[:: len(offsets) // spots + 1]]
        for middle in middles:
            opened.seek(middle)
            yield opened.read(_SPOT)
