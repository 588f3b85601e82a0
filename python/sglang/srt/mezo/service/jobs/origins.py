"""Adapters that jobs go on from: found by the names that requests use, read, checked, and kept with the job."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.adapters.adapter import Adapter
from sglang.srt.mezo.adapters.foreign import AdaptedModel, ForeignAdapter, read_foreign
from sglang.srt.mezo.adapters.peft_adapter import ModelLayers
from sglang.srt.mezo.adapters.peft_prefix import PrefixModel
from sglang.srt.mezo.adapters.prefix_adapter import KVShape, PrefixAdapter
from sglang.srt.mezo.core.errors import ConfigError, shown
from sglang.srt.mezo.data.invocation import invocation_setting
from sglang.srt.mezo.engine.handle import checkpoint_config, config_source
from sglang.srt.mezo.engine.layers import checkpoint_sites
from sglang.srt.mezo.service.jobs import served_names
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.training.start import of_adapter, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def origin_directory(store: Store, job_id: str) -> Path:
    """Where the adapter lies that a job goes on from; whatever becomes of the one that it was copied from."""
    return store.job_directory(job_id) / "origin"


@dataclass(frozen=True)
class Origin:
    """An adapter that a job goes on from; ``model`` is what requests call it."""

    model: str
    adapter: ForeignAdapter
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of ``MezoConfig``."""
        tokens = self.adapter.invocation
        invocation = invocation_setting(tokens, self.tokenizer) if tokens else None
        return {"init_from": self.model, **of_adapter(self.adapter), "invocation": invocation}


class Origins:
    """Reads and copies adapters. Its methods block.

    Args:
        tokenizer: from ``shared_tokenizer``.
    """

    def __init__(
        self, store: Store, client: EngineClient, engine: EngineDescription, tokenizer: "PreTrainedTokenizerBase"
    ):
        self._store = store
        self._client = client
        self._engine = engine
        self._tokenizer = tokenizer

    def read(self, model: str) -> Origin | None:
        """The adapter behind a model's name, None for the base model.

        Raises:
            RequestError: 404 where there is no such model, 400 where its adapter cannot be trained further.
        """
        base = self._client.served_model_name
        known = dict.fromkeys((base, self._engine.model_path))
        if model in known:
            return None
        folder = (
            served_names.folder_of(self._client.tokenizer_manager, model.removeprefix(f"{base}:"))
            if model.startswith(f"{base}:")
            else None
        )
        if folder is None:
            goes_on = f"goes on from an adapter that it has in a folder, {f'{base}:<name>'!r}"
            trains = f"this server trains {' or '.join(map(repr, known))}, or {goes_on}"
            raise RequestError(404, f"the model {shown(model)} does not exist: {trains}", "model", "model_not_found")
        try:
            adapter = read_foreign(folder, self._adapted)
            require_whole(adapter, self._adapted.layers.sites.values(), model)
        except ConfigError as error:
            raise RequestError(
                400, f"model={shown(model)} cannot be trained further: {error}", "model", "invalid_value"
            ) from error
        return Origin(model, adapter, self._tokenizer)

    def keep(self, job_id: str, adapter: ForeignAdapter) -> None:
        """Put an adapter with a job that goes on from it."""
        if isinstance(adapter, PrefixAdapter):
            adapter.save_pretrained(origin_directory(self._store, job_id))
            return
        spec = adapter.spec(self._engine.model_path)
        sites = [self._adapted.layers.sites[path] for path in adapter.matrices]
        Adapter.holding(spec, sites, adapter.matrices).save_pretrained(origin_directory(self._store, job_id))

    def drop(self, job_id: str) -> None:
        """Of a job that was not stored after all."""
        shutil.rmtree(self._store.job_directory(job_id), ignore_errors=True)

    @cached_property
    def _adapted(self) -> AdaptedModel:
        source = config_source(self._client.tokenizer_manager.server_args)
        sites = checkpoint_sites(*source)
        adapted = frozenset(path for path, site in sites.items() if site.name in self._engine.target_modules)
        config, dtype = checkpoint_config(*source), getattr(torch, self._engine.dtype)
        vocab_size = config.get_text_config().vocab_size
        layers = ModelLayers(sites, adapted, self._engine.max_lora_rank, dtype, vocab_size)
        prefixes = PrefixModel(self._engine.model_path, KVShape.of(config), self._engine.context_length, dtype)
        return AdaptedModel(layers, prefixes)
