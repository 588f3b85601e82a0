"""Where the time of a step goes: on the device, on the host between launches, in copies.

    python benchmarks/gpu/profile_step.py --shape opt-13b --directions 16 --json profile.json

A step is timed without the profiler, then several with it: its counts are told per step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parents[1])]

import shapes
from cost_model import synchronize
from sglang.srt.mezo.core.passes import drain
from steps import Bench, Case, seconds

STEPS, TIMED, SHOWN = 5, 10, 25
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    more = {"tuning": ["alora"], "workload": ["sst2"], "directions": [given.directions], "repeats": TIMED}
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Bench(argparse.Namespace(**{**vars(given), **more}), Path(folder)), given.directions)
        given.json.write_text(json.dumps(found))
        print(told(found), flush=True)
    os._exit(0)  # the engine's threads are of no further use


def measured(bench: Bench, directions: int) -> dict[str, Any]:
    trainer = bench.trainer(Case("alora", "sst2", directions))

    def step() -> None:
        drain(trainer.step_passes(trainer.batch(trainer.global_step)))

    for _ in range(5):
        step()
    times = [seconds(step) for _ in range(TIMED)]
    device = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device) as record:
        for _ in range(STEPS):
            step()
        synchronize()
    events = record.key_averages()
    calls = {event.key: event.count / STEPS for event in events}
    cost = "self_device_time_total" if device else "self_cpu_time_total"
    # An operator has the time of its kernels, which have a line of their own.
    own = [event for event in events if not device or event.device_type == torch.autograd.DeviceType.CUDA]
    rows = sorted(own, key=lambda event: -getattr(event, cost))
    busy = sum(getattr(event, cost) for event in own) / STEPS / 1000
    wall = 1000 * statistics.median(times)
    return {
        "step_ms": wall,
        "busy_ms": busy,  # of the device, where there is one
        "host_only_ms": wall - busy,
        "launches": sum(calls.get(name, 0) for name in LAUNCHES),
        "waits": sum(calls.get(name, 0) for name in WAITS),
        "copies": {key: count for key, count in calls.items() if "memcpy" in key.lower()},
        "most": [[event.key[:120], event.count / STEPS, getattr(event, cost) / STEPS / 1000] for event in rows[:SHOWN]],
    }


def told(found: dict[str, Any]) -> str:
    numbers = ", ".join(
        f"{name} {found[name]:.1f}" for name in ("step_ms", "busy_ms", "host_only_ms", "launches", "waits")
    )
    return f"{numbers}; most: " + "; ".join(f"{name} {ms:.2f} ms" for name, _, ms in found["most"][:5])


if __name__ == "__main__":
    main()
