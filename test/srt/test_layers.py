"""Where SGLang's layers hold what of the checkpoint's, and what of it goes into which part of a slot."""

import pytest
import torch

from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.mezo.adapters.adapter import Site
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.engine.layers import Part, _parts
from sglang.srt.mezo.engine.slots import _NOWHERE, _blocks, _placed

MLP = {
    "mlp.gate_proj": Site("mlp.gate_proj", 64, 96),
    "mlp.up_proj": Site("mlp.up_proj", 64, 96),
    "mlp.down_proj": Site("mlp.down_proj", 96, 64),
}
FUSED = {"mlp.gate_up_proj": Site("mlp.gate_up_proj", 64, 192), "attn.qkv_proj": Site("attn.qkv_proj", 64, 128)}
ATTENTION = {
    f"attn.{name}": Site(f"attn.{name}", 64, rows) for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32))
}


def linear(kind: type, **sizes):
    """A layer of SGLang's as far as its sizes go; a whole one needs parallel groups."""
    layer = kind.__new__(kind)
    vars(layer).update(sizes)
    return layer


QKV = linear(QKVParallelLinear, total_num_heads=4, total_num_kv_heads=2, head_size=16)
GATE_UP = linear(MergedColumnParallelLinear, output_sizes=[96, 96])
WIDE_GATE_UP = linear(
    MergedColumnParallelLinear, output_sizes=[128, 128]
)  # as on two ranks, which need multiples of 64


def test_layers_that_only_sglang_fuses_are_several():
    assert [
        (part.site.name, part.first, part.rows, part.width) for part in _parts("attn.qkv_proj", QKV, ATTENTION)
    ] == [("q_proj", 0, 64, 64), ("k_proj", 0, 32, 32), ("v_proj", 0, 32, 32)]


def test_a_layer_that_the_checkpoint_fuses_is_one_in_parts():
    site = FUSED["attn.qkv_proj"]
    assert list(_parts("attn.qkv_proj", QKV, FUSED)) == [
        Part(site, 0, 64, 64),
        Part(site, 64, 32, 32),
        Part(site, 96, 32, 32),
    ]


def test_widened_layers_keep_the_checkpoints_widths():
    assert [(part.rows, part.width) for part in _parts("mlp.gate_up_proj", WIDE_GATE_UP, MLP)] == [(96, 128), (96, 128)]
    assert [(part.first, part.rows, part.width) for part in _parts("mlp.gate_up_proj", WIDE_GATE_UP, FUSED)] == [
        (0, 96, 128),
        (96, 96, 128),
    ]
    (down,) = _parts("mlp.down_proj", linear(RowParallelLinear, output_size=64), MLP)
    assert (down.site.in_features, down.rows, down.width) == (96, 64, 64)


def test_unequal_parts_that_were_widened_are_refused():
    """How many rows of which part are the checkpoint's cannot be told."""
    wide = linear(QKVParallelLinear, total_num_heads=6, total_num_kv_heads=3, head_size=16)
    with pytest.raises(ConfigError, match="tp_size"):
        list(_parts("attn.qkv_proj", wide, FUSED))


def test_layers_that_the_checkpoint_lacks_have_no_parts():
    assert list(_parts("mlp.gate", linear(ColumnParallelLinear, output_size=4), MLP)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_widened_layer_takes_its_share(rank):
    """Two ranks have 64 of the 128 rows of gate and of up each; the last 32 of either are nobody's."""
    r = 4
    a, b = torch.arange(r * 64).view(r, 64), 1000 + torch.arange(96 * r).view(96, r)
    gate, up = _parts("mlp.gate_up_proj", WIDE_GATE_UP, MLP)
    placed = [_placed(part, 64, (a, b + 5000 * (part is up)), r) for part in (gate, up)]
    share = torch.cat([part[64 * rank : 64 * rank + 64] for _, part in placed])
    blocks = list(_blocks(0, share))
    rows = 64 if rank == 0 else 32
    assert [(block.first, block.end, block.offset) for block in blocks] == [
        (0, rows, 1000 + 64 * rank * r),
        (64, 64 + rows, 6000 + 64 * rank * r),
    ]
    assert all(torch.equal(part, a) for part, _ in placed)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_layer_with_widened_inputs_takes_its_share(rank):
    r = 4
    (down,) = _parts("mlp.down_proj", linear(RowParallelLinear, output_size=64), MLP)
    a, b = torch.arange(r * 96).view(r, 96), torch.arange(64 * r).view(64, r)
    placed, whole = _placed(down, 128, (a, b), r)
    (block,) = _blocks(0, placed[:, 64 * rank : 64 * rank + 64])
    assert (block.columns, block.offset, block.stride) == ((64, 0, 96) if rank == 0 else (32, 64, 96))
    assert torch.equal(whole, b) and (placed[:, 96:] == _NOWHERE).all()
