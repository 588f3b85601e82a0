"""Linear layers in float32 through oneDNN: on AMD processors it is twice as fast as MKL, PyTorch's choice for float32.

In the lower precisions PyTorch takes oneDNN by itself. The weight is used as it lies: no second copy of it is packed.
"""

import os
from collections.abc import Callable

import torch
from torch.nn.functional import linear as torch_linear

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_MOST_KERNELS = 256


def bound_kernels() -> None:
    """Keep so many of oneDNN's kernels, unless the user says how many; to be called before its first use in a process.

    It compiles one for each number of tokens that a layer meets, and keeps 1,024 by default, a quarter of a megabyte each. What
    kernels have in common it never gives back: that is another 300 MB after requests of all lengths.
    """
    if _KERNELS.replace("ONEDNN", "DNNL") not in os.environ:
        os.environ.setdefault(_KERNELS, str(_MOST_KERNELS))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b in float32; x: (..., in), weight: (out, in), bias: (out,) or None."""
    if not (_HAS_ONEDNN and weight.is_contiguous() and x.numel()):
        return torch_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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
