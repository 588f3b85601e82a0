"""Linear layers in float32, where PyTorch's choice is MKL: on AMD processors it reaches half of what they can do.

With AVX2 they run in C (linear.c), with AVX-512, or where that was not built, through oneDNN. Either uses the weight as
it lies: no second copy of it is packed. In the lower precisions PyTorch takes oneDNN by itself.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear

from sglang.srt.mezo.core.library import load


class _Call(ctypes.Structure):
    """The C structure of that name."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")] + [
        (name, ctypes.c_int64) for name in ("rows", "columns", "outputs", "x_stride")
    ]


_LIBRARY = load(__file__, "_linear")
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
HAS_C = _LIBRARY is not None and _CAPABILITY in ("AVX2", "AVX512")
IN_C = HAS_C and _CAPABILITY == "AVX2"  # where it was measured to be the fastest
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_MOST_KERNELS = 256
# From the first number of tokens on a layer runs the next multiple of the second.
_ROUNDED_FROM, _MULTIPLE = 64, 16


def bound_kernels() -> None:
    """Keep fewer of oneDNN's kernels than its 1,024, unless the user says how many; to be called before its first
    use in a process."""
    if _CAPACITY.replace("ONEDNN", "DNNL") not in os.environ:
        os.environ.setdefault(_CAPACITY, str(_MOST_KERNELS))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b in float32; x: (..., in), weight: (out, in), bias: (out,) or None.

    oneDNN compiles kernels for every number of rows that it meets, and never gives back half of their half a megabyte.
    For requests of all lengths that would be a gigabyte, so numbers of rows are rounded up.
    """
    if not (x.numel() and weight.is_contiguous() and (IN_C or HAS_ONEDNN)):
        return torch_linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    if IN_C:
        return c_linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rounded_rows(rows) == rows:
        return onednn_linear(x, weight, bias)
    padded = _with_more_rows(x.reshape(rows, -1), rounded_rows(rows))
    return onednn_linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)


def c_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` in C, with a contiguous weight and bias. What comes out for a row is the same to the last bit
    whatever other rows there are."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = rows.new_empty(len(rows), len(weight))
    call = _Call(
        x=rows.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=len(rows),
        columns=rows.shape[1],
        outputs=len(weight),
        x_stride=rows.stride(0),
    )
    assert _LIBRARY is not None, "IN_C says whether it was built"
    if _LIBRARY.mezo_linear(ctypes.byref(call)):
        raise MemoryError(f"a linear layer: no memory to lay out {len(rows)} rows of {rows.shape[1]} numbers")
    return y.view(*x.shape[:-1], -1)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` for any number of rows, each with kernels of its own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rounded_rows(rows: int) -> int:
    """Rows that a layer runs for so many; an input with room for them is not copied."""
    if IN_C:
        return rows
    return -(-rows // _MULTIPLE) * _MULTIPLE if rows >= _ROUNDED_FROM else rows


def _with_more_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x: (fewer rows, columns). What the others hold does not matter, as no row of a product depends on another."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.is_contiguous() and room >= rows * x.shape[1]:
        return x.as_strided((rows, x.shape[1]), (x.shape[1], 1))
    padded = x.new_empty(rows, x.shape[1])
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return padded


def keeps_rows_apart(width: int, dtype: torch.dtype) -> bool:
    """Whether a product over so many columns leaves a row alone whatever the next one holds.

    In bfloat16 oneDNN takes columns in pairs, and by 32 with AMX: behind the end of a row it reads on, and multiplies
    by 0 what is the next row's. That is no number where the next row has none.
    """
    return dtype != torch.bfloat16 or width % 32 == 0 or (width < 32 and width % 2 == 0)


def apart(x: torch.Tensor) -> torch.Tensor:
    """x: (..., columns), or a copy of it with zeros between the rows where a product would not keep them apart."""
    columns = x.shape[-1]
    if keeps_rows_apart(columns, x.dtype):
        return x
    room = x.new_zeros(*x.shape[:-1], (columns // 32 + 1) * 32)
    room[..., :columns] = x
    return room[..., :columns]


def apply_linear(
    original: Callable, method, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Around UnquantizedLinearMethod.apply."""
    if not _all_float32(x, layer.weight):
        return original(method, layer, apart(x), bias)
    return linear(x, layer.weight, bias)


def compute_lm_head(
    original: Callable, processor, hidden: torch.Tensor, lm_head: Any, bias=None, **options
) -> torch.Tensor:
    """Around LogitsProcessor._compute_lm_head: the plain head in float32; all others are left to it."""
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    plain = isinstance(getattr(lm_head, "quant_method", None), UnquantizedEmbeddingMethod) and not hasattr(
        lm_head, "set_lora"
    )
    if plain and bias is None and options.get("out") is None and _all_float32(hidden, lm_head.weight):
        return linear(hidden, lm_head.weight)
    return original(processor, apart(hidden), lm_head, bias, **options)


def _all_float32(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)
