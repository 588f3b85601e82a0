"""Whether this server can go on with what an earlier one has begun: that may have had other flags, or another base
model."""

from typing import Any

from sglang.srt.mezo.core.errors import ConfigError, shown
from sglang.srt.mezo.service.jobs.hyperparameters import beyond
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.records import StoredJob

BASE_MODEL_CHANGED = "base_model_changed"
DOES_NOT_FIT = "does_not_fit"

_LIMITS = (
    "base_model",
    "dtype",
    "context_length",
    "kv_capacity",
    "max_lora_rank",
    "max_loras_per_batch",
    "target_modules",
    "no_alora",
    "no_prefixes",
    "rendering",
)


def limits(engine: EngineDescription) -> dict[str, Any]:
    """What of an engine may keep it from going on with a job that another one has begun."""
    return {name: getattr(engine, name) for name in _LIMITS}


class Fit:
    """Its methods return what is in the way, for a job's ``error`` or as an answer (409); None where nothing is.

    Args:
        engine: as it is now; its base model may be replaced.
    """

    def __init__(self, engine: EngineDescription):
        self._engine = engine

    def of_job(self, job: StoredJob) -> RequestError | None:
        """In the way of its training. What depends on the rows shows when they are read."""
        return self._reason(job, to_serve=False)

    def of_failure(self, job: StoredJob, failure: RequestError) -> RequestError | None:
        """In the way of a job that has failed here, where the server that took it had another base model or other
        limits.

        None where they are the same, or the failure is of the numbers, so that it would fail anywhere.
        """
        now = limits(self._engine)
        others = [name for name in _LIMITS if name in job.engine and job.engine[name] != now[name]]
        if not others or failure.code == "DivergedError":
            return None
        if (reason := self.of_job(job)) is not None:
            return reason
        changes = ", ".join(f"{name} is {shown(now[name])} and was {shown(job.engine[name])}" for name in others)
        return RequestError(409, f"{failure.message}; of the server's settings {changes}", failure.param, DOES_NOT_FIT)

    def of_adapter(self, job: StoredJob) -> RequestError | None:
        """In the way of serving its adapter and its checkpoints."""
        return self._reason(job, to_serve=True)

    def _reason(self, job: StoredJob, to_serve: bool) -> RequestError | None:
        engine = self._engine
        if job.engine.get("base_model", engine.base_model) != engine.base_model:
            now = f"than {engine.model_path!r} is now, by its configuration or its weights"
            message = f"it belongs to another base model {now}"
            return RequestError(409, message, None, BASE_MODEL_CHANGED)
        try:
            config = job.settings
        except ConfigError as error:
            return RequestError(409, str(error), error.field, DOES_NOT_FIT)
        for name, allowed in beyond(engine, config, to_serve):
            return RequestError(
                409, f"{name}={shown(getattr(config, name))} is not allowed: {allowed}", name, DOES_NOT_FIT
            )
        return None
