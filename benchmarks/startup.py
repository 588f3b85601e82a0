"""What we add to SGLang's start: to its import, and to the start of a server that trains.

    python benchmarks/startup.py --json benchmarks/results/startup.json

`with` us and `without` take turns, each in processes of its own: imports with the plugin loaded or skipped, a server
with training on or off until it answers. A start takes tens of seconds and varies by more than what is looked for, so
what is compared is the median of the differences between neighbours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from server import end, free_port
from step_time import machine

IMPORT = (
    "import sglang.srt.plugins as plugins; plugins.load_plugins(); "
    "import sglang.srt.server_args, sglang.srt.managers.scheduler"
)
MODEL = Path(__file__).parents[1] / "examples/assets/opt-reviews"
MOST_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or hub name of the model that is served")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        compare("import", seconds_to_import, arguments.turns),
        compare("server", lambda ours: seconds_to_serve(arguments.model, ours), arguments.turns),
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "machine": machine(os.cpu_count())}, indent=2) + "\n")


def compare(what: str, measure: Callable[[bool], float], turns: int) -> dict[str, Any]:
    measure(True), measure(False)  # fills the file cache
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for ours in (True, False) if turn % 2 else (False, True):
            times[ours].append(measure(ours))
    added = statistics.median(ours - theirs for ours, theirs in zip(times[True], times[False]))
    print(
        f"{'pass' if added <= MOST_SECONDS else 'FAIL'}  {what}: {statistics.median(times[True]):.2f} s with us, "
        f"{statistics.median(times[False]):.2f} s without, {added:+.2f} s (medians of {turns})",
        flush=True,
    )
    return {"what": what, "with_s": times[True], "without_s": times[False], "added_s": added}


def seconds_to_import(ours: bool) -> float:
    environment = os.environ if ours else {**os.environ, "SGLANG_PLUGINS": "none"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def seconds_to_serve(model: str, ours: bool) -> float:
    """Until /health answers."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "wb") as log:
        training = ["--enable-mezo", "--mezo-dir", str(Path(folder, "mezo"))] if ours else []
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            model,
            "--port",
            str(port),
            "--max-total-tokens",
            "20000",
            *training,
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not answers(port):
                if process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended with {process.returncode}:\n{Path(folder, 'log').read_text()[-3000:]}"
                    )
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            end(process)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
