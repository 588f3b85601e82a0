"""What SGLang makes of server arguments on a GPU that is not there: facts about it are told to PyTorch before SGLang
asks.

    python faked_gpu.py h100 '[{"dtype": "float32"}]'

prints a list with the resolved fields of a record for each, and of servers that do not train. No kernel runs. The
module of kernels that FAKED_WITHOUT names is not there.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

CAPABILITY = {"a100": (8, 0), "h100": (9, 0), "b200": (10, 0)}
GIB = {"a100": 80, "h100": 80, "b200": 180}
FIELDS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "lora_backend",
    "page_size",
    "max_loras_per_batch",
)


def pretend(kind: str) -> None:
    """Have PyTorch report one GPU of that kind."""
    major, minor = CAPABILITY[kind]
    memory = GIB[kind] << 30
    properties = SimpleNamespace(
        name=kind, major=major, minor=minor, total_memory=memory, multi_processor_count=132, gcnArchName=""
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "get_device_name": kind,
        "mem_get_info": (memory, memory),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    torch.accelerator.is_available = lambda: True
    sys.meta_path.insert(0, _WithoutKernels())


class _WithoutKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """SGLang's compiled kernels load the driver when they are imported."""

    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("FAKED_WITHOUT"):
            raise ModuleNotFoundError(f"a build without {name}")
        return (
            importlib.util.spec_from_loader(name, self, is_package=True)
            if name.partition(".")[0] == "sgl_kernel"
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec):
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="0")
        module.__name__ = spec.name
        return module

    def exec_module(self, module) -> None:
        pass


def served(model: str, dtype: str) -> dict:
    """Of a server that does not train, with the flags that a run of that type names at its end."""
    from sglang.srt.mezo.engine.accelerator import serving_flags
    from sglang.srt.server_args import prepare_server_args

    os.environ["SGLANG_ENABLE_MEZO"] = "0"
    flags = [
        "--model-path",
        model,
        "--dtype",
        dtype,
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-target-modules",
        "q_proj",
    ]
    return described(prepare_server_args([*flags, *serving_flags(True, dtype)]))


def resolved(arguments: dict) -> dict:
    """Fields of a server's record, and what it says of an aLoRA adapter."""
    from sglang.srt.server_args import ServerArgs

    return described(ServerArgs(**arguments))


def described(record) -> dict:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.lora.backend.lora_registry import get_backend_from_name
    from sglang.srt.mezo.engine.accelerator import why_no_alora
    from sglang.srt.runtime_context import publish

    record.resolve_once()
    record.check_server_args()
    publish(record, role="tokenizer")
    view = resolved_view(record)
    backend = get_backend_from_name(view.lora_backend)
    manager = SimpleNamespace(
        lora_backend=object.__new__(backend),
        max_loras_per_batch=view.max_loras_per_batch,
        attn_dp_enabled=False,
        speculative_algorithm=None,
        enable_lora_overlap_loading=False,
        embed_tokens_module=None,
        lm_head_module=None,
    )
    manager.lora_backend.is_moe_lora = False
    fields = {name: getattr(view, name) for name in FIELDS}
    told = {"prefill_graph": view.cuda_graph_config.prefill.backend, "no_alora": why_no_alora(manager)}
    manager.lm_head_module = object()
    return {**fields, **told, "no_alora_beside_a_head": why_no_alora(manager)}


if __name__ == "__main__":
    pretend(sys.argv[1])
    from sglang.srt.plugins import load_plugins

    load_plugins()
    asked = json.loads(sys.argv[2])
    records = [resolved(arguments) for arguments in asked]
    print(json.dumps(records + [served(asked[0]["model_path"], dtype) for dtype in ("bfloat16", "float32")]))
