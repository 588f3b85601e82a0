"""Runs the lines of ``lines.py`` in their order, as many as the time allows; a later call goes on where this one ends.

    python benchmarks/gpu/run.py --minutes 8
    python benchmarks/gpu/run.py --minutes 8 --out results        # another folder
    python benchmarks/gpu/run.py --only server steps-opt-13b       # again, whatever became of them
    python benchmarks/gpu/run.py --tiny                            # small models, on any machine

A line is a process with a time limit of its own. What became of it is a line of ``lines.jsonl`` before the next begins:
its result, the card, the versions, the date, the commit; ``log.txt`` has what it printed. A line that has passed, or
failed, is not run again but by its name; one that the end of the time has cut short is.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from lines import Line, lines

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LEAST_SECONDS = 30  # a line that has less is left to the next call
TAIL = 2000  # characters of what a line that failed has printed last
PACKAGES = ("sglang", "sglang-mezo", "torch", "transformers", "peft", "triton", "sglang-kernel")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="that all of this call may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of lines.jsonl and log.txt")
    parser.add_argument("--only", nargs="+", help="names of lines")
    parser.add_argument("--tiny", action="store_true", help="small models, for a machine without a GPU")
    parser.add_argument("--model", type=Path, help="folder or GGUF file of SmolLM2-135M, in the place of the hub")
    parser.add_argument(
        "--data", type=Path, help="folder with a folder of files for each task, in the place of the hub"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the line that runs ends with it
    chosen = lines(arguments.model, arguments.data)
    if unknown := set(arguments.only or ()) - {line.name for line in chosen}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: none of {', '.join(line.name for line in chosen)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bring_along(arguments.out)
    if arguments.only:
        chosen = [line for line in chosen if line.name in arguments.only]
    else:
        known = [record for record in read(arguments.out / "lines.jsonl") if record["tiny"] == arguments.tiny]
        done = {record["line"] for record in known if record["status"] != "cut"}
        chosen = [line for line in chosen if line.name not in done]
    if arguments.tiny:
        chosen = distinct(chosen)
    sys.exit(not run(chosen, arguments.out, 60 * arguments.minutes, arguments.tiny))


def distinct(chosen: Sequence[Line]) -> list[Line]:
    """Lines that differ in what only a GPU has are one on small models."""
    found: dict[tuple, Line] = {}
    for line in chosen:
        found.setdefault(line.tiny, line)
    return list(found.values())


def bring_along(out: Path) -> None:
    """The lines that the repository has, so that what comes back is all there is."""
    known = RESULTS / "lines.jsonl"
    if known.is_file() and not (out / "lines.jsonl").is_file():
        shutil.copy(known, out / "lines.jsonl")


def run(chosen: Sequence[Line], out: Path, seconds: float, tiny: bool = False) -> bool:
    """Whether all that were run have passed; what there was no time for is named."""
    started, passed = time.monotonic(), True
    for number, line in enumerate(chosen):
        left = seconds - (time.monotonic() - started)
        if left < min(LEAST_SECONDS, 60 * line.minutes):
            print(f"no time for: {', '.join(one.name for one in chosen[number:])}", flush=True)
            break
        record = run_line(line, out / "log.txt", left, tiny)
        drop_half_line(out / "lines.jsonl")
        with open(out / "lines.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(told(record), flush=True)
        passed &= record["status"] != "failed"
    return passed


def run_line(line: Line, log: Path, left: float, tiny: bool) -> Record:
    limit = min(60 * line.minutes, left)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(log, "ab") as output:
        output.write(f"--- {line.name}\n".encode())
        output.flush()
        begin = output.tell()
        result = Path(folder) / "result.json"
        (Path(folder) / "work").mkdir()
        names = {"{python}": sys.executable, "{json}": str(result), "{folder}": str(Path(folder) / "work")}
        status = "passed"
        for command in line.tiny if tiny else line.commands:
            if status == "passed":
                rest = limit - (time.monotonic() - started)
                code = run_command([names.get(part, part) for part in command], output, rest)
                cut = code is None and limit < 60 * line.minutes  # by the end of all time, not of its own
                status = "passed" if code == 0 else "cut" if cut else "failed"
        found = read_result(result)
    printed = log.read_bytes()[begin:].decode(errors="replace").strip()
    end = printed[-TAIL:] if status != "passed" else printed.rpartition("\n")[2][:TAIL]
    record = {"line": line.name, "status": status, "seconds": time.monotonic() - started, "tiny": tiny}
    return {**record, "result": found, "end": end, **where()}


def run_command(command: Sequence[str], output: Any, seconds: float) -> int | None:
    """Its exit status; None where it has taken all of its time, and all of its processes are ended."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # what is printed last is told
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """And all that it has started, in sessions of their own as well."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def read_result(path: Path) -> Any:
    """None of a line that has written none, or not the whole of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def where() -> Record:
    return {
        "card": _printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "none",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _printed("git", "rev-parse", "HEAD"),
    }


def _printed(*command: str) -> str | None:
    """By a program; None where it is not there, or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read(path: Path) -> list[Record]:
    """All but the last where that is half a line, as a machine leaves it that goes away; it is cut off."""
    drop_half_line(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def drop_half_line(path: Path) -> None:
    """As ``core.integrity`` does, which cannot be imported where SGLang cannot: the first line tells whether it can."""
    if path.is_file():
        content = path.read_bytes()
        if (whole := content.rfind(b"\n") + 1) < len(content):
            os.truncate(path, whole)


def told(record: Record) -> str:
    last = record["end"].strip().rpartition("\n")[2]
    return f"{record['line']:<24} {record['status']:<7} {record['seconds']:6.1f} s  {last[:300]}"


if __name__ == "__main__":
    main()
