"""Blocks of the flat vector that a slot is written from, against its positions one by one."""

import pytest
import torch

from sglang.srt.mezo.engine.slots import _NOWHERE, _blocks

FLAT = torch.arange(1000, dtype=torch.float32) + 1


def matrix(offset: int, rows: int, columns: int) -> torch.Tensor:
    return torch.arange(offset, offset + rows * columns).view(rows, columns)


def nowhere(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows, columns), _NOWHERE)


CASES = {
    "one matrix": (matrix(0, 4, 6), 1),
    "parts apart": (torch.cat([matrix(0, 4, 6), matrix(100, 4, 6), matrix(300, 8, 6)]), 3),
    "parts without numbers": (
        torch.cat([nowhere(3, 6), matrix(50, 4, 6), nowhere(4, 6), matrix(300, 2, 6), nowhere(2, 6)]),
        2,
    ),
    "columns of another rank's left out": (matrix(0, 4, 12)[:, 6:], 1),
    "rows of another rank's left out": (matrix(0, 12, 4)[6:], 1),
    "rank 1": (torch.cat([matrix(0, 1, 6), matrix(100, 1, 6), matrix(500, 1, 6)]), None),
    "rank 1 without numbers": (torch.cat([nowhere(1, 6), matrix(0, 1, 6), nowhere(1, 6), matrix(500, 1, 6)]), 2),
    "nothing": (nowhere(3, 6), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_hold_every_number_once(name):
    positions, count = CASES[name]
    blocks = list(_blocks(0, positions))
    written = torch.zeros(positions.shape)
    for block in blocks:
        assert (written[block.first : block.end] == 0).all()
        written[block.first : block.end] = FLAT.as_strided(
            (block.end - block.first, block.columns), (block.stride, 1), block.offset
        )
    assert torch.equal(written, torch.where(positions == _NOWHERE, 0.0, FLAT[positions]))
    assert count is None or len(blocks) == count


def test_rows_in_parts_are_refused():
    with pytest.raises(ValueError, match="in parts"):
        list(_blocks(0, matrix(0, 4, 6)[:, ::2]))


def test_columns_beyond_the_checkpoints_are_left_out():
    positions = torch.cat([torch.cat([matrix(0, 4, 6), nowhere(4, 2)], 1), nowhere(4, 8)])
    (block,) = _blocks(0, positions)
    assert (block.first, block.end, block.columns, block.offset, block.stride) == (0, 4, 6, 0, 6)


def test_one_matrix_may_lie_in_several_places():
    """As A of a layer that is fused in the checkpoint does: SGLang has one for each part."""
    blocks = list(_blocks(0, torch.cat([matrix(7, 4, 6)] * 3)))
    assert [(block.first, block.end, block.offset) for block in blocks] == [(0, 4, 7), (4, 8, 7), (8, 12, 7)]
