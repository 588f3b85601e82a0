"""Settings of the training service, from flags or the environment; the same in every process of a server."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from sglang.srt.mezo.core.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One setting: its field in ``ServiceSettings``, its flag, and what the help says."""

    name: str
    kind: type
    help: str

    @property
    def flag(self) -> str:
        return f"--mezo-{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return f"SGLANG_MEZO_{self.name.upper()}"


ENABLE_FLAG = "--enable-mezo"
ENABLE_VARIABLE = "SGLANG_ENABLE_MEZO"

SETTINGS = (
    Setting("dir", str, "Where files, jobs and adapters are kept."),
    Setting("share", float, "Share of the time that training may take while requests run; 0 trains in idle time only."),
    Setting(
        "micro_step_ms",
        float,
        "What one uninterrupted piece of training may take, if that is more than two of the shortest forward passes: "
        "what a new request may wait for it.",
    ),
    Setting(
        "idle_step_ms",
        float,
        "The same while no request has come for ten seconds: what the first one may wait for it. Up to micro_step_ms "
        "pieces never grow.",
    ),
    Setting("kv_share", float, "Share of the KV pool that training may keep locked between steps."),
    Setting("max_file_mb", int, "Largest file that can be uploaded."),
    Setting("on_restart", str, "What becomes of a job that the server's end interrupted: resume or fail."),
)


@dataclass(frozen=True)
class ServiceSettings:
    """Validated on construction; ConfigError names the flag."""

    enabled: bool = False
    dir: str = "mezo"
    share: float = 0.1
    micro_step_ms: float = 25.0
    idle_step_ms: float = 1500.0
    kv_share: float = 0.25
    max_file_mb: int = 512
    on_restart: Literal["resume", "fail"] = "resume"

    def __post_init__(self):
        self._require("share", 0 <= self.share < 1, "from 0 to below 1")
        self._require("micro_step_ms", 0 < self.micro_step_ms <= 1000, "above 0 and at most 1000")
        self._require("idle_step_ms", 0 <= self.idle_step_ms <= 10_000, "from 0 to 10000")
        self._require("kv_share", 0 <= self.kv_share <= 0.9, "from 0 to 0.9")
        self._require("max_file_mb", self.max_file_mb >= 1, "at least 1")
        self._require("on_restart", self.on_restart in ("resume", "fail"), "resume or fail")
        self._require("dir", bool(self.dir), "a folder")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"--mezo-{name.replace('_', '-')}", getattr(self, name), allowed)

    @property
    def directory(self) -> Path:
        return Path(self.dir).absolute()

    @property
    def max_file_bytes(self) -> int:
        return self.max_file_mb << 20

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read what flags have put into the environment, or the user has."""
        values: dict[str, Any] = {"enabled": _switch(environment.get(ENABLE_VARIABLE, "0"))}
        for setting in SETTINGS:
            if (text := environment.get(setting.variable)) is not None:
                try:
                    values[setting.name] = setting.kind(text)
                except ValueError as error:
                    raise ConfigError(setting.flag, text, f"a value of type {setting.kind.__name__}") from error
        return cls(**values)


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false", ""):
        raise ConfigError(ENABLE_VARIABLE, text, "0 or 1")
    return text.lower() in ("1", "true")


def default(name: str) -> Any:
    """What a setting is when nobody sets it."""
    return next(field.default for field in fields(ServiceSettings) if field.name == name)
