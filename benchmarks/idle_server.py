"""Training on a server that nobody else uses against the command line, in turns on one machine.

    python benchmarks/smollm2.py models/smollm2-135m
    python benchmarks/idle_server.py --model models/smollm2-135m --json benchmarks/results/idle_server.json

Both make the same steps of the same rows: a job of a server is resumed and paused, an engine in a process of its own
goes on and waits. What is compared is wall time of a step once the KV of all prompts is there, on the server with all
that lies between two pieces. For comparison, also on a server whose pieces never grow.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from serve_while_train import DATA, data_name, read_sentences
from server import Server, machine, running_server
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.training.finetune import DataArguments, ModelArguments, open_trainer
from turns import Operations, Worker

NUM_ROWS = 160
EPOCH = NUM_ROWS // MezoConfig.per_device_train_batch_size  # steps
SEED = 7
RESAMPLES = 1000
SHORT_FLAGS = ("--mezo-idle-step-ms", "0")
WAIT_SECONDS = 600


def chat_row(sentence: str, label: int) -> dict[str, Any]:
    question = f"Is this what somebody writes who liked it? {sentence}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ("no", "yes")[label]}]}


def sst2_row(sentence: str, label: int) -> dict[str, Any]:
    return {"prompt": f"{sentence.strip()} It was", "options": [" terrible", " great"], "label": label}


WORKLOADS = {"chat": (chat_row, "<|im_start|>assistant\n"), "sst2": (sst2_row, " It was")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    rows = []
    for workload in arguments.workload:
        rows.append({"workload": workload, **measure(arguments, workload)})
        print("\n".join(table(rows[-1:])), flush=True)
        if arguments.json:
            settings = {
                "model": arguments.model.name,
                "steps": arguments.steps,
                "turns": arguments.turns,
                "examples": NUM_ROWS,
            }
            arguments.json.write_text(
                json.dumps({"rows": rows, "settings": settings, "machine": machine()}, indent=2) + "\n"
            )


def measure(arguments: argparse.Namespace, workload: str) -> dict[str, Any]:
    make_row, invocation = WORKLOADS[workload]
    sentences = read_sentences(DATA[data_name(arguments.model)][0] / "train.jsonl")[:NUM_ROWS]
    rows = [make_row(row["sentence"], row["label"]) for row in sentences]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        offline = Worker(open_offline, str(arguments.model), str(file), invocation, f"{folder}/run")
        offline.call("steps", EPOCH)
        servers = {}
        for name, flags in (("idle", ()), ("short", SHORT_FLAGS)):
            with job_on_server(arguments.model, Path(folder) / name, rows, invocation, flags) as job:
                print(f"{workload}, {name}:", flush=True)
                servers[name] = compare(lambda steps: offline.call("steps", steps), job.steps, arguments)
                tokens = job.server.http.get("/mezo/status").json()["engine"]
                servers[name]["pass_tokens"] = tokens["idle_step_tokens"]
        offline.stop()
    return servers


def compare(
    command_line: Callable[[int], float], server: Callable[[int], float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step, turn after turn: each goes first in every other one."""
    server(EPOCH)
    seconds = {"command_line": [], "server": []}
    for turn in range(arguments.turns):
        runs = [("command_line", command_line), ("server", server)]
        for name, run in runs if turn % 2 == 0 else reversed(runs):
            seconds[name].append(run(arguments.steps))
        print(
            f"turn {turn}: command line {seconds['command_line'][-1]:.3f}, server {seconds['server'][-1]:.3f} s a step",
            flush=True,
        )
    times = np.array([seconds["command_line"], seconds["server"]])
    draws = np.random.default_rng(SEED).integers(arguments.turns, size=(RESAMPLES, arguments.turns))
    return {
        "step_s": seconds,
        "speed": speed(times),
        "speed_interval": np.percentile([speed(times[:, draw]) for draw in draws], (5, 95)).tolist(),
    }


def speed(times: np.ndarray) -> float:
    """Of the second row as a share of the first's; (2, turns) seconds."""
    command_line, idle = np.median(times, axis=1)
    return float(command_line / idle)


def open_offline(model: str, file: str, invocation: str, output_dir: str) -> Operations:
    config = MezoConfig(output_dir=output_dir, invocation=invocation, max_steps=1_000_000, seed=SEED, disable_tqdm=True)
    trainer, _ = open_trainer(
        ModelArguments(model=model, dtype="float32"), DataArguments(dataset=file, num_dev=0, num_test=0), config
    )

    def steps(count: int) -> float:
        drain(trainer.step_passes(trainer.batch(trainer.global_step)))
        started = time.perf_counter()
        for _ in range(count):
            drain(trainer.step_passes(trainer.batch(trainer.global_step)))
        return (time.perf_counter() - started) / count

    return {"steps": steps}


class ServedJob:
    """A job that trains in its turns only. What it has done is read from its folder: to ask the server would take of
    its time."""

    def __init__(self, server: Server, job_id: str, folder: Path):
        self.server = server
        self._job_id = job_id
        self._metrics = folder / "jobs" / job_id / "run" / "metrics.jsonl"

    def steps(self, count: int) -> float:
        """Seconds of a step, after one that is not counted."""
        path = f"/v1/fine_tuning/jobs/{self._job_id}"
        self.server.http.post(f"{path}/resume").raise_for_status()
        first = self._until(self._done() + 2)
        started = time.perf_counter()
        last = self._until(first + count)
        seconds = (time.perf_counter() - started) / (last - first)
        self.server.http.post(f"{path}/pause").raise_for_status()
        return seconds

    def _until(self, step: int) -> int:
        deadline = time.monotonic() + WAIT_SECONDS
        while (done := self._done()) < step:
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} not within {WAIT_SECONDS} s:\n{self.server.log_tail()}")
            time.sleep(0.01)
        return done

    def _done(self) -> int:
        """Steps so far, of which each has a line."""
        lines = self._metrics.read_bytes().splitlines(keepends=True) if self._metrics.is_file() else []
        return max((json.loads(line)["step"] for line in lines[-1:] if line.endswith(b"\n")), default=0)


@contextmanager
def job_on_server(
    model: Path, folder: Path, rows: list[dict], invocation: str, flags: tuple[str, ...]
) -> Iterator[ServedJob]:
    folder.mkdir()
    with running_server(model, folder, "--dtype", "float32", *flags) as server:
        file = server.upload(rows)
        method = {
            "type": "supervised",
            "supervised": {"hyperparameters": {"invocation": invocation, "max_steps": 1_000_000, "logging_steps": 1}},
        }
        job = server.openai.fine_tuning.jobs.create(model=server.model, training_file=file, seed=SEED, method=method)
        server.wait_for_job(job.id, "running")
        server.http.post(f"/v1/fine_tuning/jobs/{job.id}/pause").raise_for_status()
        yield ServedJob(server, job.id, folder / "mezo")


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| smollm2-135m, 16 examples, 8 directions | command line | idle server | its speed | with short pieces only |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{1000 * statistics.median(seconds):.0f} ms" for seconds in row["idle"]["step_s"].values()]
        idle, short = (
            f"{row[name]['speed']:.0%} ({low:.0%} to {high:.0%})"
            for name in ("idle", "short")
            for low, high in [row[name]["speed_interval"]]
        )
        lines.append(f"| {row['workload']} | {times[0]} | {times[1]} | {idle} | {short} |")
    return lines


if __name__ == "__main__":
    main()
