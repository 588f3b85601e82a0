"""Latency of serving while the server tokenises a large file, without and with it in turns on the same server.

    python benchmarks/validation_load.py --json benchmarks/results/validation_load.json

Clients stream greedy completions in a closed loop, from a process of their own. In every other phase files of 100,000
rows are validated meanwhile, one after the other; the last row of each is bad, so that its job ends when all others
have been tokenised and nothing trains. At the end of such a phase a validation is cancelled under load, and timed until
its process is gone.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from load import Load, Request, run
from serve_while_train import DATA, data_name, latencies, read_sentences, throughput
from server import ROOT, Server, machine, running_server

TARGETS = {"tpot_p99_ratio": 1.5, "cancel_seconds": 2.0}  # at most
SEED = 7
RESAMPLES = 1000
_VALIDATING_SHARE = 0.9  # of a phase; then its validation is cancelled
ROWS, ROW_BYTES = 100_000, 200
PROMPT_SENTENCES, OUTPUT_TOKENS = (1, 4), (16, 48)
OPTIONS = [" terrible", " great"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/assets/opt-reviews")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--load-seconds", type=float, default=60, help="length of a phase")
    parser.add_argument("--pairs", type=int, default=4, help="of phases, without validation and with it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(arguments.model, Path(folder), "--dtype", "float32", "--enable-metrics") as server,
    ):
        row = measure(Benchmark(server, arguments), arguments.pairs)
    show(row)
    if arguments.json:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name != "json"
        }
        settings |= {
            "model": arguments.model.name,
            "row_bytes": ROW_BYTES,
            "output_tokens": OUTPUT_TOKENS,
            "prompt_sentences": PROMPT_SENTENCES,
            "seed": SEED,
        }
        arguments.json.write_text(
            json.dumps({"rows": [row], "settings": settings, "machine": machine()}, indent=2) + "\n"
        )


class Benchmark:
    def __init__(self, server: Server, arguments: argparse.Namespace):
        self._server = server
        self._arguments = arguments
        folder, held_out = DATA[data_name(arguments.model)]
        self._sentences = [row["sentence"] for row in read_sentences(folder / f"{held_out}.jsonl")]
        rows = [*self._rows(arguments.rows), {"prompt": "It was", "options": OPTIONS, "label": len(OPTIONS)}]
        self.file_bytes = sum(len(json.dumps(row)) + 1 for row in rows)
        self._file = server.upload(rows)

    def _rows(self, count: int) -> list[dict[str, Any]]:
        draw = random.Random(SEED)
        rows = []
        for number in range(count):
            prompt = f"{number}"
            while len(prompt) < ROW_BYTES - 70:  # the rest of a row's bytes are names, options and the label
                prompt += f" {draw.choice(self._sentences)}"
            rows.append(
                {"prompt": f"{prompt[: ROW_BYTES - 70]} It was", "options": OPTIONS, "label": number % len(OPTIONS)}
            )
        return rows

    def load(self, phase: str, seconds: float) -> Load:
        draw = random.Random(f"{SEED} {phase}")
        requests = [
            Request(
                0.0,
                " ".join(draw.choices(self._sentences, k=draw.randint(*PROMPT_SENTENCES))),
                draw.randint(*OUTPUT_TOKENS),
            )
            for _ in range(1000)
        ]
        return run(self._server.url, self._server.model, requests, in_flight=self._arguments.clients, seconds=seconds)

    def validation(self) -> str:
        method = {"type": "supervised", "supervised": {"hyperparameters": {"invocation": " It was"}}}
        return self._server.openai.fine_tuning.jobs.create(
            model=self._server.model, training_file=self._file, method=method
        ).id

    def validated(self, job_id: str) -> bool:
        job = self._server.openai.fine_tuning.jobs.retrieve(job_id)
        if job.status == "failed" and f":{self._arguments.rows + 1}: label=" not in job.error.message:
            raise RuntimeError(f"the validation ended with {job.error}")
        return job.status == "failed"

    def alone(self) -> float:
        """Rows per second of a validation beside which nothing runs."""
        started = time.perf_counter()
        job = self.validation()
        self._server.wait_until(lambda: self.validated(job), 900, "a validation")
        return self._arguments.rows / (time.perf_counter() - started)

    def phase(self, name: str, validates: bool) -> dict[str, Any]:
        loads: list[Load] = []
        thread = threading.Thread(target=lambda: loads.append(self.load(name, self._arguments.load_seconds)))
        thread.start()
        begun = time.perf_counter()
        job, started, rates, cancel_seconds = None, 0.0, [], None
        while validates and thread.is_alive() and cancel_seconds is None:
            if job is None:
                job, started = self.validation(), time.perf_counter()
            time.sleep(0.2)
            if self.validated(job):
                rates.append(self._arguments.rows / (time.perf_counter() - started))
                job = None
            elif time.perf_counter() - begun > _VALIDATING_SHARE * self._arguments.load_seconds and self._processes():
                cancel_seconds = self._cancelled(job)
        thread.join()
        if not loads:
            raise RuntimeError("the load has failed")
        if validates and cancel_seconds is None:
            raise RuntimeError("there was no validation to cancel at the end of the phase: make it longer")
        done = loads[0].completed
        return {
            "validates": validates,
            "outcomes": done,
            "failed": len(loads[0].outcomes) - len(done),
            "requests": len(done),
            **latencies(done),
            **throughput(done),
            "rows_per_s": rates,
            "cancel_seconds": cancel_seconds,
        }

    def _cancelled(self, job: str) -> float:
        """Seconds until the job is cancelled and its process is gone."""
        started = time.perf_counter()
        self._server.openai.fine_tuning.jobs.cancel(job)
        while self._processes():
            time.sleep(0.01)
        return time.perf_counter() - started

    def _processes(self) -> list[int]:
        """Those that tokenise, each a fork of the process that does nothing but fork."""
        alike = {}
        for process in psutil.Process(self._server.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                if any("forks_main" in part for part in process.cmdline()):
                    alike[process.pid] = process.ppid()
        return [process for process, parent in alike.items() if parent in alike]


def measure(bench: Benchmark, pairs: int) -> dict[str, Any]:
    bench.load("warm up", 5)
    alone = bench.alone()
    print(f"{bench.file_bytes / 1e6:.1f} MB; alone {alone:.0f} rows/s", flush=True)
    phases = []
    for pair in range(pairs):
        for validates in (False, True) if pair % 2 == 0 else (True, False):
            phases.append(bench.phase(f"phase {pair}", validates))
            one = phases[-1]
            print(
                f"{'validation' if validates else 'without   '} {one['requests']} requests, {one['failed']} failed, "
                f"tpot {1000 * one['tpot_p50']:.1f}/{1000 * one['tpot_p99']:.1f} ms (p50/99), ttft "
                f"{1000 * one['ttft_p99']:.0f} ms (p99), "
                f"{one['output_tokens_per_s']:.0f} tokens/s, rows/s {[round(rate) for rate in one['rows_per_s']]}, "
                f"cancel {one['cancel_seconds']}",
                flush=True,
            )
    off, on = ([phase for phase in phases if phase["validates"] == validates] for validates in (False, True))
    draws = np.random.default_rng(SEED).integers(pairs, size=(RESAMPLES, pairs))
    resampled = [ratio([off[i] for i in drawn], [on[i] for i in drawn]) for drawn in draws]
    return {
        "file_bytes": bench.file_bytes,
        "off": pooled(off),
        "on": pooled(on),
        "tpot_p99_ratio": ratio(off, on),
        "tpot_p99_interval": np.percentile(resampled, (5, 95)).tolist(),
        "rows_per_s_alone": alone,
        "rows_per_s_beside": [rate for phase in on for rate in phase["rows_per_s"]],
        "cancel_seconds": [phase["cancel_seconds"] for phase in on],
    }


def ratio(off: Sequence[dict[str, Any]], on: Sequence[dict[str, Any]]) -> float:
    """Of the p99 of the time per output token, with validation over without it."""
    values = [
        latencies([outcome for phase in phases for outcome in phase["outcomes"]])["tpot_p99"] for phases in (on, off)
    ]
    return values[0] / values[1]


def pooled(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    outcomes = [outcome for phase in phases for outcome in phase["outcomes"]]
    tokens = sum(phase["output_tokens_per_s"] for phase in phases) / len(phases)
    return {
        "requests": len(outcomes),
        "failed": sum(phase["failed"] for phase in phases),
        **latencies(outcomes),
        "output_tokens_per_s": tokens,
    }


def show(row: dict[str, Any]) -> None:
    low, high = row["tpot_p99_interval"]
    print(
        f"{verdict(row['tpot_p99_ratio'], 'tpot_p99_ratio')}  p99 time per output token {row['tpot_p99_ratio']:.2f}x "
        f"(90 % interval {low:.2f} to {high:.2f})"
    )
    print(
        f"{verdict(max(row['cancel_seconds']), 'cancel_seconds')}  cancelled within {max(row['cancel_seconds']):.2f} s"
    )


def verdict(value: float, name: str) -> str:
    return "pass" if value <= TARGETS[name] else "FAIL"


if __name__ == "__main__":
    main()
