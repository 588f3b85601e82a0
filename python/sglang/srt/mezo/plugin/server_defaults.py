"""Server arguments of a server that trains: what the user left open is filled, what training cannot run beside is
refused."""

import os
import sys
from contextlib import suppress

from sglang.srt.mezo.engine.accelerator import fill_open_fields
from sglang.srt.mezo.plugin.adapter_loading import require_adapters
from sglang.srt.mezo.plugin.hooks import StartRefused
from sglang.srt.mezo.service.store import folder
from sglang.srt.mezo.service.wire.settings import ENABLE_FLAG, ServiceSettings

_DEFAULT_RANK = 16
_DEFAULT_SLOTS = 16  # the base model's, 9 for all directions of a default job at once, and 6 for other adapters


def fill(server_args, settings: ServiceSettings) -> None:
    """Fill what the user left open, and refuse what training cannot run beside, before a model is loaded for nothing.

    Raises:
        StartRefused, ConfigError: the flags cannot work.
    """
    if getattr(server_args, "_resolution_finished", False):
        return
    if isinstance(server_args.lora_paths, list) and server_args.lora_paths and require_adapters(server_args):
        _size_lora_pool(server_args)
    if not settings.enabled:
        return
    from sglang.srt.mezo.adapters.families import require_generating
    from sglang.srt.mezo.engine.handle import checkpoint_config, config_source, warn_of_differences
    from sglang.srt.mezo.training import rewards

    folder.make(settings.directory)
    for function in settings.reward_functions.values():
        rewards.resolve(function)
    config = checkpoint_config(*config_source(server_args))
    require_generating(config)
    warn_of_differences(config, server_args.context_length)
    for field, allowed in (("dp_size", 1), ("pp_size", 1), ("tokenizer_worker_num", 1)):
        if getattr(server_args, field) != allowed:
            raise StartRefused(f"{ENABLE_FLAG} needs {field}={allowed}, not {getattr(server_args, field)}")
    if server_args.page_size not in (None, 1):
        raise StartRefused(
            f"{ENABLE_FLAG} needs page_size=1, not {server_args.page_size}: prefixes are cut at any token"
        )
    server_args.page_size = 1
    # A model may give logits that are no numbers, as in float16, and a request that samples from those ends SGLang's
    # scheduler.
    os.environ.setdefault("SGLANG_SANITIZE_NAN_LOGITS", "1")
    if not server_args.lora_paths:
        server_args.enable_lora = True
        _size_lora_pool(server_args)
    _leave_slots(server_args)
    fill_open_fields(server_args, _typed())


def _typed() -> set[str]:
    """Fields that the command line sets, or SGLang's ``--config``, if only to their defaults."""
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    words = sys.argv
    with suppress(ValueError, OSError):  # of another program, whose --config is none of SGLang's
        words = ConfigArgumentMerger().merge_config_with_args(sys.argv)
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def _size_lora_pool(server_args) -> None:
    """What the pool is to hold where neither the user nor an adapter says it."""
    from sglang.srt.mezo.adapters.families import family_of
    from sglang.srt.mezo.engine.handle import checkpoint_config, config_source

    family = family_of(checkpoint_config(*config_source(server_args)))
    server_args.max_lora_rank = server_args.max_lora_rank or _DEFAULT_RANK
    server_args.lora_target_modules = server_args.lora_target_modules or list(family.default_targets("alora"))


def _leave_slots(server_args) -> None:
    """Have room for all directions of a default job at once, and for other adapters beside them, where SGLang's
    default stands."""
    from sglang.srt.server_args import _declared_default

    loaded = server_args.max_loaded_loras
    open_field = "max_loras_per_batch" not in _typed()
    if (
        open_field
        and server_args.max_loras_per_batch == _declared_default("max_loras_per_batch")
        and (loaded is None or loaded >= _DEFAULT_SLOTS)
    ):
        server_args.max_loras_per_batch = _DEFAULT_SLOTS
