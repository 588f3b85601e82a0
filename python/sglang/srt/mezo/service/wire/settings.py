"""Settings of the training service, from flags or the environment; the same in every process of a server."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.kinds import from_text
from sglang.srt.mezo.core.settings import require_settings, setting

ENABLE_FLAG = "--enable-mezo"
ENABLE_VARIABLE = "SGLANG_ENABLE_MEZO"


@dataclass(frozen=True)
class ServiceSettings:
    """Validated on construction; ConfigError names the flag."""

    enabled: bool = setting(False, "Serve the fine-tuning API.")
    dir: str = setting("mezo", "Where files, jobs and adapters are kept.")
    share: float = setting(
        0.1,
        "Share of the time that training may take while requests run; 0 trains in idle time only.",
        at_least=0,
        below=1,
    )
    micro_step_ms: float = setting(
        25.0,
        "What one uninterrupted piece of training may take, if that is more than two of the shortest forward passes: "
        "what a new request may wait for it.",
        above=0,
        at_most=1000,
    )
    idle_step_ms: float = setting(
        1500.0,
        "The same while no request has come for ten seconds: what the first one may wait for it. Up to micro_step_ms "
        "pieces never grow.",
        at_least=0,
        at_most=10_000,
    )
    kv_share: float = setting(
        0.25, "Share of the KV pool that training may keep locked between steps.", at_least=0, at_most=0.9
    )
    max_file_mb: int = setting(512, "Largest file that can be uploaded.", at_least=1)
    on_restart: Literal["resume", "fail"] = setting(
        "resume", "What becomes of a job that the server's end interrupted: resume or fail."
    )

    rewards: list[str] | None = setting(
        None, "Functions that jobs may train by, each as name=module:function, with commas between; a job names one."
    )

    def __post_init__(self):
        try:
            require_settings(self)
            functions = self.reward_functions
            if not all((*functions, *functions.values())) or len(functions) < len(self.rewards or ()):
                raise ConfigError("rewards", self.rewards, "name=module:function with commas between, each name once")
            if not self.dir:
                raise ConfigError("dir", self.dir, "a folder")
        except ConfigError as error:
            raise ConfigError(flag(error.field), error.value, error.allowed) from None

    @property
    def directory(self) -> Path:
        return Path(self.dir).absolute()

    @property
    def max_file_bytes(self) -> int:
        return self.max_file_mb << 20

    @property
    def reward_functions(self) -> dict[str, str]:
        """module:function of every reward that a job may name."""
        return {name: function for name, _, function in (reward.partition("=") for reward in self.rewards or ())}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read what flags have put into the environment, or the user has."""
        values: dict[str, Any] = {"enabled": _switch(environment.get(ENABLE_VARIABLE, "0"))}
        kinds = get_type_hints(cls)
        for name in served(cls):
            if (text := environment.get(variable(name))) is not None:
                values[name] = from_text(flag(name), text, kinds[name])
        return cls(**values)


def served(kind: type = ServiceSettings) -> list[str]:
    """The settings that have a flag with a value each."""
    return [one.name for one in fields(kind) if one.name != "enabled"]


def flag(name: str) -> str:
    """On the command line of the server."""
    return f"--mezo-{name.replace('_', '-')}"


def variable(name: str) -> str:
    """In the environment."""
    return f"SGLANG_MEZO_{name.upper()}"


def allowed_rewards(names: Iterable[str]) -> str:
    """What a job may name, of the rewards that a server has."""
    known, own = ", ".join(names), flag("rewards")
    return f"one of {known}, the server's {own}" if known else f"none, as the server was started without {own}"


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false", ""):
        raise ConfigError(ENABLE_VARIABLE, text, "0 or 1")
    return text.lower() in ("1", "true")
