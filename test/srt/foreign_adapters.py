"""Adapters as users bring them: those that PEFT makes, and what becomes of their files."""

import copy
import json
import os
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

import oracle

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIRST_Q = "model.layers.0.self_attn.q_proj"


def saved(base, folder: Path, **settings) -> Path:
    """An adapter of PEFT's with random numbers in all that it trains."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes) -> Path:
    """Change fields of the configuration; ... takes one away."""
    path = folder / "adapter_config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    return folder


def change_tensors(folder: Path, change) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path)
    return folder


INVOCATION = {"alora_invocation_tokens": list(oracle.INVOCATION)}
APPLIED = {
    "plain": {},
    "alpha with a fraction": {"lora_alpha": 12.5},
    "rank-stabilised": {"use_rslora": True},
    "alpha below zero": {"lora_alpha": -3},
    "rank of a module": {"rank_pattern": {FIRST_Q: 2}},
    "larger rank of a module": {"rank_pattern": {"v_proj": 8}},
    "alpha of a module": {"alpha_pattern": {"q_proj": 64}},
    "patterns": {
        "rank_pattern": {r"layers\.1\..*v_proj": 8},
        "alpha_pattern": {r"0\.self_attn\.[qk]_proj": 3, "self_attn.q_proj": 1},
    },
    "patterns, rank-stabilised": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
        "use_rslora": True,
    },
    "one layer": {"layers_to_transform": 1},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers by several patterns": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "modules left out": {"exclude_modules": [FIRST_Q]},
    "modules left out by an expression": {"exclude_modules": r".*layers\.1.*v_proj"},
    "an expression": {"target_modules": r".*\.1\..*\.(q_proj|o_proj)"},
    "names in full": {"target_modules": [FIRST_Q, "model.layers.1.self_attn.v_proj"]},
    "attention": {"target_modules": ATTENTION},
    "one of a fused layer": {"target_modules": ["k_proj"]},
    "start from activations": {"init_lora_weights": "eva"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "no start": {"init_lora_weights": False},
    "transposed, which no linear layer is": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
    "embeddings": {"task_type": "FEATURE_EXTRACTION"},
}
APPLIED |= {
    f"{name}, activated": {**settings, **INVOCATION} for name, settings in APPLIED.items() if name != "embeddings"
}


def first(name: str):
    """A change of the first tensor whose name ends like this."""

    def on(change):
        def changed(tensors):
            key = next(key for key in sorted(tensors) if key.endswith(name))
            return {**tensors, key: change(tensors[key])}

        return changed

    return on


A, B = first("lora_A.weight"), first("lora_B.weight")
TENSORS = {
    "narrow": (A(lambda m: m[:, :50]), f"{FIRST_Q}.lora_A.weight=[4, 50] is not allowed: [4, 64]"),
    "another rank": (
        lambda ts: {n: (t[:2] if "lora_A" in n else t[:, :2]) for n, t in ts.items()},
        "[2, 64] is not allowed: [4, 64] by the model and r=4",
    ),
    "short": (B(lambda m: m[:50]), "lora_B.weight=[50, 4] is not allowed: [64, 4]"),
    "a vector": (A(lambda m: m[0]), "[64] is not allowed: [4, 64]"),
    "three dimensions": (A(lambda m: m[None]), "[1, 4, 64] is not allowed"),
    "empty": (A(lambda m: m[:0]), "[0, 64] is not allowed"),
    "whole numbers": (
        A(lambda m: m.to(torch.int32)),
        "lora_A.weight='torch.int32' is not allowed: numbers of type float32",
    ),
    "eight bits": (A(lambda m: m.to(torch.float8_e4m3fn)), "float8_e4m3fn' is not allowed"),
    "nan": (A(lambda m: m * float("nan")), "inf or nan"),
    "one inf": (
        B(lambda m: torch.where(torch.arange(4) == 3, float("inf"), m)),
        "lora_B.weight='inf or nan' is not allowed: finite numbers in float32",
    ),
    "beyond float32": (B(lambda m: m.double() * 1e300), "inf or nan"),
    "no A": (
        lambda ts: {n: t for n, t in ts.items() if not n.endswith("layers.1.self_attn.q_proj.lora_A.weight")},
        "1.self_attn.q_proj.lora_A.weight=None",
    ),
    "no B": (
        lambda ts: {n: t for n, t in ts.items() if not n.endswith("layers.1.self_attn.v_proj.lora_B.weight")},
        "1.self_attn.v_proj.lora_B.weight=None",
    ),
    "a module without": (
        lambda ts: {n: t for n, t in ts.items() if "layers.1.self_attn.v_proj" not in n},
        "it has none of model.layers.1.self_attn.v_proj",
    ),
    "nothing": (lambda ts: {}, "it has none of model.layers.0"),
    "a layer too many": (
        lambda ts: {**ts, **{n.replace("layers.1", "layers.2"): t.clone() for n, t in ts.items()}},
        "model.layers.2.self_attn.q_proj.lora_A.weight",
    ),
    "a module that is left out": (
        lambda ts: {**ts, **{n.replace("q_proj", "o_proj"): t.clone() for n, t in ts.items() if "q_proj" in n}},
        "none, as target_modules",
    ),
    "another model's": (
        lambda ts: {n.replace("model.layers", "transformer.h"): t for n, t in ts.items()},
        "transformer.h.0.self_attn.q_proj",
    ),
    "a magnitude": (
        lambda ts: {**ts, f"base_model.model.{FIRST_Q}.lora_magnitude_vector": torch.ones(64)},
        "lora_magnitude_vector=[64]",
    ),
    "a bias": (lambda ts: {**ts, f"base_model.model.{FIRST_Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias=[64]"),
    "a base weight": (
        lambda ts: {**ts, "base_model.model.model.embed_tokens.weight": torch.ones(9, 9)},
        "embed_tokens.weight=[9, 9]",
    ),
    "a long name": (lambda ts: {**ts, "x" * 5000: torch.ones(1)}, "xxx=[1] is not allowed"),
}


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def cut(name, keep):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])

    return damage


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {
    "no configuration": (remove(CONFIG), CONFIG),
    "configuration cut": (cut(CONFIG, 100), CONFIG),
    "configuration empty": (write(CONFIG, b""), CONFIG),
    "configuration a list": (write(CONFIG, b"[]"), CONFIG),
    "configuration of brackets": (write(CONFIG, b"[" * 10**6), CONFIG),
    "configuration of bytes": (write(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "configuration large": (write(CONFIG, b" " * (5 << 20)), CONFIG),
    "configuration a folder": (replaced(CONFIG, Path.mkdir), CONFIG),
    "configuration a pipe": (replaced(CONFIG, os.mkfifo), CONFIG),
    "configuration endless": (replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")), CONFIG),
    "configuration a loop": (replaced(CONFIG, lambda path: path.symlink_to(path.name)), CONFIG),
    "no weights": (remove(WEIGHTS), WEIGHTS),
    "weights empty": (write(WEIGHTS, b""), WEIGHTS),
    "weights cut": (cut(WEIGHTS, -100), WEIGHTS),
    "weights cut in the header": (cut(WEIGHTS, 50), WEIGHTS),
    "weights not what their name says": (write(WEIGHTS, b"hello" * 1000), WEIGHTS),
    "weights with an endless header": (write(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS),
    "weights large": (
        replaced(WEIGHTS, lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40)),
        WEIGHTS,
    ),
    "weights a folder": (replaced(WEIGHTS, Path.mkdir), WEIGHTS),
    "weights a pipe": (replaced(WEIGHTS, os.mkfifo), WEIGHTS),
    "weights endless": (replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), WEIGHTS),
    "pickle not one": (
        replaced(WEIGHTS, lambda path: path.with_suffix(".bin").write_bytes(b"hello" * 100)),
        "adapter_model.bin",
    ),
    "pickle of something else": (
        replaced(WEIGHTS, lambda path: torch.save([1, 2], path.with_suffix(".bin"))),
        "adapter_model.bin",
    ),
    "pickle that runs code": (
        replaced(WEIGHTS, lambda path: torch.save({"a": Runs()}, path.with_suffix(".bin"))),
        "adapter_model.bin",
    ),
    "more tokens": (write("added_tokens.json", b'{"<new>": 99999}'), "added_tokens.json"),
    "tokens not JSON": (write("added_tokens.json", b"{"), "added_tokens.json"),
}


RAN = Path(tempfile.gettempdir()) / "sglang-mezo-code-of-an-adapter-ran"
"""There where an adapter's pickle has been run."""


class Runs:
    def __reduce__(self):
        return os.system, (f"touch {RAN}",)
