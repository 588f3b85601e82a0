"""What a model's files say before an engine reads them: whether there is one, its configuration, its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.core.errors import ConfigError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def read_checkpoint(model: str) -> tuple["PretrainedConfig", "PreTrainedTokenizerBase"]:
    """The configuration and the tokenizer of a model.

    Args:
        model: a folder, or a name on the hub.

    Raises:
        ConfigError: in one line, what of it is missing or cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(model)
    if folder.is_dir():
        _require_files(model, folder)
    elif folder.is_file():
        raise ConfigError("model", model, "a hub name or the folder of a model, and this is a file")
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError("model", model, "a hub name or the folder of a model, and there is no such folder")
    else:
        _without_retries_in_view()
    config = _from_pretrained(AutoConfig, model)
    tokenizer = _from_pretrained(AutoTokenizer, model)
    if len(tokenizer) < 2:  # what Transformers makes of a folder that has none
        raise ConfigError("model", model, "a model with its tokenizer, of which there are no files")
    return config, tokenizer


def _from_pretrained(kind: Any, model: str) -> Any:
    try:
        return kind.from_pretrained(model)
    except Exception as error:  # of many types, as whatever a file holds goes into Transformers' own code
        raise ConfigError("model", model, f"a hub name or the folder of a model ({one_line(error)})") from error


def _require_files(model: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError("model", model, "the folder of a model, and there is no config.json in this one")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigError(
            "model", model, f"the folder of a model with its weights, and there is no {', '.join(_WEIGHTS)} in this one"
        )
    for path in folder.glob("*.safetensors"):
        _require_header(model, path)


def _require_header(model: str, path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt"):  # reads the header, and that the file is as long as it says
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            "model", model, f"a model whose weights can be read ({path.name}: {one_line(error)})"
        ) from error


def _without_retries_in_view() -> None:
    """Where there is no network, the hub's client tells of every attempt."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
