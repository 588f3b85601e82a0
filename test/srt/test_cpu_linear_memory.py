"""Kernels that oneDNN compiles for a layer: few of them, of which the latest are kept unless the user says how many."""

import os
import subprocess
import sys

import pytest
import torch

LAYERS = """
import torch
from sglang.srt.mezo.cpu import linear
linear.bound_kernels()
linear.IN_C = False
for tokens, width in {calls}:
    linear.linear(torch.ones(tokens, width), torch.ones(8, width))
"""
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def compiled(calls: str, environment: dict[str, str]) -> list[bool]:
    """Whether each call, an expression for (tokens, width), needed a kernel that was not there."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_PRIMITIVE_CACHE_CAPACITY")}
    command = [sys.executable, "-W", "ignore", "-c", LAYERS.format(calls=calls)]
    environment = inherited | environment | {"ONEDNN_VERBOSE": "profile_create"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return ["cache_miss" in line for line in output.splitlines() if "primitive,create" in line]


@pytest.mark.parametrize(
    "environment, first_was_kept",
    [
        ({}, False),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, True),
        pytest.param({"DNNL_PRIMITIVE_CACHE_CAPACITY": "1024"}, True, marks=pytest.mark.slow),
    ],
)
def test_the_latest_kernels_are_kept(environment, first_was_kept):
    misses = compiled("[(1, width) for width in [*range(1, 301), 300, 1]]", environment)
    assert misses == [True] * 300 + [False, not first_was_kept]


def test_numbers_of_tokens_share_kernels():
    misses = compiled("[(tokens, 8) for tokens in range(1, 1025)]", {})
    assert len(misses) == 1024 and sum(misses) < 64 + 1024 // 16
