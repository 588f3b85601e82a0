"""What lies in a PEFT folder from outside: files of a bounded size, JSON, tensors; whatever else it holds is a
ConfigError."""

import io
import json
import re
from pathlib import Path

import safetensors.torch
import torch

from sglang.srt.mezo.adapters.adapter import CONFIG, FILES, WEIGHTS
from sglang.srt.mezo.core.errors import ConfigError, DamagedError, one_line
from sglang.srt.mezo.core.integrity import SUMS, require_sums

PICKLED_WEIGHTS = "adapter_model.bin"
ADDED_TOKENS = "added_tokens.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of the numbers that an adapter may have."""

_MAX_JSON_BYTES = 4 << 20
_MAX_HEADER_BYTES = 16 << 20  # names and shapes, and what a pickle has around the numbers
_MOST_BYTES_A_NUMBER = 8
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def directory_of(folder: str) -> Path:
    path = Path(folder)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError("lora_path", folder, f"a folder with {CONFIG} ({_reason(error)})") from error
    if is_folder:
        return path
    if exists or not _HUB_NAME.fullmatch(folder):
        raise ConfigError(
            "lora_path", folder, f"a folder with {CONFIG}, and " + ("this is a file" if exists else "there is none")
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder, allow_patterns=[CONFIG, WEIGHTS, PICKLED_WEIGHTS, ADDED_TOKENS]))
    except Exception as error:  # of any kind that a network has
        raise ConfigError(
            "lora_path", folder, f"a folder with {CONFIG}, or a repository of the hub ({_reason(error)})"
        ) from error


def _read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes; what is none could be read for ever."""
    try:
        if not path.is_file():
            raise ConfigError(path.name, str(path), "a file" if path.exists() else "a file, and there is none")
        with open(path, "rb") as file:
            data = file.read(min(most, path.stat().st_size) + 1)
    except OSError as error:
        raise ConfigError(path.name, str(path), f"a file that can be read ({_reason(error)})") from error
    if len(data) > most:
        raise ConfigError(path.name, str(path), f"at most {most} bytes, as large as its adapter can be")
    return data


def read_json(path: Path) -> object:
    data = _read_file(path, _MAX_JSON_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(path.name, str(path), f"JSON ({_reason(error)})") from error


def require_own_sums(directory: Path) -> None:
    """The files of an adapter of ours are as they were written. They are small enough, as they have been read."""
    if not (directory / SUMS).exists():
        return
    _read_file(directory / SUMS, _MAX_JSON_BYTES)
    try:
        require_sums(directory, FILES)
    except DamagedError as error:
        raise ConfigError(SUMS, str(directory / SUMS), f"the sums of the files beside it ({error})") from error


def _reason(error: Exception) -> str:
    """What a library says, in short, and of a file without its path, which the message has."""
    return (getattr(error, "strerror", None) or one_line(error))[:200]


def refuse_added_tokens(path: Path, vocab_size: int) -> None:
    """A tokenizer that lies beside an adapter may know more tokens than the model; requests are tokenised without
    them."""
    if not path.exists():
        return
    tokens = read_json(path)
    ids = tokens.values() if isinstance(tokens, dict) else [tokens]
    wrong = [token for token in ids if not isinstance(token, int) or token >= vocab_size]
    if wrong:
        raise ConfigError(ADDED_TOKENS, wrong[0], f"token ids below {vocab_size}, the size of the model's vocabulary")


def read_weights(directory: Path, numbers: int) -> dict[str, torch.Tensor]:
    """PEFT's order: safetensors where they are, else what torch has pickled.

    Args:
        numbers: that the adapter can have; a file that is larger than they need is not read.
    """
    pickled = not (directory / WEIGHTS).exists() and (directory / PICKLED_WEIGHTS).exists()
    path = directory / (PICKLED_WEIGHTS if pickled else WEIGHTS)
    data = _read_file(path, _MOST_BYTES_A_NUMBER * numbers + _MAX_HEADER_BYTES)
    try:
        if not pickled:
            return safetensors.torch.load(data)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads to
        raise ConfigError(path.name, str(path), f"a file of tensors ({_reason(error)})") from error
    if not isinstance(tensors, dict):
        raise ConfigError(path.name, str(path), f"a dictionary of tensors, not {type(tensors).__name__}")
    return tensors


def require_finite(name: str, matrix: torch.Tensor, dtype: torch.dtype) -> None:
    """Every matrix of an adapter from outside passes here: ConfigError where it is not finite as the engine keeps
    it."""
    if not matrix.to(dtype).isfinite().all():
        raise ConfigError(name, "inf or nan", f"finite numbers in {name_of(dtype)}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: object) -> object:
    return list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
