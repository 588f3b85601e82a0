"""The batch that is handed to SGLang, built on a device that computes nothing: no step of it may need the numbers
there."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from sglang.srt.mezo.engine.forward import Sequenced, _forward_batch, before

LENGTHS = ((3, 2), (0, 4), (5, 1))  # cached and new tokens of each sequence


def handle_on(device: str) -> SimpleNamespace:
    translator = SimpleNamespace()
    translator.own_plan = lambda batch: SimpleNamespace(bind=lambda batch, translator: None)
    return SimpleNamespace(
        device=torch.device(device),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, 16, dtype=torch.int32, device=device)),
        model_runner=SimpleNamespace(kv_index_translator=translator),
    )


def sequences_on(device: str) -> list[Sequenced]:
    cached = torch.arange(100, 108, device=device).split([prefix for prefix, _ in LENGTHS])
    return [Sequenced(indices, list(range(new)), (("adapter", new),)) for indices, (_, new) in zip(cached, LENGTHS)]


def test_a_sequence_may_follow_on_another_of_its_batch():
    handle, nothing = handle_on("cpu"), torch.empty(0, dtype=torch.int64)
    segments = (("adapter", 2),)
    sequences = [
        Sequenced(torch.tensor([100, 101]), [7, 8], segments),
        Sequenced(nothing, [9, 9], segments, follows=(0, 3)),
        Sequenced(nothing, [6, 6], segments, follows=(1, 4)),
        Sequenced(torch.tensor([105]), [5, 5], segments),
    ]
    batch = _forward_batch(handle, sequences, [4, 0, 2, 1], torch.arange(200, 208))
    table = handle.req_to_token_pool.req_to_token
    assert table[0, :5].tolist() == [100, 101, 200, 202, 203]
    assert table[2, :6].tolist() == [100, 101, 200, 202, 204, 205]
    assert table[1, :3].tolist() == [105, 206, 207]
    assert batch.positions.tolist() == [2, 3, 3, 4, 4, 5, 1, 2] and batch.extend_prefix_lens_cpu == [2, 3, 4, 1]


def test_what_comes_before_a_sequence_is_where_the_places_are():
    """CUDA joins nothing that lies elsewhere, empty or not; a row that begins anew has nothing, wherever."""
    nothing, segments = torch.empty(0, dtype=torch.int64), (("adapter", 2),)
    sequences = [Sequenced(nothing, [7, 8], segments), Sequenced(nothing, [9, 9], segments, follows=(0, 1))]
    found = before(sequences, torch.arange(200, 204, device="meta").split(2))
    assert [(one.device.type, len(one)) for one in found] == [("meta", 0), ("meta", 1)]


def batch_on(device: str):
    handle = handle_on(device)
    return handle, _forward_batch(handle, sequences_on(device), [4, 0, 2], torch.arange(200, 207, device=device))


def test_every_tensor_is_on_the_device_but_those_named_for_the_host():
    _, batch = batch_on("meta")
    tensors = {
        field.name: value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    assert {
        "input_ids",
        "positions",
        "seq_lens",
        "req_pool_indices",
        "out_cache_loc",
        "extend_seq_lens",
    } <= tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.device.type == ("cpu" if name.endswith("_cpu") else "meta"), name


@pytest.mark.parametrize("row", range(3))
def test_rows_hold_cached_and_new_tokens_in_order(row):
    handle, batch = batch_on("cpu")
    prefix, new = LENGTHS[row]
    cached_before, new_before = (sum(pair[i] for pair in LENGTHS[:row]) for i in (0, 1))
    table = handle.req_to_token_pool.req_to_token[[4, 0, 2][row], : prefix + new]
    assert table.tolist() == [
        *range(100 + cached_before, 100 + cached_before + prefix),
        *range(200 + new_before, 200 + new_before + new),
    ]
    own = slice(new_before, new_before + new)
    assert batch.positions[own].tolist() == list(range(prefix, prefix + new))
    assert batch.extend_start_loc[row] == new_before and batch.seq_lens[row] == prefix + new
