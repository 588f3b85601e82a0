"""The end of a server: whatever still waits for the engine is answered, and nothing keeps the process."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.mezo.plugin import online
from sglang.srt.mezo.service.http.app import Service
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.wire.messages import StopJob
from sglang.srt.mezo.service.wire.settings import ServiceSettings

SECONDS = 10  # a server that does not end within these does not end


class Ending:
    """A web server with the service's middleware, before a scheduler that takes commands and answers none."""

    def __init__(self):
        self.service = Service(ServiceSettings(enabled=True))
        self.service.ready = True
        self.manager = SimpleNamespace(
            mezo_service=self.service,
            gracefully_exit=False,
            server_status=SimpleNamespace(name="Up"),
            rid_to_state={},
            auto_create_handle_loop=lambda: None,
            mezo_control_communicator=FanOutCommunicator(lambda request: None, fan_out=1),
        )
        self.asked = threading.Semaphore(0)
        self.app = FastAPI()
        self.app.add_middleware(self.service.requests.middleware)

        @self.app.get("/health")
        async def health():
            return {}

        @self.app.get("/command")
        async def command():
            self.asked.release()
            return await EngineClient(self.manager).call(StopJob(job_id="a"))

        @self.app.post("/rows")
        async def rows(request: Request):
            self.asked.release()
            return len(await request.body())

        @self.app.get("/stream")
        async def stream():
            async def words():
                yield "one "
                self.asked.release()
                await asyncio.Event().wait()

            return StreamingResponse(words())

    @contextlib.contextmanager
    def serving(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._server = uvicorn.Server(uvicorn.Config(self.app, lifespan="off", log_level="critical", loop="uvloop"))
            thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
            thread.start()
            while not self._server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
            thread.join(SECONDS)
            assert not thread.is_alive(), "it waits for what will never come"

    def _serve(self, listener: socket.socket) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve([listener])

        asyncio.run(serve())

    def end(self) -> None:
        """What happens from SIGTERM to the web server's own end."""

        async def watchdog(manager) -> None:
            assert not manager.rid_to_state, "SGLang would wait five seconds more"
            self._server.should_exit = True

        self.manager.gracefully_exit = True
        asyncio.run_coroutine_threadsafe(online._around_shutdown(watchdog, self.manager), self._loop).result()


def ask(port: int, answers: list, path: str) -> threading.Thread:
    def get() -> None:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=2 * SECONDS)
            answers.append((response.status_code, response.json()["error"]["code"]))
        except httpx.TransportError as error:
            answers.append(type(error))

    thread = threading.Thread(target=get)
    thread.start()
    return thread


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Of the process that runs the tests, which goes on."""
    monkeypatch.setattr(online, "_end_within", lambda seconds: None)


@pytest.mark.parametrize(
    "path, answer",
    [("/command", (503, "shutting_down")), ("/stream", httpx.RemoteProtocolError)],
    ids=["waits", "has begun"],
)
def test_what_waits_for_the_engine_ends_with_it(path, answer):
    ending, answers = Ending(), []
    with ending.serving() as port:
        waiting = [ask(port, answers, path) for _ in range(3)]
        for _ in waiting:
            ending.asked.acquire()
        ending.end()
    for thread in waiting:
        thread.join()
    assert answers == [answer] * 3


def test_rows_that_a_client_has_not_sent_yet_are_not_waited_for():
    ending = Ending()
    with ending.serving() as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /rows HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        ending.asked.acquire()
        ending.end()
        assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")


def test_requests_under_way_are_answered_and_new_ones_refused():
    ending, answers = Ending(), []
    ending.manager.rid_to_state["under way"] = "a completion"
    with ending.serving() as port:
        waiting = ask(port, answers, "/command")
        ending.asked.acquire()
        end = threading.Thread(target=ending.end)
        end.start()
        while httpx.get(f"http://127.0.0.1:{port}/health").status_code != 503:
            time.sleep(0.01)
        response = httpx.get(f"http://127.0.0.1:{port}/command")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert waiting.is_alive() and end.is_alive()
        del ending.manager.rid_to_state["under way"]
        end.join()
    waiting.join()
    assert answers == [(503, "shutting_down")]


def test_a_thread_that_is_at_work_does_not_keep_the_process():
    program = """
import asyncio, concurrent.futures, time
from types import SimpleNamespace
from sglang.srt.mezo.plugin import online

async def gone(manager):
    pass

online._END_SECONDS = 0.2
service = SimpleNamespace(on_engine_end=lambda: None, requests=SimpleNamespace(refuse=lambda: None))
concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 1000)
asyncio.run(online._around_shutdown(gone, SimpleNamespace(gracefully_exit=True, rid_to_state={}, mezo_service=service)))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_an_engine_that_ends_before_training_is_on_ends_the_process(monkeypatch):
    """The start waits for its first answer."""
    ending = Ending()
    ending.service.ready, ending.manager.gracefully_exit = False, True
    ended = []
    monkeypatch.setattr("os._exit", ended.append)

    async def gone(manager) -> None:
        pass

    asyncio.run(online._around_shutdown(gone, ending.manager))
    assert ended == [0]
