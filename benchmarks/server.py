"""A real server for a benchmark: processes of its own on a free loopback port, all of them ended with the benchmark."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]

_START_SECONDS = 300
_STOP_SECONDS = 20
_HTTP_SECONDS = 120
_ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Server:
    """A server that answers. ``log`` has what its processes print."""

    url: str
    log: Path
    process: subprocess.Popen

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=_HTTP_SECONDS)

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=_HTTP_SECONDS, max_retries=0)

    @cached_property
    def model(self) -> str:
        """The base model's name in requests."""
        return self.openai.models.list().data[0].id

    def metrics(self) -> dict[str, float]:
        """What Prometheus reads, needs --enable-metrics; see ``samples``."""
        return samples(self.http.get("/metrics").raise_for_status().text)

    def flush_cache(self) -> None:
        """Empty the radix tree. SGLang refuses while a request runs, for which it gets some time here."""
        self.http.post("/flush_cache", params={"timeout": 60}).raise_for_status()

    def wait_until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """What ``condition`` returns once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s; the server says:\n{self.log_tail()}")
            time.sleep(0.5)
        return value

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def upload(self, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return self.openai.files.create(file=(name, content), purpose="fine-tune").id

    def create_job(self, training_file: str, validation_file: str, seed: int, **hyperparameters: Any) -> str:
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        return self.openai.fine_tuning.jobs.create(
            model=self.model, training_file=training_file, validation_file=validation_file, seed=seed, method=method
        ).id

    def wait_for_job(self, job_id: str, status: str, seconds: float = 300) -> None:
        """RuntimeError where the job ends otherwise."""

        def reached() -> bool:
            job = self.openai.fine_tuning.jobs.retrieve(job_id)
            if job.status in _ENDED and job.status != status:
                raise RuntimeError(f"{job_id} ended as {job.status}: {job.error}")
            return job.status == status

        self.wait_until(reached, seconds, f"{job_id} {status}")


@contextmanager
def running_server(model: str | Path, folder: Path, *flags: str) -> Iterator[Server]:
    """``sglang-mezo serve`` until the end of the block. ``folder`` gets its log, and ``mezo/`` with files and jobs."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "sglang.srt.mezo.commands.main",
        "serve",
        "--model-path",
        str(model),
        "--port",
        str(port),
        "--mezo-dir",
        str(folder / "mezo"),
        *flags,
    ]
    log = folder / "server.log"
    with open(log, "wb") as output, _sigterm_as_exit():
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            server.wait_until(lambda: _is_up(server), _START_SECONDS, "start of the server")
            yield server
        finally:
            end(process)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """The server runs in a session of its own, and would outlive a benchmark that is ended by a signal."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_up(server: Server) -> bool:
    try:
        return server.http.get("/health").status_code == 200 and server.http.get("/mezo/status").status_code == 200
    except httpx.TransportError:
        return False


def end(process: subprocess.Popen) -> None:
    """Ask the server to end, then kill what is left: its process group, and children that have left the group."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.terminate()
    psutil.wait_procs([process, *children], _STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


# --- what results say beside their rows -------------------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    """Prometheus' text as {name: value}; {name{le="0.1"}: value} for the buckets of a histogram."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            bound = sample.labels.get("le")
            name = sample.name if bound is None else f'{sample.name}{{le="{bound}"}}'
            values[name] = values.get(name, 0.0) + sample.value  # of all other labels together
    return values


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())),
        "versions": {name: version(name) for name in ("sglang", "sglang-mezo", "torch", "transformers")},
        "commit": commit(),
    }


def commit() -> str | None:
    """Of this tree, with "-dirty" where it has changed since; None where it is no checkout."""
    if (head := _git("rev-parse", "HEAD")) is None:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
