"""Attention in C (attention.c): keys and values are read where they lie in the KV pool.

Where it was not built, ``LIBRARY`` is None and attention runs on plain PyTorch.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from sglang.srt.mezo.core.library import load
from sglang.srt.mezo.cpu.attention_plan import Row, bundle_rows, cut_rows

# Causal rows longer than this are cut: the scores of a piece are kept at once, and what it cannot see is left out.
_MOST_QUERIES = 64
# Rows are joined up to so many scores of a head.
_BUNDLE_SCORES = 1 << 18


class _Call(ctypes.Structure):
    """The C structure of that name."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "table", "rows", "bundles")]
        + [
            (name, ctypes.c_int64)
            for name in ("q_stride", "table_stride", "heads", "kv_heads", "dim", "v_dim", "window", "causal")
        ]
        + [(name, ctypes.c_float) for name in ("scaling", "cap")]
    )


LIBRARY = load(__file__, "_attention")
if LIBRARY is not None:
    LIBRARY.mezo_attend.argtypes = (ctypes.POINTER(_Call), ctypes.c_int64)


class Batch:
    """The rows of a forward, which one call of the kernel serves in every layer.

    Args:
        table: int32 (requests, context), the pool's index of every token of a request.
    """

    def __init__(self, rows: Sequence[Row], table: torch.Tensor, causal: bool):
        if causal:
            rows = cut_rows(rows, _MOST_QUERIES)
        bundles = bundle_rows(rows, table.numpy(), lambda joined, *_: joined.queries * joined.keys <= _BUNDLE_SCORES)
        self._rows = np.array(
            [(row.request, row.prefix, row.fresh, row.start) for bundle in bundles for row in bundle.rows], np.int64
        )
        self._bounds = np.cumsum([0] + [len(bundle.rows) for bundle in bundles], dtype=np.int64)
        self._table = table
        self._causal = causal

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scaling: float,
        window: int | None,
        cap: float,
    ) -> None:
        """Write the rows' tokens of ``output``.

        Args:
            query: float32 (tokens, heads, dim), heads one after the other.
            keys, values: float32 (places, kv_heads, dim), contiguous; the fresh tokens are in them.
            output: float32 (tokens or more, heads, v_dim), contiguous.
            window: tokens that a query sees before itself, None for all.
            cap: scores are cap tanh(score / cap); 0 for none.
        """
        call = _Call(
            q=query.data_ptr(),
            k=keys.data_ptr(),
            v=values.data_ptr(),
            out=output.data_ptr(),
            table=self._table.data_ptr(),
            rows=self._rows.ctypes.data,
            bundles=self._bounds.ctypes.data,
            q_stride=query.stride(0),
            table_stride=self._table.stride(0),
            heads=query.shape[1],
            kv_heads=keys.shape[1],
            dim=query.shape[2],
            v_dim=values.shape[2],
            window=-1 if window is None else window,
            causal=self._causal,
            scaling=scaling,
            cap=cap,
        )
        assert LIBRARY is not None, "there are no batches where it was not built"
        if LIBRARY.mezo_attend(ctypes.byref(call), len(self._bounds) - 1):
            raise MemoryError("attention: no memory for the scores")
