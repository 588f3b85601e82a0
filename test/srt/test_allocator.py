"""Freed memory stays with a process that trains, unless the user has set the C library's own variables."""

import os
import platform
import subprocess
import sys

import pytest

FREED = """
import psutil, torch
from sglang.srt.mezo.engine.allocator import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
memory = lambda: psutil.Process().memory_info().rss
activation = torch.ones(64 << 20)
before = memory()
del activation
print((before - memory()) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("environment, given_back", [({}, False), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, True)])
def test_freed_memory_is_kept(environment, given_back):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FREED],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
    )
    mebibytes = int(done.stdout.split()[-1])
    assert (mebibytes > 200) if given_back else (mebibytes < 50)
