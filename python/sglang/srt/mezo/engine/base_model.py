"""Which base model an engine holds: what is trained on one must not go on, or be served, on another."""

import logging
import secrets
from typing import TYPE_CHECKING

from sglang.srt.mezo.adapters.weights import model_folder
from sglang.srt.mezo.core.fingerprint import fingerprint

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_ATTRIBUTE = "mezo_base_model"  # of a model runner


def base_model(model_runner: "ModelRunner") -> str:
    """The fingerprint of the weights that have been loaded. It is taken when it is first asked for: soon after they
    were."""
    if not hasattr(model_runner, _ATTRIBUTE):
        setattr(model_runner, _ATTRIBUTE, _taken(model_runner))
    return getattr(model_runner, _ATTRIBUTE)


def precision(model_runner: "ModelRunner") -> str:
    """The type of the weights in the engine, such as "bfloat16" or "bfloat16, fp8"."""
    quantization = model_runner.model_config.quantization
    return str(model_runner.dtype).removeprefix("torch.") + (f", {quantization}" if quantization else "")


def after_load_from_disk(result: tuple[bool, str], updater, *args, **kwargs) -> None:
    """Other weights have been loaded while the engine runs, unless that failed, and the earlier ones were restored."""
    if result[0]:
        runner = updater.get_model_runner()
        setattr(runner, _ATTRIBUTE, _taken(runner))


def after_load(result: object, updater, *args, **kwargs) -> None:
    """Weights have come from another process: whatever they are, they are no longer those that were loaded from
    files."""
    setattr(updater.get_model_runner(), _ATTRIBUTE, f"replaced:{secrets.token_hex(16)}")


def _taken(model_runner: "ModelRunner") -> str:
    config, load = model_runner.model_config, model_runner.load_config
    is_dummy = str(getattr(load.load_format, "value", load.load_format)) == "dummy"
    try:
        folder = model_folder(config.model_path, config.revision, load.download_dir)
        taken = fingerprint(folder, weights=not is_dummy)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the base model is told from others by its name alone, as its files cannot be read: %s", error)
        return f"name:{config.model_path}"
    # Made-up weights are random numbers of one seed, drawn in the type of the weights.
    return f"{taken}:dummy:{precision(model_runner)}" if is_dummy else taken
