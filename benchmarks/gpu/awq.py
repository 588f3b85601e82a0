"""A checkpoint in AWQ's format, of four bits, and the same weights in the folder that it is made from."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 128  # inputs that share a scale and a zero point
PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of eight neighbouring outputs in an int32, in nibbles
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def save(source: Path, target: Path) -> str:
    """Writes the model of ``source`` with its layers' matrices in four bits to ``target``, and puts what these stand
    for in place of the weights of ``source``, so that Transformers computes with the same numbers."""
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            stem = name.removesuffix("weight")
            q, zeros, scales = quantized(weight)
            weights[name] = dequantized(q, zeros, scales)
            packed |= {stem + "qweight": pack(q), stem + "qzeros": pack(zeros), stem + "scales": scales}
        else:
            packed[name] = weight
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return str(target)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a matrix (outputs, inputs): numbers from 0 to 15 (inputs, outputs), and of each group of inputs zero points
    and scales (groups, outputs). Scales are exact in bfloat16."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).clamp(min=1e-6).bfloat16()
    zeros = (-low / scales).round().clamp(0, 15).int()
    q = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15).int()
    return q.reshape(-1, weight.shape[0]), zeros, scales


def dequantized(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of what ``quantized`` gives: the matrix (outputs, inputs)."""
    groups = q.reshape(-1, GROUP, q.shape[1]) - zeros[:, None]
    return (groups * scales[:, None].float()).reshape(q.shape).t().contiguous()


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Eight neighbouring outputs in an int32: (rows, outputs) to (rows, outputs / 8)."""
    eights = numbers.reshape(numbers.shape[0], -1, 8).long() << (4 * PLACES)
    return eights.sum(-1).int()
