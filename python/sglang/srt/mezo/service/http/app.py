"""The service's parts in the HTTP process, and their life."""

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from sglang.srt.mezo.core.errors import MezoError
from sglang.srt.mezo.service.http.in_flight import RequestsInFlight
from sglang.srt.mezo.service.http.latency import LatencyRecorder
from sglang.srt.mezo.service.http.metrics import JobMetrics
from sglang.srt.mezo.service.jobs.client import EngineClient
from sglang.srt.mezo.service.jobs.forks import Forks
from sglang.srt.mezo.service.jobs.manager import JobManager
from sglang.srt.mezo.service.jobs.threads import ServiceThreads
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.events import AnyEvent
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.settings import ServiceSettings
from sglang.srt.mezo.service.wire.upstream import kill_process_tree

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import TokenizerManager

logger = logging.getLogger(__name__)


class Service:
    """Built with the application, before the engine is up; the parts are there between ``start`` and ``stop``.

    Its methods are called in SGLang's event loop; the manager and whatever changes the store live in ``threads``.
    """

    def __init__(self, settings: ServiceSettings):
        self.settings = settings
        self.ready = False
        self.latency = LatencyRecorder()
        self.requests = RequestsInFlight()
        self.threads = ServiceThreads()
        self._forks = Forks()
        self.client: EngineClient
        self.engine: EngineDescription
        self.store: Store
        self.manager: JobManager

    async def start(self, tokenizer_manager: "TokenizerManager") -> None:
        """Called once the engine answers. Where it fails, the server ends."""
        try:
            await self._start(tokenizer_manager)
        except Exception as error:
            # SGLang would wait minutes for the first answer of an application that does not start, and not say why.
            logger.critical(
                "sglang-mezo refuses to start: %s", error, exc_info=None if isinstance(error, MezoError) else error
            )
            kill_process_tree(os.getpid(), include_parent=False, wait_timeout=None)
            os._exit(1)

    async def _start(self, tokenizer_manager: "TokenizerManager") -> None:
        directory = self.settings.directory
        self._loop = asyncio.get_running_loop()
        self.client = EngineClient(tokenizer_manager)
        self.threads.start()
        self.store = await self.threads.call(Store, directory)
        self._job_metrics = JobMetrics(self.store) if tokenizer_manager.enable_metrics else None
        self.store.listener = self._on_job_change
        await self.threads.call(self._on_job_change)
        self.manager = await self.threads.run(JobManager.start(self.settings, self.store, self.client, self._forks))
        self.engine = self.manager.engine
        self.ready = True
        sizes = self.engine.micro_step_tokens, self.engine.idle_step_tokens
        logger.info(
            "fine-tuning is on: %s, pieces of %d tokens beside requests and of %d while none come", directory, *sizes
        )

    async def stop(self) -> None:
        self.ready = False
        self.store.stop_waiting()
        await self.threads.run(self.manager.stop())
        await self.threads.call(self.store.close)
        await asyncio.to_thread(self.threads.close)
        await asyncio.to_thread(self._forks.close)

    def on_engine_end(self) -> None:
        """The scheduler is gone, and the application is about to stop."""
        if not self.ready:
            logger.info("the server has been stopped before fine-tuning was on")
            os._exit(0)  # the start waits for the scheduler, and so for ever
        self.requests.end()

    def _on_job_change(self) -> None:
        """Called in the service's thread."""
        self._loop.call_soon_threadsafe(self.latency.set_training, "running" in self.store.job_counts())
        if self._job_metrics is not None:
            self._job_metrics.update()

    def on_event(self, event: AnyEvent) -> None:
        """An event from the scheduler."""
        if self.ready:
            self.threads.post(self.manager.on_event, event)
