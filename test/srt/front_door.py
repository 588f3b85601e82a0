"""A server for hostile requests, and what its answers must be."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bad_input import JOB, supervised
from clients import http_client, openai_client
from live_server import MODEL, LiveServer, reviews


class FrontDoor:
    """The server, and the jobs in every state that a request can find one in."""

    def __init__(self, server: LiveServer):
        self.server = server
        self.admin = openai_client(server.url, "admin-key")
        self.http = http_client(server.url, headers={"Authorization": "Bearer admin-key"}, timeout=300)
        self.answer = self.greedy()
        self.files = [self.upload(reviews("train", 64)), self.upload(reviews("validation", 16))]
        self.done = self.create(*self.files, suffix="done", max_steps=2, save_steps=1).id
        self.deleted = self.create(
            *self.files, suffix="deleted", max_steps=1, target_modules=["k_proj"]
        ).id  # no q beside it, no v
        self.cancelled = self.create(self.files[0], suffix="cancelled", max_steps=10**9).id
        self.paused = self.create(self.files[0], suffix="paused", max_steps=10**9).id
        for job in (self.done, self.deleted):
            server.wait_for(job, "succeeded")
        self.admin.models.delete("reviews-model:deleted")
        server.wait_for_step(self.cancelled, 1)
        self.admin.fine_tuning.jobs.cancel(self.cancelled)
        server.wait_for_step(self.paused, 1)
        self.admin.fine_tuning.jobs.pause(self.paused)
        self.running = self.create(*self.files, suffix="running", max_steps=10**9, eval_steps=10**9).id
        adapter = server.directory / "jobs" / self.done / "adapters" / "v1"
        self.http.post(
            "/load_lora_adapter", json={"lora_name": "foreign", "lora_path": str(adapter)}
        ).raise_for_status()
        server.wait_for_step(self.running, 1)

    def upload(self, rows: list[dict]) -> str:
        return self.put(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def put(self, content: bytes, name: str = "rows.jsonl") -> str:
        return self.admin.files.create(file=(name, content), purpose="fine-tune").id

    def create(
        self, training_file: str, validation_file: str | None = None, suffix: str | None = None, **hyperparameters
    ):
        body = {
            "validation_file": validation_file,
            "suffix": suffix,
            "seed": 1,
            "method": supervised(**JOB | hyperparameters),
        }
        return self.admin.fine_tuning.jobs.create(model=self.server.model, training_file=training_file, extra_body=body)

    def greedy(self) -> str:
        body = {
            "model": self.server.model,
            "prompt": "the plot is",
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = self.server.http.post("/v1/completions", json=body).raise_for_status().json()
        return answer["choices"][0]["text"]

    def path(self, template: str) -> str:
        """A path with the ids of jobs and files in it."""
        jobs = {state: getattr(self, state) for state in ("done", "deleted", "cancelled", "paused", "running")}
        return template.format(file=self.files[0], **jobs)

    def raw(self, head: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Status and body of an answer to bytes that no client would send."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=300) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
            answer = b""
            while received := connection.recv(65536):
                answer += received
        head_of_answer, _, content = answer.partition(b"\r\n\r\n")
        return int(head_of_answer.split()[1]), json.loads(content)

    def stored(self) -> set[str]:
        return {path.name for path in (self.server.directory / "files").iterdir()}


def in_background(folder: Path, *starts: str) -> list[Future]:
    pool = ThreadPoolExecutor(1)
    futures = [pool.submit(start, folder, flags.split()) for flags in starts]
    pool.shutdown(wait=False)
    return futures


def start(folder: Path, flags: list[str]) -> tuple[int, str]:
    """Exit status and output of a server that ends by itself."""
    command = [
        Path(sys.executable).with_name("sglang-mezo"),
        "serve",
        "--model-path",
        MODEL,
        "--max-total-tokens",
        "20000",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return ended.returncode, ended.stdout
