"""Prefixes as users bring them: those that PEFT makes, and what becomes of their files."""

import copy
from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model

from foreign_adapters import CONFIG, FILES, WEIGHTS, edit

EMBEDDINGS = "prompt_embeddings"


def saved_prefix(base, folder: Path, tokens: int = 5, seed: int = 2, scale: float = 1.0, **settings) -> Path:
    """A prefix of PEFT's with random numbers."""
    torch.manual_seed(seed)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, scale)
    model.save_pretrained(folder)
    return folder


def changed(change):
    return lambda tensors: {EMBEDDINGS: change(tensors[EMBEDDINGS])}


def of_field(**changes):
    return lambda folder: edit(folder, **changes)


TENSORS = {
    "a row less": (changed(lambda m: m[1:]), "prompt_embeddings=[4, 128] is not allowed: [5, 128]"),
    "another width": (changed(lambda m: m[:, 1:]), "prompt_embeddings=[5, 127] is not allowed: [5, 128]"),
    "a vector": (changed(lambda m: m[0]), "prompt_embeddings=[128] is not allowed"),
    "whole numbers": (changed(lambda m: m.to(torch.int32)), "prompt_embeddings='torch.int32' is not allowed"),
    "nan": (changed(lambda m: m * float("nan")), "prompt_embeddings='inf or nan' is not allowed"),
    "beyond float32": (changed(lambda m: m.double() * 1e300), "prompt_embeddings='inf or nan' is not allowed"),
    "none": (lambda tensors: {}, "tensors=None is not allowed: prompt_embeddings"),
    "another besides": (lambda tensors: {**tensors, "x": torch.ones(1)}, "tensors='x' is not allowed"),
    "another name": (lambda tensors: {"prefix": tensors[EMBEDDINGS]}, "tensors='prefix' is not allowed"),
}
"""What is done to the tensor of a prefix of five tokens for two layers of two heads of sixteen; the refusal."""

FIELDS = {
    "another task": (of_field(task_type="SEQ_2_SEQ_LM"), "task_type='SEQ_2_SEQ_LM' is not allowed: CAUSAL_LM"),
    "no task": (of_field(task_type=None), "task_type=None is not allowed: CAUSAL_LM"),
    "another model's layers": (of_field(num_layers=3), "num_layers=3 is not allowed: 2"),
    "another model's heads": (of_field(num_attention_heads=4), "num_attention_heads=4 is not allowed: 2"),
    "another model's width": (of_field(token_dim=64), "token_dim=64 is not allowed: 32"),
    "encoder and decoder": (of_field(num_transformer_submodules=2), "num_transformer_submodules=2 is not allowed: 1"),
    "no tokens": (of_field(num_virtual_tokens=0), "num_virtual_tokens=0 is not allowed: from 1 to 511"),
    "tokens of a context": (of_field(num_virtual_tokens=512), "num_virtual_tokens=512 is not allowed"),
    "tokens in words": (of_field(num_virtual_tokens="5"), "num_virtual_tokens='5' is not allowed"),
    "a field left out": (of_field(token_dim=...), "token_dim=None is not allowed: 32"),
    "more to save": (of_field(modules_to_save=["lm_head"]), "modules_to_save=['lm_head'] is not allowed"),
    "something new": (of_field(use_something_new=True), "use_something_new=True is not allowed"),
    "the paper's positions": (of_field(prefix_positions="unshifted"), "prefix_positions='unshifted' is not allowed"),
    "positions of a third kind": (of_field(prefix_positions=3), "prefix_positions=3 is not allowed"),
    "another method": (of_field(peft_type="PROMPT_TUNING"), "peft_type='PROMPT_TUNING' is not allowed"),
}
"""What is done to the fields of such a prefix; the refusal."""

FILES = {name: case for name, case in FILES.items() if "tokens" not in name}
assert {CONFIG, WEIGHTS} <= {message for _, message in FILES.values()}
