"""A real server in processes of its own, and the official client for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients import http_client, openai_client

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "assets" / "opt-reviews"
REVIEWS = ROOT / "examples" / "assets" / "reviews"

_START_SECONDS = 600


class LiveServer:
    """``sglang-mezo serve`` on the embedded model in float32.

    Args:
        directory: of --mezo-dir; a server that is started again on it goes on where the last one ended.
        flags: further flags of the server.
        key: API key that the client sends, where the server asks for one.
    """

    def __init__(self, directory: Path, *flags: str, key: str = "none", environment: dict[str, str] | None = None):
        self.directory = directory
        self.log = directory.with_name(f"{directory.name}.log")
        self._flags = flags
        self._key = key
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the server answers."""
        self.port = free_port()
        command = [
            Path(sys.executable).with_name("sglang-mezo"),
            "serve",
            "--model-path",
            str(MODEL),
            "--served-model-name",
            "reviews-model",
            "--dtype",
            "float32",
            "--port",
            str(self.port),
            "--mezo-dir",
            str(self.directory),
            "--max-total-tokens",
            "20000",
            *self._flags,
        ]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                cwd=self.directory.parent,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = http_client(self.url, headers={"Authorization": f"Bearer {self._key}"}, timeout=300)
        self.client = openai_client(self.url, self._key)
        self.until(self._is_up, _START_SECONDS)

    def stop(self) -> None:
        """Ask to end, then make sure of it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL for every process of the server at once."""
        self.http.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], seconds: float = 600, every: float = 0.2) -> Any:
        """What ``condition`` returns once it is true; the end of the server or of the time is an error."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log_text()[-5000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s; the server says:\n{self.log_text()[-5000:]}")
            time.sleep(every)
        return value

    def _is_up(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200 and self.http.get("/mezo/status").status_code != 503
        except httpx.TransportError:
            return False

    # --- jobs --------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        return "reviews-model"

    def upload(self, rows: list[dict], name: str = "rows.jsonl") -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return self.client.files.create(file=(name, content), purpose="fine-tune").id

    def create_job(
        self,
        training_file: str,
        validation_file: str | None = None,
        suffix: str | None = None,
        seed: int = 42,
        model: str | None = None,
        **hyperparameters,
    ):
        fields: dict[str, Any] = {"validation_file": validation_file, "suffix": suffix}
        return self.client.fine_tuning.jobs.create(
            model=model or self.model,
            training_file=training_file,
            seed=seed,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            **{name: value for name, value in fields.items() if value is not None},
        )

    def job(self, job_id: str):
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def wait_for(self, job_id: str, *statuses: str, seconds: float = 600):
        """The job once it has one of the statuses; another end is an error."""

        def reached():
            job = self.job(job_id)
            if job.status not in statuses and job.status in ("succeeded", "failed", "cancelled"):
                raise AssertionError(f"{job_id} ended as {job.status}: {job.error}")
            return job if job.status in statuses else None

        return self.until(reached, seconds)

    def wait_for_step(self, job_id: str, step: int, seconds: float = 600) -> None:
        self.until(lambda: self.last_step(job_id) >= step, seconds)

    def last_step(self, job_id: str) -> int:
        """The last step that the server has told of."""
        events = self.client.fine_tuning.jobs.list_events(job_id, limit=20).data
        return max((event.data["step"] for event in events if event.type == "metrics"), default=0)

    def run_directory(self, job_id: str) -> Path:
        return self.directory / "jobs" / job_id / "run"


def reviews(split: str, count: int) -> list[dict]:
    """Prompt/options rows of the embedded task."""
    with open(REVIEWS / f"{split}.jsonl") as file:
        rows = [json.loads(line) for line in file][:count]
    return [
        {"prompt": f"{row['sentence']} It was", "options": [" terrible", " great"], "label": row["label"]}
        for row in rows
    ]


def prompt_log_probs(server: LiveServer, model: str, prompts: list[str]) -> list[list[float]]:
    """Log-probability of every token of the prompts but the first, as the server gives them."""
    answer = server.client.completions.create(
        model=model, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [choice.logprobs.token_logprobs[1:-1] for choice in choices]


def peft_log_probs(adapter: Path, texts: list[str]) -> list[torch.Tensor]:
    """The same from Transformers with PEFT's adapter."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), adapter).eval()
    found = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            log_probs = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
            found.append(log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0])
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
