"""What a request to the service can be answered with instead of a result. The same fields make a job's ``error``."""

from http import HTTPStatus
from typing import Any

from sglang.srt.mezo.core.errors import MezoError, shown


class RequestError(MezoError):
    """A request that cannot be carried out.

    Attributes:
        status: HTTP status.
        message: names the field, the value and what is allowed.
        param: the field at fault, None where there is none.
        code: short name of the reason, for programs.
    """

    def __init__(self, status: int, message: str, param: str | None, code: str):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def to_dict(self) -> dict[str, Any]:
        """The ``error`` of a job."""
        return {"code": self.code, "message": self.message, "param": self.param}


class NotFound(RequestError, LookupError):
    """No such thing in the store. ``what`` is its kind, such as "file"; ``param`` the field that named it."""

    def __init__(self, what: str, id: str, param: str | None = None):
        super().__init__(404, f"no such {what}: {shown(id)}", param, "not_found")
        self.what = what
        self.id = id


class EngineRefused(RequestError):
    """The scheduler did not take a command."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(400, message, param, "engine_refused")


class DiskFull(RequestError):
    """The disk did not take what was to be written: none of it is there, and once there is room it can be asked for
    again."""

    def __init__(self, message: str):
        super().__init__(HTTPStatus.INSUFFICIENT_STORAGE, message, None, "disk_full")


class StoreBusy(RequestError):
    """Another process, such as a backup, has locked the store; nothing has been changed. Ask again in
    ``RETRY_SECONDS``."""

    RETRY_SECONDS = 5

    def __init__(self):
        super().__init__(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "the server's store (mezo.sqlite) is locked by another process: ask again",
            None,
            "store_busy",
        )


class PublishError(RequestError):
    """An adapter could not be loaded for serving; what was served before still is."""

    def __init__(self, message: str):
        super().__init__(503, message, None, "publish_failed")
