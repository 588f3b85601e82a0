"""Training inside SGLang's scheduler: one bounded piece before a batch is chosen, wherever the pacer allows one.

Every tensor-parallel rank runs the same pieces at the same iterations: what depends on clocks or files is decided by
the leader and shared.
"""

import itertools
import logging
import threading
import time
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import BaseModelError, CapacityError, ConfigError, MezoError
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine import lora_capacity
from sglang.srt.mezo.engine.handle import EngineHandle, require_pool
from sglang.srt.mezo.engine.prefix_needs import why_no_prefixes
from sglang.srt.mezo.engine.streams import forward_stream
from sglang.srt.mezo.service.scheduler.calibrate import calibrate
from sglang.srt.mezo.service.scheduler.job import HeldJob, Job, TrainingJob, make_job
from sglang.srt.mezo.service.scheduler.metrics import TrainingMetrics
from sglang.srt.mezo.service.scheduler.pacing import Pacer
from sglang.srt.mezo.service.scheduler.stopwatch import Stopwatch
from sglang.srt.mezo.service.store.disk import disk_full
from sglang.srt.mezo.service.wire import events, messages
from sglang.srt.mezo.service.wire.messages import MezoEvent, MezoReqInput, MezoReqOutput
from sglang.srt.mezo.service.wire.packed import unpack
from sglang.srt.mezo.service.wire.settings import ServiceSettings, allowed_rewards
from sglang.srt.mezo.service.wire.upstream import HEALTH_CHECK_RID_PREFIX, get_observability
from sglang.srt.mezo.training.rewards import Writer

if TYPE_CHECKING:
    from sglang.srt.mezo.service.wire.upstream import Req, Scheduler

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Job)

_LOW_WATER = 0.2  # share of the KV pool that must be free or evictable, or kept prefixes are given up
_CAPACITY_PAUSE = 0.5  # seconds until the next try where requests left no room for a piece


class MezoRunner:
    """Takes commands about one job at a time and advances it."""

    def __init__(self, scheduler: "Scheduler", settings: ServiceSettings):
        self._scheduler = scheduler
        self._settings = settings
        self._handle = EngineHandle.from_scheduler(scheduler)
        self._pacer = Pacer(settings.share)
        self._metrics = TrainingMetrics() if self._handle.is_leader and _metrics_enabled() else None
        self._loaded: dict[tuple[str, str], list[Example]] = {}
        self._job: TrainingJob | HeldJob | None = None
        self._retry_at = 0.0
        self._failed_alone: tuple[str, int] | None = None
        self._description: dict[str, Any] | None = None
        self._base_model = self._handle.base_model
        self._handlers = {
            messages.Describe: self._describe,
            messages.LoadExamples: self._load_examples,
            messages.StartJob: self._start,
            messages.HoldJob: self._start,
            messages.StopJob: self._stop,
            messages.AppendExamples: self._append,
            messages.SaveAdapter: self._save,
            messages.EvaluatePerturbed: self._evaluate,
            messages.ApplyUpdate: self._update,
        }

    @property
    def has_work(self) -> bool:
        return self._job is not None and self._job.has_work

    def handle(self, request: MezoReqInput) -> MezoReqOutput:
        """Carry out a command; a refusal is an answer, never an exception in the scheduler's loop."""
        try:
            return MezoReqOutput(success=True, result=self._handlers[type(request.command)](request.command) or {})
        except MezoError as error:
            return MezoReqOutput(success=False, message=str(error), param=getattr(error, "field", None))
        except Exception as error:
            if (full := disk_full(error)) is not None:
                logger.error("a training command failed: %s: %s", type(request.command).__name__, full)
                return MezoReqOutput(success=False, message=full.message, code=full.code)
            logger.exception("a training command failed: %s", type(request.command).__name__)
            return MezoReqOutput(success=False, message=f"{type(error).__name__}: {error}")

    def tick(self) -> None:
        """Run one piece of the job, if there is one and it may run now."""
        self._look_at_the_base_model()
        if self._has_requests():
            self._pacer.saw_requests()
        job = self._job
        if job is None or not job.has_work or self._scheduler.weight_updater.offload_tags:
            return
        self._give_way(job)
        if not job.learner.points.claimed and not self._claim(job):
            return
        running, waiting = self._load()
        max_tokens = self._handle.broadcast(self._max_tokens(running, waiting))
        if not max_tokens:
            return
        with forward_stream(self._scheduler), Stopwatch(self._handle.device) as watch:
            self._advance(job, max_tokens)
        self._pacer.ran(watch.seconds, running)
        if self._metrics is not None:
            self._metrics.piece(watch.seconds, self._pacer)

    def _look_at_the_base_model(self) -> None:
        """What has been trained on earlier weights does not go on with others."""
        known, now = self._base_model, self._handle.base_model
        if now == known:
            return
        self._base_model = now
        self._emit(events.BaseModelReplaced(fingerprint=now["fingerprint"]))
        if self._job is not None:
            self._fail(self._job, BaseModelError(now["name"], known["name"]))

    def on_flush(self) -> None:
        """The radix tree has been emptied: its locks and KV are gone."""
        if self._job is not None:
            self._job.restart_work()

    # --- commands -----------------------------------------------------------------------------------------------------

    def _describe(self, command: messages.Describe | None = None) -> dict[str, Any]:
        if self._description is not None:
            return self._description
        with forward_stream(self._scheduler):
            found = calibrate(self._handle, self._settings, why_no_prefixes(self._scheduler))
            description = self._description = self._handle.broadcast(found)
        # What writes adapters takes a while to import: neither the start nor, at the first adapter, a request waits
        # for it.
        threading.Thread(target=import_module, args=("peft",), daemon=True).start()
        return description

    def _load_examples(self, command: messages.LoadExamples) -> None:
        self._loaded.setdefault((command.job_id, command.split), []).extend(unpack(command.examples))

    def _start(self, command: messages.StartJob | messages.HoldJob) -> None:
        train, evaluation = (self._loaded.pop((command.job_id, split), []) for split in ("train", "eval"))
        self._loaded.clear()
        if self._job is not None:
            raise ConfigError("job", command.job_id, f"one job at a time, and {self._job.job_id} has the engine")
        kept_tokens = int(self._settings.kv_share * self._handle.kv_capacity)
        with forward_stream(self._scheduler):
            self._job = make_job(
                self._handle, command, train, evaluation, self._emit, kept_tokens, self._writer(command.config)
            )

    def _writer(self, config: MezoConfig) -> Writer | None:
        """What writes and grades completions where the job trains by those; of its reward it has said the name."""
        generation, tokenizer = config.generation, self._scheduler.tokenizer
        if generation is None:
            return None
        if tokenizer is None:
            raise ConfigError("objective", config.objective, "one of given texts, as the server has no tokenizer")
        if generation.reward is not None:
            known = self._settings.reward_functions
            if generation.reward not in known:
                raise ConfigError("reward", generation.reward, allowed_rewards(known))
            generation = replace(generation, reward=known[generation.reward])
        return Writer.of(generation, tokenizer)

    def _stop(self, command: messages.StopJob) -> dict[str, int]:
        self._loaded.clear()  # of a job that is stopped before it has started
        job = self._job
        if job is None or job.job_id != command.job_id:
            return {}
        step = job.learner.global_step
        self._end(job)
        return {"step": step}

    def _append(self, command: messages.AppendExamples) -> dict[str, int]:
        job = self._require(command.job_id, TrainingJob)
        return {"step": job.extend(unpack(command.examples))}

    def _save(self, command: messages.SaveAdapter) -> dict[str, int]:
        return {"step": self._require(command.job_id, Job).save(command.directory)}

    def _evaluate(self, command: messages.EvaluatePerturbed) -> None:
        job = self._require(command.job_id, HeldJob)
        job.evaluate(command.operation, unpack(command.examples), command.zo_random_seed, command.zo_eps)

    def _update(self, command: messages.ApplyUpdate) -> dict[str, int]:
        job = self._require(command.job_id, HeldJob)
        return {"step": job.update(command.zo_random_seed, command.projected_grad, command.learning_rate)}

    def _require(self, job_id: str, kind: type[Kind]) -> Kind:
        job = self._job
        if job is None or job.job_id != job_id:
            raise ConfigError("job", job_id, f"the job that has the engine ({job.job_id if job else 'none has'})")
        if not isinstance(job, kind):
            raise ConfigError("job", job_id, f"one that {'trains' if kind is TrainingJob else 'is held'}")
        return job

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _claim(self, job: Job) -> bool:
        """Take the job's slots once the adapters of requests in flight leave the room, which new ones wait for; its
        places in the KV pool while requests leave them."""
        points, manager = job.learner.points, self._handle.lora_manager
        try:
            require_pool(self._handle, points.slots)
        except CapacityError as error:  # of adapters that have been pinned since; nobody leaves for those
            self._fail(job, error)
            return False
        if points.tokens and any(self._load()) and not self._is_roomy(points.tokens):
            return False
        if not lora_capacity.leave_room(manager, {req.lora_id for req in self._batched()}, points.slots):
            lora_capacity.reserve(points.slots)
            return False
        lora_capacity.reserve(0)
        try:
            with forward_stream(self._scheduler):
                points.claim()
        except Exception as error:
            if not isinstance(error, CapacityError) or not any(self._load()):
                self._fail(job, error)
            return False
        return True

    def _load(self) -> tuple[int, int]:
        """Requests in the batch, and requests that wait to be admitted."""
        return len(self._batched()), len(self._scheduler.waiting_queue) + len(self._scheduler.grammar_manager)

    def _batched(self) -> list["Req"]:
        """Requests that have their place; after a prefill they are in the last batch only, later in the running one,
        or both."""
        last, running = self._scheduler.last_batch, self._scheduler.running_batch
        return [*running.reqs, *(last.reqs if last is not None and last is not running else ())]

    def _has_requests(self) -> bool:
        """Whether anybody is served; probes of the server's health are nobody, and come all the time."""
        requests = itertools.chain(self._batched(), self._scheduler.waiting_queue)
        return len(self._scheduler.grammar_manager) > 0 or any(
            not req.rid.startswith(HEALTH_CHECK_RID_PREFIX) for req in requests
        )

    def _max_tokens(self, running: int, waiting: int) -> int:
        """Tokens that the next piece may run through the model; 0 where there may be none now."""
        if time.monotonic() < self._retry_at or not self._pacer.allows(running, waiting):
            return 0
        return self._describe()["idle_step_tokens" if self._pacer.quiet else "micro_step_tokens"]

    def _give_way(self, job: Job) -> None:
        """Locks on kept prefixes are the first thing to go where requests need the room, and then what lies in the KV
        pool, with the step in progress."""
        prefixes = job.learner.scorer.base_prefixes
        if self._is_roomy():
            return
        if prefixes.kept_tokens:
            prefixes.release()
        if job.learner.held_tokens and any(self._load()):
            job.restart_work()
            job.learner.release_places()
            self._retry_at = time.monotonic() + _CAPACITY_PAUSE

    def _is_roomy(self, less: int = 0) -> bool:
        """Whether the KV pool has room enough for requests, and for each that waits, with so many tokens less than
        now."""
        waiting: list[Any] = self._scheduler.waiting_queue
        wanted = (len(req.origin_input_ids) + req.sampling_params.max_new_tokens for req in waiting)
        enough = max(_LOW_WATER * self._handle.kv_capacity, *wanted, 0)
        return self._handle.free_kv_tokens - less >= enough

    def _advance(self, job: Job, max_tokens: int) -> None:
        try:
            job.advance(max_tokens)
        except CapacityError as error:
            self._make_room(job, error)
        except Exception as error:
            self._fail(job, error)
        else:
            if self._metrics is not None:
                self._metrics.progress(job)
            if job.done:
                self._end(job)

    def _make_room(self, job: Job, error: CapacityError) -> None:
        """Begin the step anew once requests have made room; where there are none, without kept prefixes, and only
        once."""
        attempt = (job.job_id, job.learner.global_step)
        idle = not any(self._load())
        if idle and self._failed_alone == attempt:
            self._fail(job, error)
            return
        if idle:
            self._failed_alone = attempt
        job.learner.scorer.base_prefixes.release()
        self._retry_at = time.monotonic() + _CAPACITY_PAUSE
        job.restart_work()

    def _fail(self, job: Job, error: Exception) -> None:
        full = disk_full(error)
        if full is None and not isinstance(error, MezoError):
            logger.error("job %s failed", job.job_id, exc_info=error)
        self._end(job)
        message, code = (
            (full.message, full.code) if full else (str(error) or type(error).__name__, type(error).__name__)
        )
        job.tell(events.Failed, message=message, code=code)

    def _end(self, job: Job) -> None:
        self._job = None
        lora_capacity.reserve(0)
        try:
            job.stop()
        except Exception as error:  # of the job's files: requests go on
            full = disk_full(error)
            logger.error("job %s did not end cleanly: %s", job.job_id, full or error, exc_info=full is None)
        if self._metrics is not None:
            self._metrics.ended()

    def _emit(self, event: events.AnyEvent) -> None:
        if self._handle.is_leader:
            self._scheduler.ipc_channels.send_to_tokenizer.send_output(MezoEvent(event=event))


def _metrics_enabled() -> bool:
    return get_observability().enable_metrics
