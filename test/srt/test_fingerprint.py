"""A base model is known by its content: other weights or another configuration tell, another place does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.srt.mezo.core import fingerprint as module
from sglang.srt.mezo.core.fingerprint import fingerprint

CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "transformers_version": "5.0",
    "_name_or_path": "somewhere",
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.{name}.weight": torch.randn(64, 64, generator=generator)
        for i in range(3)
        for name in ("q_proj", "v_proj", "fc1")
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


@pytest.fixture(params=["whole", "sampled"])
def size(request, monkeypatch) -> str:
    """Whether the weights count as few, which are read as a whole, or as many."""
    if request.param == "sampled":
        monkeypatch.setattr(module, "_WHOLE", 0)
    return request.param


def configure(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def test_the_place_and_what_wrote_it_do_not_count(folder, tmp_path, size):
    before = fingerprint(folder)
    configure(folder, transformers_version="5.1", _name_or_path="elsewhere")
    (folder / "tokenizer.json").write_text("{}")
    moved = tmp_path / "deep" / "another-name"
    shutil.copytree(folder, moved)
    for path in moved.iterdir():
        os.utime(path, (0, 0))
    (tmp_path / "link").symlink_to(moved)
    assert fingerprint(folder) == fingerprint(moved) == fingerprint(tmp_path / "link") == before


@pytest.mark.parametrize("name", sorted(tensors()))
def test_each_tensor_counts(folder, size, name):
    before = fingerprint(folder)
    weights = tensors()
    weights[name] += 1e-3 * torch.randn(64, 64)
    save_file(weights, folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_the_configuration_the_names_and_the_types_count(folder, size):
    seen = {fingerprint(folder)}
    configure(folder, hidden_size=32)
    seen.add(fingerprint(folder))
    configure(folder)
    weights = tensors()
    for changed in (
        {name.replace("q_proj", "k_proj"): tensor for name, tensor in weights.items()},
        {name: tensor.view(32, 128) for name, tensor in weights.items()},
        {name: tensor.view(torch.int32) for name, tensor in weights.items()},
    ):
        save_file(changed, folder / "model.safetensors")
        seen.add(fingerprint(folder))
    assert len(seen) == 5


def test_what_an_index_names_is_what_is_loaded(folder, size):
    parts = [{name: tensor for name, tensor in tensors().items() if f"layers.{i}" in name} for i in range(3)]
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in range(3)]
    for name, part in zip(names, parts):
        save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: name for name, part in zip(names, parts) for key in part}})
    )
    before = fingerprint(folder)
    save_file(tensors(7), folder / "consolidated.safetensors")
    assert fingerprint(folder) == before
    changed = load_file(folder / names[1])
    save_file({name: tensor + 1 for name, tensor in changed.items()}, folder / names[1])
    assert fingerprint(folder) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_weights_of_other_kinds_count_too(folder, size, name):
    (folder / "model.safetensors").unlink()
    content = os.urandom(1 << 20)
    (folder / name).write_bytes(content)
    before = fingerprint(folder)
    (folder / name).write_bytes(content[::-1])
    assert fingerprint(folder) != before
    assert fingerprint(folder / name) != fingerprint(folder), "a file alone has no configuration"


def test_made_up_weights_are_their_configuration(folder):
    before = fingerprint(folder, weights=False)
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder, weights=False) == before
    configure(folder, hidden_size=32)
    assert fingerprint(folder, weights=False) != before


def test_of_large_weights_little_is_read(folder, monkeypatch):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1 << 40)  # a sparse file
    read = []

    class Counting:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def seek(self, place):
            self._file.seek(place)

        def read(self, size):
            read.append(size)
            return self._file.read(size)

    monkeypatch.setattr(module, "open", lambda *arguments: Counting(open(*arguments)), raising=False)
    fingerprint(folder)
    assert 9 < len(read) and sum(read) < 1 << 20


def test_a_file_that_is_no_model_is_an_error(folder, size, monkeypatch):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError):
        fingerprint(folder)
