"""Streamed requests to a server, as a process of its own beside what it measures: ``run`` starts it.

Open loop: each request is sent at its time whether earlier ones are answered or not, and its latencies count from that
time. Closed loop: so many requests are always in flight, for so many seconds.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp

_REQUEST_SECONDS = 300
_IDLE_SECONDS = 1  # of a connection; the server drops one after 5, perhaps just as a request is sent


@dataclass(frozen=True)
class Request:
    """at: seconds from the start of the load."""

    at: float
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Outcome:
    """Seconds from the start of the load, for sent, first and done. ``error`` is empty where all tokens came."""

    at: float
    sent: float
    first: float
    done: float
    tokens: tuple[int, ...]
    error: str

    @property
    def ttft(self) -> float:
        return self.first - self.at

    @property
    def tpot(self) -> float:
        return (self.done - self.first) / (len(self.tokens) - 1)


@dataclass(frozen=True)
class Load:
    """What a load came to, with Prometheus' text right before and after it, ``seconds`` apart."""

    outcomes: list[Outcome]
    seconds: float
    before: str
    after: str

    @property
    def completed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.error]


def run(url: str, model: str, requests: Sequence[Request], in_flight: int = 0, seconds: float = 0.0) -> Load:
    """Send the requests from another process.

    Args:
        in_flight: 0 for the open loop; else the number of requests in flight for ``seconds``, taken in order, and over
            again.
    """
    plan = {
        "url": url,
        "model": model,
        "requests": list(map(asdict, requests)),
        "in_flight": in_flight,
        "seconds": seconds,
    }
    limit = max(seconds, requests[-1].at) + 2 * _REQUEST_SECONDS
    command = [sys.executable, __file__]
    process = subprocess.run(
        command, input=json.dumps(plan), stdout=subprocess.PIPE, text=True, timeout=limit, check=True
    )
    result = json.loads(process.stdout)
    outcomes = [Outcome(**{**fields, "tokens": tuple(fields["tokens"])}) for fields in result.pop("outcomes")]
    return Load(outcomes, **result)


async def generate(plan: dict) -> dict:
    requests = [Request(**fields) for fields in plan["requests"]]
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
    async with aiohttp.ClientSession(plan["url"], connector=connector, timeout=timeout) as session:
        before = await _metrics(session)
        sender = _Sender(session, plan["model"])
        if plan["in_flight"]:
            outcomes = await sender.closed_loop(requests, plan["in_flight"], plan["seconds"])
        else:
            outcomes = await asyncio.gather(*map(sender.send_at, requests))
        seconds = sender.now()
        return {
            "outcomes": list(map(asdict, outcomes)),
            "seconds": seconds,
            "before": before,
            "after": await _metrics(session),
        }


class _Sender:
    def __init__(self, session: aiohttp.ClientSession, model: str):
        self._session = session
        self._model = model
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def send_at(self, request: Request) -> Outcome:
        await asyncio.sleep(request.at - self.now())
        return await self._send(request, request.at)

    async def closed_loop(self, requests: Sequence[Request], in_flight: int, seconds: float) -> list[Outcome]:
        outcomes, taken = [], 0

        async def work() -> None:
            nonlocal taken
            while self.now() < seconds:
                request = requests[taken % len(requests)]
                taken += 1
                outcomes.append(await self._send(request, self.now()))

        await asyncio.gather(*(work() for _ in range(in_flight)))
        return outcomes

    async def _send(self, request: Request, at: float) -> Outcome:
        """``ignore_eos``: an answer has ``max_tokens`` tokens, whatever they are."""
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        sent = first = self.now()
        tokens: list[int] = []
        error = ""
        try:
            async with self._session.post("/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        error = str(event["error"])
                        break
                    for choice in event["choices"]:
                        if not tokens:
                            first = self.now()
                        tokens += choice["token_ids"]
        except (aiohttp.ClientError, TimeoutError) as exception:
            error = repr(exception)
        if not error and len(tokens) != request.max_tokens:
            error = f"{len(tokens)} tokens for {request.max_tokens}"
        return Outcome(at, sent, first, self.now(), tuple(tokens), error)


async def _metrics(session: aiohttp.ClientSession) -> str:
    async with session.get("/metrics") as response:
        response.raise_for_status()
        return await response.text()


if __name__ == "__main__":
    json.dump(asyncio.run(generate(json.load(sys.stdin))), sys.stdout)
