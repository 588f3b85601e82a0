"""Whether this server can go on with what an earlier one has begun: that may have had other flags, or another base model."""

from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.errors import ConfigError, shown
from sglang.srt.mezo.service.errors import RequestError
from sglang.srt.mezo.service.hyperparameters import beyond
from sglang.srt.mezo.service.messages import EngineDescription
from sglang.srt.mezo.service.records import StoredJob

BASE_MODEL_CHANGED = "base_model_changed"
DOES_NOT_FIT = "does_not_fit"


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

    def of_adapter(self, job: StoredJob) -> RequestError | None:
        """In the way of serving its adapter and its checkpoints."""
        return self._reason(job, to_serve=True)

    def _reason(self, job: StoredJob, to_serve: bool) -> RequestError | None:
        engine = self._engine
        if job.base_model not in ("", engine.base_model):
            message = f"it belongs to another base model than {engine.model_path!r} is now, by its configuration or its weights"
            return RequestError(409, message, None, BASE_MODEL_CHANGED)
        try:
            config = MezoConfig(**job.config)
        except ConfigError as error:
            return RequestError(409, str(error), error.field, DOES_NOT_FIT)
        for name, allowed in beyond(engine, config, to_serve):
            return RequestError(409, f"{name}={shown(getattr(config, name))} is not allowed: {allowed}", name, DOES_NOT_FIT)
        return None
