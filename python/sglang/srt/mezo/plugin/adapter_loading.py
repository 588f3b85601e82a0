"""Every adapter that SGLang loads is read by us: applied as PEFT applies it, or refused before anything is taken.

SGLang's own loader leaves out or misreads much of what PEFT knows, and notices that tensors do not fit when a request
needs them, which ends the server. It gets what it takes without a question: all parts of a layer, one rank, one scale,
plain fields.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from sglang.srt.mezo.adapters.foreign import ForeignAdapter, fit_foreign, read_foreign
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError, MezoError
from sglang.srt.mezo.engine.peft_layers import (
    CheckedFields,
    as_sglang_takes_it,
    is_known,
    model_for_adapters,
    model_of_checkpoint,
)
from sglang.srt.mezo.plugin import alora_serving, served_prefixes
from sglang.srt.mezo.plugin.hooks import Hook, StartRefused

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

logger = logging.getLogger(__name__)


def _around_loading(original: Callable, manager: "LoRAManager", lora_ref: "LoRARef") -> "LoRAUpdateOutput":
    """An adapter in a folder."""
    if not is_known(manager):
        return _served(manager, lora_ref, original(manager, lora_ref))
    if lora_ref.lora_path is None:
        return _refused(manager, lora_ref, ConfigError("lora_path", None, "a folder, or a repository of the hub"))
    folder = lora_ref.lora_path
    return _load(manager, lora_ref, lambda: read_foreign(folder, model_for_adapters(manager)))


def _around_loading_from_tensors(
    original: Callable,
    manager: "LoRAManager",
    lora_ref: "LoRARef",
    tensors: Mapping,
    config_dict: Mapping,
    added_tokens_config: Any = None,
) -> "LoRAUpdateOutput":
    """An adapter in a request, or one that has been checked."""
    if isinstance(config_dict, CheckedFields) or not is_known(manager):
        return _served(manager, lora_ref, original(manager, lora_ref, tensors, config_dict, added_tokens_config))
    if added_tokens_config:
        return _refused(
            manager,
            lora_ref,
            ConfigError(
                "added_tokens_config", added_tokens_config, "nothing, as the server's tokenizer has its own tokens"
            ),
        )
    return _load(manager, lora_ref, lambda: fit_foreign(config_dict, tensors, model_for_adapters(manager)))


def _load(manager: "LoRAManager", lora_ref: "LoRARef", make: Callable[[], ForeignAdapter]) -> "LoRAUpdateOutput":
    try:
        adapter = make()
        if isinstance(adapter, PrefixAdapter):
            return _serve_prefix(manager, lora_ref, adapter)
        alora_serving.require_servable(manager, adapter.invocation)
        fields, tensors = as_sglang_takes_it(manager, adapter)
    except MezoError as error:
        return _refused(manager, lora_ref, error)
    except Exception as error:  # as SGLang's loader has it: an adapter, whatever it is, does not end the server
        logger.exception("adapter %r was not loaded", lora_ref.lora_name)
        return _refused(manager, lora_ref, f"{type(error).__name__}: {error}")
    return manager._load_lora_adapter_from_tensors(lora_ref, tensors, fields)


def _serve_prefix(manager: "LoRAManager", lora_ref: "LoRARef", adapter: PrefixAdapter) -> "LoRAUpdateOutput":
    """SGLang knows a prefix by name and id, so that it unloads it; there is nothing of it in the LoRA pool."""
    name = lora_ref.lora_name or ""
    if any(name == other.lora_name for other in manager.lora_refs.values()):
        raise ConfigError("lora_name", name, "a name that is free: an adapter of that name is already loaded")
    served_prefixes.load(lora_ref.lora_id, name, adapter)
    manager.lora_refs[lora_ref.lora_id] = msgspec.structs.replace(lora_ref, pinned=False)
    return manager.create_lora_update_result(success=True)


def _served(manager: "LoRAManager", lora_ref: "LoRARef", result: "LoRAUpdateOutput") -> "LoRAUpdateOutput":
    """Take note of an adapter that SGLang has loaded, or have it forget one that it has not, or that it would serve
    wrongly."""
    if not result.success:
        return _refused(manager, lora_ref, result.error_message or "SGLang did not load it")
    invocation = tuple(manager.configs[lora_ref.lora_id].hf_config.get("alora_invocation_tokens") or ())
    try:
        alora_serving.require_servable(manager, invocation)
    except ConfigError as error:
        return _refused(manager, lora_ref, error)
    alora_serving.register(lora_ref.lora_id, invocation)
    return result


def _refused(manager: "LoRAManager", lora_ref: "LoRARef", error: MezoError | str) -> "LoRAUpdateOutput":
    """Nothing of it stays; a server that was to start with it does not start."""
    if lora_ref.lora_id in manager.lora_refs:
        manager.num_pinned_loras -= int(lora_ref.pinned or False)
    for known in (manager.configs, manager.loras, manager.lora_refs):
        known.pop(lora_ref.lora_id, None)
    if not hasattr(manager, "memory_pool"):
        raise StartRefused(f"--lora-paths {lora_ref.lora_name}: {error}")
    return manager.create_lora_update_result(success=False, error_message=str(error))


def require_adapters(server_args) -> bool:
    """StartRefused, before a model is loaded for nothing, where an adapter of --lora-paths cannot be applied.

    Returns:
        Whether all of them are prefixes, from which SGLang does not learn what its LoRA pool is to hold.
    """
    try:
        model = model_of_checkpoint(server_args)
    except ConfigError:
        return False  # SGLang has more to say about a model that cannot be read
    if model is None:
        return False
    prefixes = 0
    embeddings = {"all", "embed_tokens", "lm_head"} & set(server_args.lora_target_modules or ())
    for name, path in map(_name_and_path, server_args.lora_paths):
        try:
            adapter = read_foreign(path, model)
        except ConfigError as error:
            raise StartRefused(f"--lora-paths {name}: {error}") from error
        prefixes += isinstance(adapter, PrefixAdapter)
        if adapter.invocation and embeddings:
            given = ", ".join(sorted(embeddings))
            raise StartRefused(f"--lora-paths {name}: activated LoRA not together with --lora-target-modules {given}")
    return prefixes == len(server_args.lora_paths)


def _name_and_path(given: Any) -> tuple[str, str]:
    """Of an adapter as SGLang's argument has it: a text or an object."""
    if isinstance(given, str):
        name, _, path = given.partition("=")
        return name, path or name
    if isinstance(given, dict):
        return given.get("lora_name", ""), given.get("lora_path", "")
    return given.lora_name, given.lora_path


def _around_tensors(original: Callable, worker, request) -> "LoRAUpdateOutput":
    """Tensors that cannot be unpacked are the sender's mistake."""
    manager = worker.model_runner.lora_manager
    try:
        return original(worker, request)
    except Exception as error:
        return manager.create_lora_update_result(
            success=False, error_message=f"serialized_named_tensors: {type(error).__name__}: {error}"
        )


_MANAGER = "sglang.srt.lora.lora_manager"

HOOKS = (
    Hook(
        _MANAGER,
        "LoRAManager._load_lora_adapter",
        "around",
        _around_loading,
        "applies adapters as PEFT does, or refuses them",
    ),
    Hook(
        _MANAGER,
        "LoRAManager._load_lora_adapter_from_tensors",
        "around",
        _around_loading_from_tensors,
        "the same for adapters that come as tensors",
    ),
    Hook(
        "sglang.srt.managers.tp_worker",
        "BaseTpWorker.load_lora_adapter_from_tensors",
        "around",
        _around_tensors,
        "tensors that cannot be unpacked do not end the server",
    ),
)
