"""Metrics of a run for TensorBoard, Weights & Biases, trackio, MLflow and what else Transformers reports to, by its
own callbacks: what they read from the environment and how they name metrics is as Transformers' users know it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, one_line

if TYPE_CHECKING:
    from transformers import TrainerCallback

ALL, NONE = "all", "none"


def integrations(report_to: str | Sequence[str]) -> "list[TrainerCallback]":
    """Transformers' callbacks of these names; of "all", those whose packages are installed.

    Raises:
        ConfigError: Transformers knows no such name, or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names in ([], [NONE]):
        return []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if names == [ALL]:
        names = get_available_reporting_integrations()
    made = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join([NONE, ALL, *INTEGRATION_TO_CALLBACK])
            raise ConfigError("report_to", report_to, f"some of {known}")
        try:
            made.append(INTEGRATION_TO_CALLBACK[name]())
        except (RuntimeError, ImportError) as error:
            raise ConfigError("report_to", report_to, f"{name} where it is installed ({one_line(error)})") from error
    return made


class Reporter:
    """A run in the callbacks' eyes: it begins, logs and ends. ``open`` makes one."""

    def __init__(self, config: MezoConfig, callbacks: "Sequence[TrainerCallback]", first_step: int, max_steps: int):
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import CallbackHandler

        self._arguments = _arguments(config, max_steps)
        self._state = TrainerState(global_step=first_step, max_steps=max_steps)
        self._control = TrainerControl()
        self._callbacks = CallbackHandler(list(callbacks), None, None, None, None)
        self._callbacks.on_train_begin(self._arguments, self._state, self._control)

    @classmethod
    def open(cls, config: MezoConfig, first_step: int, max_steps: int) -> Self | None:
        """None where nobody is told; raises what ``integrations`` does."""
        callbacks = integrations(config.report_to)
        return cls(config, callbacks, first_step, max_steps) if callbacks else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What of the metrics is one number."""
        self._state.global_step = step
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._callbacks.on_log(self._arguments, self._state, self._control, numbers)

    def close(self) -> None:
        self._callbacks.on_train_end(self._arguments, self._state, self._control)


def _arguments(config: MezoConfig, max_steps: int) -> Any:
    """Transformers' arguments, in which the callbacks look for folders and names, and which tell our settings."""
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):
        def to_dict(self) -> dict[str, Any]:
            return config.to_dict()

    return Arguments(
        output_dir=config.output_dir,
        run_name=config.output_dir,
        max_steps=max_steps,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.per_device_train_batch_size,
        seed=config.seed % 2**32,
        report_to=NONE,
        use_cpu=True,  # the engine has the accelerator
    )
