"""Linear layers in float32 through oneDNN: on AMD processors it is twice as fast as MKL, PyTorch's choice for float32.

In the lower precisions PyTorch takes oneDNN by itself. The weight is used as it lies: no second copy of it is packed.
"""

import os
from collections.abc import Callable

import torch
from torch.nn.functional import linear as torch_linear

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_MOST_KERNELS = 256
# From the first number of tokens on a layer runs the next multiple of the second.
_ROUNDED_FROM, _MULTIPLE = 64, 16


def bound_kernels() -> None:
    """Keep fewer of oneDNN's kernels than its 1,024, unless the user says how many; to be called before its first use in a process."""
    if _CAPACITY.replace("ONEDNN", "DNNL") not in os.environ:
        os.environ.setdefault(_CAPACITY, str(_MOST_KERNELS))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b in float32; x: (..., in), weight: (out, in), bias: (out,) or None.

    oneDNN compiles kernels for every number of rows that it meets, and never gives back half of their half a megabyte. For
    requests of all lengths that would be a gigabyte, so numbers of rows are rounded up.
    """
    if not (HAS_ONEDNN and weight.is_contiguous() and x.numel()):
        return torch_linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rounded_rows(rows) == rows:
        return onednn_linear(x, weight, bias)
    padded = _with_more_rows(x.reshape(rows, -1), rounded_rows(rows))
    return onednn_linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` for any number of rows, each with kernels of its own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rounded_rows(rows: int) -> int:
    """Rows that a layer runs for so many; an input with room for them is not copied."""
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


def apply_linear(original: Callable, method, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Around UnquantizedLinearMethod.apply."""
    if not _all_float32(x, layer.weight):
        return original(method, layer, x, bias)
    return linear(x, layer.weight, bias)


def compute_lm_head(original: Callable, processor, hidden: torch.Tensor, lm_head: torch.nn.Module, bias=None, **options) -> torch.Tensor:
    """Around LogitsProcessor._compute_lm_head: the plain head in float32; all others are left to it."""
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    plain = isinstance(getattr(lm_head, "quant_method", None), UnquantizedEmbeddingMethod) and not hasattr(lm_head, "set_lora")
    if plain and bias is None and options.get("out") is None and _all_float32(hidden, lm_head.weight):
        return linear(hidden, lm_head.weight)
    return original(processor, hidden, lm_head, bias, **options)


def _all_float32(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)
