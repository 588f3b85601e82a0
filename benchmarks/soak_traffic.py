"""Mixed traffic for the soak: actors, each a thread with a seed of its own, and a tally of what the server answered."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from server import Server

MOST_ACTIONS = 100_000  # of one actor
_JOB_SECONDS = (5, 40)
_REFUSED = (200, 400, 404, 409)  # what a request that comes at the wrong moment may get
_BASE_WORDS = " the movie staff service plot is was truly hardly great terrible food room and or but it".split()


class Tally:
    """Answers by action and status, and those that should not have been."""

    def __init__(self):
        self._lock = threading.Lock()
        self.answers: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def add(self, action: str, status: int | str) -> None:
        with self._lock:
            self.answers[f"{action} {status}"] += 1

    def add_unexpected(self, action: str, what: str) -> None:
        with self._lock:
            self.answers[f"{action} unexpected"] += 1
            if len(self.unexpected) < 100:
                self.unexpected.append(f"{time.strftime('%H:%M:%S')} {action}: {what[:500]}")


class Actor(threading.Thread):
    """Does one thing after the other until it is told to stop."""

    def __init__(
        self,
        name: str,
        server: Server,
        tally: Tally,
        models: "Models",
        rows: Sequence[dict[str, Any]],
        stop: threading.Event,
    ):
        super().__init__(name=name, daemon=True)
        self.draw = random.Random(name)
        self.server = server
        self.tally = tally
        self.models = models
        self.rows = rows
        self.stop = stop
        self.http = httpx.Client(base_url=server.url, timeout=180)

    def run(self) -> None:
        for _ in range(MOST_ACTIONS):
            if self.stop.is_set():
                return
            try:
                self.act()
            except Exception as error:
                self.tally.add_unexpected(self.name, repr(error))
                self.stop.wait(1)

    def act(self) -> None:
        raise NotImplementedError

    def rest(self, most: float) -> None:
        self.stop.wait(self.draw.uniform(0, most))

    def call(
        self, action: str, method: str, path: str, allowed: Sequence[int] = (200,), **arguments: Any
    ) -> httpx.Response:
        response = self.http.request(method, path, **arguments)
        self.tally.add(action, response.status_code)
        if response.status_code not in allowed:
            self.tally.add_unexpected(action, f"{response.status_code} {response.text}")
        return response

    def upload(self, content: bytes) -> str:
        """The file's id."""
        files, data = {"file": ("rows.jsonl", content)}, {"purpose": "fine-tune"}
        return self.call("upload", "POST", "/v1/files", files=files, data=data).json()["id"]

    def one_of(self, actions: Sequence[tuple[int, Callable[[], Any]]]) -> Any:
        """Do one of the actions, which are given with their weights."""
        weights, functions = zip(*actions)
        return self.draw.choices(functions, weights)[0]()

    def text(self) -> str:
        return " ".join(self.draw.choices(_BASE_WORDS, k=self.draw.randint(4, 150)))


class Models:
    """Names of fine-tuned models that are being served, and may be gone by the time that one is asked."""

    def __init__(self):
        self._lock = threading.Lock()
        self._names: list[str] = []

    def add(self, name: str) -> None:
        with self._lock:
            if name not in self._names:
                self._names.append(name)

    def discard(self, job_names: Sequence[str]) -> None:
        with self._lock:
            self._names = [name for name in self._names if name not in job_names]

    def some(self, draw: random.Random) -> str | None:
        with self._lock:
            return draw.choice(self._names) if self._names else None


class ServingActor(Actor):
    """Asks the base model and the adapters. An answer may be cut short by /pause_generation in its mode "abort"."""

    _ALLOWED = (200, 400, 503)

    def act(self) -> None:
        self.one_of([(4, self._complete), (3, self._chat), (4, self._stream), (3, self._leave), (4, self._ask_adapter)])
        self.rest(0.3)

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": self.server.model,
            "max_tokens": self.draw.randint(1, 48),
            "temperature": self.draw.choice((0, 1)),
            **fields,
        }

    def _complete(self) -> None:
        body = self._body(prompt=self.text(), n=self.draw.choice((1, 2, 8)))
        self.call("completion", "POST", "/v1/completions", self._ALLOWED, json=body)

    def _chat(self) -> None:
        messages = [{"role": "user", "content": self.text()}]
        self.call("chat", "POST", "/v1/chat/completions", self._ALLOWED, json=self._body(messages=messages))

    def _stream(self) -> None:
        self._read_stream("stream", self.server.model, 10_000)

    def _leave(self) -> None:
        """The client goes away in the middle of its answer."""
        self._read_stream("leave", self.models.some(self.draw) or self.server.model, self.draw.randint(0, 10))

    def _ask_adapter(self) -> None:
        model = self.models.some(self.draw)
        if model is None:
            return
        body = self._body(model=model, prompt=self.draw.choice(self.rows)["prompt"])
        self.call("adapter", "POST", "/v1/completions", (*self._ALLOWED, 404), json=body)
        self.call("model", "GET", f"/v1/models/{model}", (200, 404))

    def _read_stream(self, action: str, model: str, lines: int) -> None:
        body = self._body(model=model, prompt=self.text(), stream=True)
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            self.tally.add(action, response.status_code)
            if response.status_code not in (*self._ALLOWED, 404):
                self.tally.add_unexpected(action, str(response.status_code))
            for number, _ in enumerate(response.iter_lines()):
                if number >= lines:
                    return


class JobActor(Actor):
    """One job after the other, each from its files to the end of its model."""

    def act(self) -> None:
        train, dev = (self._upload(self.draw.sample(self.rows, count)) for count in (self.draw.randint(16, 200), 16))
        self._directions = self.draw.choice((1, 2, 8))
        method = {"type": "supervised", "supervised": {"hyperparameters": self._hyperparameters()}}
        body = {"model": self.server.model, "training_file": train, "validation_file": dev, "seed": 1, "method": method}
        self._job = self.call("create job", "POST", "/v1/fine_tuning/jobs", json=body).json()["id"]
        self._route = f"/v1/fine_tuning/jobs/{self._job}"
        self._names: list[str] = []
        try:
            self._live()
        finally:
            self._clean_up(train, dev)

    def _hyperparameters(self) -> dict[str, Any]:
        tuning = self.draw.choice(("alora", "alora", "lora"))
        return {
            "tuning": tuning,
            "max_steps": self.draw.randint(5, 200 if tuning == "alora" else 30),
            "num_perturbations": self._directions,
            "scale_by_loss_std": self._directions > 1,
            "estimator": "leave_one_out" if self._directions > 2 else "two_sided",
            "r": self.draw.choice((4, 8)),
            "save_steps": 40,
            "eval_steps": 20,
            "learning_rate": 1e-4,
            **({"invocation": " It was"} if tuning == "alora" else {}),
        }

    def _live(self) -> None:
        """Until the job has ended and been used a little, or its time is up."""
        deadline = time.monotonic() + self.draw.uniform(*_JOB_SECONDS)
        operations = self.draw.randint(0, 12)
        while time.monotonic() < deadline and not self.stop.is_set():
            status = self.call("retrieve job", "GET", self._route).json()["status"]
            if status in ("failed", "cancelled"):
                self.tally.add_unexpected(
                    "job", f"{self._job} is {status}: {self.call('retrieve job', 'GET', self._route).text}"
                )
                return
            if status == "succeeded":
                if operations == 0:
                    return
                operations -= 1
                self._use()
            elif status == "paused":
                self.one_of(
                    [(3, self._resume), (2, self._evaluate), (2, self._update), (1, self._append), (1, self._publish)]
                )
            else:
                self.one_of(
                    [(2, self._pause), (2, self._append), (2, self._publish), (3, self._read), (1, self._evaluate)]
                )
            self.rest(1.0)

    def _use(self) -> None:
        self.one_of(
            [(2, self._evaluate), (2, self._update), (2, self._publish), (2, self._publish_checkpoint), (2, self._read)]
        )

    def _pause(self) -> None:
        self._change("pause")

    def _resume(self) -> None:
        self._change("resume")

    def _change(self, verb: str) -> None:
        self.call(f"{verb} job", "POST", f"{self._route}/{verb}", _REFUSED)

    def _append(self) -> None:
        self.call(
            "append",
            "POST",
            f"/mezo/jobs/{self._job}/examples",
            _REFUSED,
            json={"rows": self.draw.sample(self.rows, 3)},
        )

    def _publish(self, checkpoint: str | None = None) -> None:
        response = self.call(
            "publish", "POST", f"/mezo/jobs/{self._job}/publish", _REFUSED, json={"checkpoint": checkpoint}
        )
        if response.status_code == 200:
            self._names.append(response.json()["model"])
            self.models.add(self._names[-1])

    def _publish_checkpoint(self) -> None:
        checkpoints = self.call("checkpoints", "GET", f"{self._route}/checkpoints").json()["data"]
        if checkpoints:
            self._publish(self.draw.choice(checkpoints)["id"])

    def _evaluate(self) -> None:
        body = {"rows": self.draw.sample(self.rows, 4), "zo_random_seed": self.draw.getrandbits(64)}
        self.call("evaluate", "POST", f"/mezo/jobs/{self._job}/evaluate", _REFUSED, json=body)

    def _update(self) -> None:
        body = {
            "zo_random_seed": self.draw.getrandbits(64),
            "projected_grad": [0.5] * self._directions,
            "learning_rate": 1e-4,
        }
        self.call("update", "POST", f"/mezo/jobs/{self._job}/update", _REFUSED, json=body)

    def _read(self) -> None:
        self.call("events", "GET", f"{self._route}/events", params={"limit": self.draw.randint(1, 100)})
        self.call("metrics", "GET", f"/mezo/jobs/{self._job}/metrics")
        self.call("list jobs", "GET", "/v1/fine_tuning/jobs", params={"limit": 5})

    def _upload(self, rows: Sequence[dict[str, Any]]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return self.upload(content)

    def _clean_up(self, *files: str) -> None:
        """Whatever a job leaves behind is removed, so that nothing may grow with their number."""
        self._change("cancel")
        job = self.call("retrieve job", "GET", self._route).json()
        names = {*self._names, *([job["fine_tuned_model"]] if job["fine_tuned_model"] else [])}
        if self.draw.random() < 0.5 and job["fine_tuned_model"]:
            self.models.add(job["fine_tuned_model"])
            self.rest(5)
        self.models.discard(list(names))
        for name in sorted(names, key=len):  # a model takes its checkpoints along
            self.call("delete model", "DELETE", f"/v1/models/{name}", _REFUSED)
        for file in files:
            self.call("delete file", "DELETE", f"/v1/files/{file}", _REFUSED)


class FileActor(Actor):
    """Uploads, of which some break off."""

    def act(self) -> None:
        self.one_of([(3, self._whole), (2, self._broken)])
        self.rest(4)

    def _whole(self) -> None:
        content = json.dumps(self.draw.choice(self.rows)).encode() * self.draw.randint(1, 5000)
        file = self.upload(content)
        self.call("file content", "GET", f"/v1/files/{file}/content")
        self.call("list files", "GET", "/v1/files")
        self.call("delete file", "DELETE", f"/v1/files/{file}")

    def _broken(self) -> None:
        url = httpx.URL(self.server.url)
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {url.host}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="gone.jsonl"\r\n\r\n'
        )
        with socket.create_connection((url.host, url.port), timeout=10) as connection:
            connection.sendall(head.encode() + b"x" * self.draw.randint(0, 300_000))
        self.tally.add("upload", "broken off")


class AdminActor(Actor):
    """What an operator does. Generation is always let go on."""

    def act(self) -> None:
        self.one_of([(4, self._flush), (2, self._pause), (3, self._look)])
        self.rest(6)

    def _flush(self) -> None:
        self.call("flush", "POST", "/flush_cache", (200, 400))

    def _pause(self) -> None:
        mode = self.draw.choice(("in_place", "retract", "abort"))
        try:
            self.call(f"pause {mode}", "POST", "/pause_generation", json={"mode": mode})
            if mode == "retract":
                self._flush()
            self.rest(1)
        finally:
            self.call("continue", "POST", "/continue_generation", json={})

    def _look(self) -> None:
        for path in ("/health", "/v1/models", "/mezo/", "/mezo/status", "/metrics", "/server_info"):
            self.call(path, "GET", path)


def actors(*arguments: Any) -> list[Actor]:
    kinds = [(ServingActor, 3), (JobActor, 2), (FileActor, 1), (AdminActor, 1)]
    return [kind(f"{kind.__name__} {number}", *arguments) for kind, count in kinds for number in range(count)]
