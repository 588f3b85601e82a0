"""Training on a server that nobody else uses against the command line, in turns on one machine.

    python benchmarks/smollm2.py models/smollm2-135m
    python benchmarks/idle_server.py --model models/smollm2-135m --json benchmarks/results/idle_server.json

Both make the same steps of the same rows: a job of a server is resumed and paused, an engine in a process of its own goes on
and waits. What is compared is wall time of a step, on the server with all that lies between two pieces. Each workload is
measured with a server of its own; ``beside`` is a server whose pieces never grow.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server import Server, machine, running_server
from serve_while_train import DATA, data_name, read_sentences
from turns import Operations, Worker

from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.finetune import DataArguments, ModelArguments, open_trainer

NUM_ROWS = 160
SEED = 7
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
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    rows = []
    for workload in arguments.workload:
        rows.append({"workload": workload, **measure(arguments, workload)})
        print("\n".join(table(rows[-1:])), flush=True)
        if arguments.json:
            settings = {"model": arguments.model.name, "steps": arguments.steps, "turns": arguments.turns, "examples": NUM_ROWS}
            arguments.json.write_text(json.dumps({"rows": rows, "settings": settings, "machine": machine()}, indent=2) + "\n")


def measure(arguments: argparse.Namespace, workload: str) -> dict[str, Any]:
    """Seconds of a step, turn after turn."""
    make_row, invocation = WORKLOADS[workload]
    sentences = read_sentences(DATA[data_name(arguments.model)][0] / "train.jsonl")[:NUM_ROWS]
    rows = [make_row(row["sentence"], row["label"]) for row in sentences]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds: dict[str, list[float]] = {"command_line": [], "idle": [], "beside": []}
        offline = Worker(open_offline, str(arguments.model), str(file), invocation, f"{folder}/run")
        with job_on_server(arguments.model, Path(folder) / "idle", rows, invocation, ()) as idle, job_on_server(
            arguments.model, Path(folder) / "beside", rows, invocation, SHORT_FLAGS
        ) as beside:
            for turn in range(arguments.turns):
                for name, run in (("command_line", lambda steps: offline.call("steps", steps)), ("idle", idle.steps), ("beside", beside.steps)):
                    seconds[name].append(run(arguments.steps))
                    print(f"{workload}, turn {turn}, {name}: {seconds[name][-1]:.3f} s a step", flush=True)
            tokens = idle.server.http.get("/mezo/status").json()["engine"]
        offline.stop()
    pieces = {name: tokens[name] for name in ("micro_step_tokens", "idle_step_tokens")}
    return {"step_s": seconds, **pieces, "speed": statistics.median(a / b for a, b in zip(seconds["command_line"], seconds["idle"]))}


def open_offline(model: str, file: str, invocation: str, output_dir: str) -> Operations:
    config = MezoConfig(output_dir=output_dir, invocation=invocation, max_steps=1_000_000, seed=SEED, disable_tqdm=True)
    trainer, _ = open_trainer(ModelArguments(model=model, dtype="float32"), DataArguments(dataset=file, num_dev=0, num_test=0), config)

    def steps(count: int) -> float:
        trainer.train_step(trainer.batch(trainer.global_step))
        started = time.perf_counter()
        for _ in range(count):
            trainer.train_step(trainer.batch(trainer.global_step))
        return (time.perf_counter() - started) / count

    return {"steps": steps}


class ServedJob:
    """A job that trains in its turns only."""

    def __init__(self, server: Server, job_id: str):
        self.server = server
        self._job_id = job_id

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
            time.sleep(0.02)
        return done

    def _done(self) -> int:
        lines = self.server.http.get(f"/mezo/jobs/{self._job_id}/metrics", params={"after": self._seen}).raise_for_status().json()
        self._seen = lines["next"]
        self._step = max([self._step, *(line["step"] for line in lines["data"] if "loss_plus" in line)])
        return self._step

    _seen = _step = 0


@contextmanager
def job_on_server(model: Path, folder: Path, rows: list[dict], invocation: str, flags: tuple[str, ...]) -> Iterator[ServedJob]:
    folder.mkdir()
    with running_server(model, folder, "--dtype", "float32", *flags) as server:
        file = server.upload(rows)
        method = {"type": "supervised", "supervised": {"hyperparameters": {"invocation": invocation, "max_steps": 1_000_000, "logging_steps": 1}}}
        job = server.openai.fine_tuning.jobs.create(model=server.model, training_file=file, seed=SEED, method=method)
        server.wait_for_job(job.id, "running")
        server.http.post(f"/v1/fine_tuning/jobs/{job.id}/pause").raise_for_status()
        yield ServedJob(server, job.id)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| smollm2-135m, 16 examples, 8 directions | command line | idle server | its speed | with short pieces only |", "|---|---|---|---|---|"]
    for row in rows:
        times = {name: f"{1000 * statistics.median(values):.0f} ms" for name, values in row["step_s"].items()}
        speeds = [a / b for a, b in zip(row["step_s"]["command_line"], row["step_s"]["idle"])]
        speed = f"{row['speed']:.0%} ({min(speeds):.0%} to {max(speeds):.0%})"
        lines.append(f"| {row['workload']} | {times['command_line']} | {times['idle']} | {speed} | {times['beside']} |")
    return lines


if __name__ == "__main__":
    main()
