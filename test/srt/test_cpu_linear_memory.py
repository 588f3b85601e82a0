"""Kernels that oneDNN compiles for a layer: so many are kept, the latest ones, unless the user says how many."""

import os
import subprocess
import sys

import pytest
import torch

COMPILED = """
import torch
from sglang.srt.mezo.cpu.linear import bound_kernels, linear
bound_kernels()
weight = torch.ones(8, 8)
for tokens in [*range(1, 301), 300, 1]:
    linear(torch.ones(tokens, 8), weight)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize(
    "environment, first_was_kept",
    [({}, False), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, True), ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "1024"}, True)],
)
def test_the_latest_kernels_are_kept(environment, first_was_kept):
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_PRIMITIVE_CACHE_CAPACITY")}
    environment = inherited | environment | {"ONEDNN_VERBOSE": "profile_create"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, check=True, env=environment)
    created = [line for line in done.stdout.splitlines() if "primitive,create" in line]
    assert len(created) == 302 and all("cache_miss" in line for line in created[:300])
    assert "cache_hit" in created[300] and ("cache_hit" in created[301]) == first_was_kept
