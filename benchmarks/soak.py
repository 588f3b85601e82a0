"""Mixed traffic against one server for an hour, and then: has anything leaked?

    python benchmarks/soak.py --json benchmarks/results/soak.json

Requests to the base model and to adapters, whole, streamed and given up in the middle; jobs that are created, paused,
resumed, fed, published, evaluated, updated, cancelled and deleted; uploads, of which some break off; flushes and pauses
of generation. The embedded model, a small KV pool, seeds fixed, all on loopback.

Before and after the traffic the same job and the same requests run on the quiet server, and must come to the same.
Resident memory, threads and descriptors of each process are compared between the second and the last fifth of the time.
SGLang itself ends a server that is idle with KV or rows missing. Exit status 1 where a check fails.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from server import ROOT, Server, machine, running_server
from soak_traffic import Models, Tally, actors

MODEL = ROOT / "examples/assets/opt-reviews"
REVIEWS = ROOT / "examples/assets/reviews/train.jsonl"
KV_TOKENS = 16384  # few enough that requests and training take them from each other
SLOTS = 7  # two for each of the job's two directions, its adapter, the base model, a served adapter: none to lose
FLAGS = (
    "--dtype",
    "float32",
    "--max-total-tokens",
    str(KV_TOKENS),
    "--max-loras-per-batch",
    str(SLOTS),
    "--enable-metrics",
)
JOB = {
    "max_steps": 60,
    "num_perturbations": 2,
    "estimator": "two_sided",
    "invocation": " It was",
    "logging_steps": 1,
    "learning_rate": 1e-4,
}

SAMPLE_SECONDS = 10
GROWTH = {"rss_mib": (0.05, 64), "threads": (0.0, 4), "descriptors": (0.0, 8)}  # the larger of a share and a number
GAUGES = (
    "kv_available_tokens",
    "kv_evictable_tokens",
    "kv_used_tokens",
    "num_running_reqs",
    "num_queue_reqs",
    "mezo_steps_total",
    "mezo_backoffs_total",
    "mezo_kept_prefix_tokens",
)
QUIET_SECONDS = 120  # for jobs and sessions to end, and for SGLang's idle metrics
UPSTREAM_NOISE = (
    "lora_id must be either a string or a list of strings"  # a request for an adapter that is gone, answered with 400
)
_BAD_LOG = re.compile(r"memory leak|\bERROR\b|CRITICAL|was never awaited|failed to|did not")
_ADAPTER = re.compile(r"LoRA adapter (?P<verb>\w+)( from tensors)? completes: LoRARef\(lora_id=(?P<id>\w+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    tally, samples = Tally(), []
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with running_server(MODEL, folder, *FLAGS) as server:
        try:
            checks = soak(server, 60 * arguments.minutes, tally, samples)
        except Exception as error:
            checks = {f"the server lives: {error!r}": False}
    checks["nothing unexpected in the server's log"] = (found := bad_lines(server.log)) == []
    checks["no unexpected answer"] = tally.unexpected == []
    for line in [*found[:20], *tally.unexpected[:20]]:
        print(f"  {line}")
    for name, passed in checks.items():
        print(f"{'pass' if passed else 'FAIL'}  {name}")
    passed = all(checks.values())
    if passed:
        shutil.rmtree(folder)
    verdict = "no leak" if passed else f"FAILED, see {folder},"
    print(f"{verdict} after {arguments.minutes:g} minutes and {sum(tally.answers.values())} requests")
    if arguments.json:
        report = {
            "passed": passed,
            "checks": checks,
            "answers": dict(sorted(tally.answers.items())),
            "unexpected": tally.unexpected,
            "log": found[:100],
            "samples": columns(samples),
            "machine": machine(),
            "settings": {"minutes": arguments.minutes, "flags": FLAGS, "growth": GROWTH, "job": JOB},
        }
        arguments.json.write_text(json.dumps(report) + "\n")
    raise SystemExit(0 if passed else 1)


def soak(server: Server, seconds: float, tally: Tally, samples: list[dict[str, float]]) -> dict[str, bool]:
    """Whether each check passed, by its name."""
    rows = training_rows()
    first = canary(server, rows)
    stop = threading.Event()
    threads = actors(server, tally, Models(), rows, stop)
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while (elapsed := time.monotonic() - started) < seconds:
            samples.append({"seconds": round(elapsed, 1), **sample(server)})
            time.sleep(max(0, min(SAMPLE_SECONDS, seconds - elapsed)))
    finally:
        stop.set()
        for thread in threads:
            thread.join(300)
    checks = {"every client came to its end": not any(thread.is_alive() for thread in threads)}
    checks |= growth(samples)
    clear(server)
    checks["a flush gives back all KV"] = becomes_true(server, lambda: flushed(server))
    checks["every adapter has been unloaded"] = becomes_true(server, lambda: not loaded_adapters(server.log))
    checks["the same job and requests come to the same"] = canary(server, rows) == first
    clear(server)
    checks["a flush gives back all KV again"] = becomes_true(server, lambda: flushed(server))
    checks["the server is healthy"] = server.http.get("/health_generate").status_code == 200
    samples.append({"seconds": round(time.monotonic() - started, 1), **sample(server)})
    return checks


def training_rows() -> list[dict[str, Any]]:
    sentences = map(json.loads, REVIEWS.read_text().splitlines())
    return [
        {"prompt": f"{row['sentence']} It was", "options": [" terrible", " great"], "label": row["label"]}
        for row in sentences
    ]


def canary(server: Server, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """A job's losses and the answers of the base model and of what it trained, on a quiet server with an empty
    cache."""
    server.flush_cache()
    files = [server.upload(part) for part in (rows[:64], rows[64:80])]
    job = server.create_job(*files, seed=1, **JOB)
    server.wait_for_job(job, "succeeded")
    lines = server.http.get(f"/mezo/jobs/{job}/metrics").json()["data"]
    trained = server.openai.fine_tuning.jobs.retrieve(job).fine_tuned_model
    answers = [
        server.openai.completions.create(model=model, prompt=row["prompt"], max_tokens=8, temperature=0).choices[0].text
        for model in (server.model, trained)
        for row in rows[100:108]
    ]
    for file in files:
        server.openai.files.delete(file)
    return [
        [(line["loss_plus"], line["loss_minus"], line["projected_grad"]) for line in lines if "loss_plus" in line],
        answers,
    ]


def clear(server: Server) -> None:
    """End what the traffic left: jobs that it had no time to cancel, models, files."""
    for job in server.openai.fine_tuning.jobs.list(limit=100):
        if job.finished_at is None:
            server.openai.fine_tuning.jobs.cancel(job.id)
    models = server.http.get("/v1/models").json()["data"]
    for model in models:
        if model["id"] != server.model:
            server.http.delete(f"/v1/models/{model['id']}").raise_for_status()
    for file in server.openai.files.list():
        server.openai.files.delete(file.id)


def flushed(server: Server) -> bool:
    """SGLang brings its figures up to date now and then while it is idle."""
    server.http.post("/flush_cache")
    return server.metrics()["sglang:kv_available_tokens"] == KV_TOKENS


def becomes_true(server: Server, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + QUIET_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(2)
    return True


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(server: Server) -> dict[str, float]:
    metrics = server.metrics()
    return {
        **{
            f"{figure} of {name}": value
            for name, process in processes(server).items()
            for figure, value in figures(process).items()
        },
        "adapters_listed": len(server.http.get("/v1/models").json()["data"]) - 1,
        **{name: metrics.get(f"sglang:{name}", 0.0) for name in GAUGES},
    }


def columns(samples: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def processes(server: Server) -> dict[str, psutil.Process]:
    """By what they do, which SGLang puts into their command lines."""
    parent = psutil.Process(server.process.pid)
    children = {name: child for child in parent.children(recursive=True) if (name := process_name(child))}
    return {"http": parent, **children}


def process_name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()).strip()
    return command.removeprefix("sglang::") if command.startswith("sglang::") else ""


def figures(process: psutil.Process) -> dict[str, int]:
    with process.oneshot():
        return {
            "rss_mib": process.memory_info().rss >> 20,
            "threads": process.num_threads(),
            "descriptors": process.num_fds(),
        }


def growth(samples: Sequence[dict[str, float]]) -> dict[str, bool]:
    """The last fifth of the samples against the second: in the first, what is used for the first time is set up."""
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    checks = {}
    for name in samples[0]:
        if (figure := name.partition(" of ")[0]) in GROWTH:
            share, number = GROWTH[figure]
            before, after = (statistics.median(sample[name] for sample in part) for part in (early, late))
            checks[f"{name}: {before:.0f}, later {after:.0f}"] = after - before <= max(share * before, number)
    return checks


def bad_lines(log: Path) -> list[str]:
    """Lines that should not be there; of a traceback the one with its exception."""
    found: list[str] = []
    in_traceback = False
    with open(log, errors="replace") as lines:
        for line in map(str.rstrip, lines):
            ends_traceback = in_traceback and not line.startswith(" ")
            in_traceback = "Traceback (" in line or (in_traceback and not ends_traceback)
            if (ends_traceback or _BAD_LOG.search(line)) and UPSTREAM_NOISE not in line:
                found.append(line)
    return found


def loaded_adapters(log: Path) -> set[str]:
    """Ids of the adapters that the scheduler has been given and has not dropped, training's own ones too."""
    loaded: set[str] = set()
    with open(log, errors="replace") as lines:
        for line in lines:
            if match := _ADAPTER.search(line):
                (loaded.discard if match["verb"] == "unloading" else loaded.add)(match["id"])
    return loaded


if __name__ == "__main__":
    main()
