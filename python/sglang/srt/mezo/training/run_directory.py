"""Files of one run: config.json, the initial adapter, the seed log, metrics.jsonl, checkpoints, trainer_state.json."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import BaseModelError, ConfigError, DamagedError, LogError
from sglang.srt.mezo.core.integrity import read_checked_json, write_checked_json, write_json
from sglang.srt.mezo.core.objective import OF_EARLIER_VERSIONS
from sglang.srt.mezo.core.seed_log import LogHeader, SeedLog, digest_of, locked_log
from sglang.srt.mezo.core.settings import setting_of
from sglang.srt.mezo.core.trainable import Trainable
from sglang.srt.mezo.data.batches import Portion


class RunDirectory:
    """Creates a run's folder or takes up an earlier run in it.

    Args:
        base_model: ``EngineHandle.base_model``, where a run is to be made or taken up.
    """

    def __init__(self, config: MezoConfig, base_model: Mapping[str, str] | None = None):
        self.path = Path(config.output_dir)
        self._config = config
        self._base_model = base_model

    def best(self, step: int) -> Path:
        """What was trained as of the best step so far; the step is in the name, so that a new one never replaces what
        is needed."""
        return self.path / f"best-{step}"

    @property
    def trained(self) -> Path:
        """What the run ends with."""
        return self.path / ("model" if self._config.tuning == "full" else "adapter")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def pass_sizes(self) -> Path:
        return self.path / "passes.jsonl"

    @property
    def portions(self) -> Path:
        return self.path / "segments.json"

    def open(self, trainable: Trainable) -> SeedLog:
        """Make the folder of a new run, or take up the log and what it starts from of the earlier run in it.

        Raises:
            ConfigError: the folder holds a run and the configuration does not say what to do with it, or the earlier
                run's settings differ.
            BaseModelError: it was trained on another base model.
            LogError: another process runs in the folder, the log's header is damaged, or what is there is not what it
                starts from.
            DamagedError: what the log starts from is not as it was written.
        """
        self.check()
        if self._config.resume_from_checkpoint:
            return self._resume(trainable)
        if self.path.exists() and any(self.path.iterdir()):
            with self._claimed():  # a run that is still going is not deleted
                shutil.rmtree(self.path)
        return self._create(trainable)

    def _claimed(self) -> AbstractContextManager[object]:
        """The log of the earlier run, as its only writer; LogError where it is none, but for half of one."""
        if is_half_made(self.path):
            return locked_log(self.path / "seed_log")
        log = SeedLog.open(self.path / "seed_log")
        log.claim()
        return closing(log)

    def check(self) -> None:
        """Raise ConfigError for what can be told of the folder before there is an adapter."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "may not be written to" if there.is_dir() else "is a file"
            raise ConfigError("output_dir", str(self.path), f"a folder that can be made: {there} {reason}")
        if self._config.resume_from_checkpoint:
            self._require_run()
            self._require_same_settings()
        elif self.path.exists() and any(self.path.iterdir()) and not is_half_made(self.path):
            if not self._config.overwrite_output_dir:
                raise ConfigError(
                    "output_dir",
                    str(self.path),
                    "a new or empty folder; or set overwrite_output_dir or resume_from_checkpoint",
                )
            self._require_run()

    def _create(self, trainable: Trainable) -> SeedLog:
        self.path.mkdir(parents=True, exist_ok=True)
        header = LogHeader(
            trainable.shapes, self._config.num_perturbations, self._config.update_rule, digest_of(trainable.theta)
        )
        try:
            log = SeedLog.create(self.path / "seed_log", header)
            log.claim()
            base_model = {} if self._base_model is None else {"base_model": self._base_model}
            trainable.save_initial(self.path)
            write_json(self.path / "config.json", self._config.to_dict() | base_model)
            return log
        except FileExistsError as error:  # which nobody's file is deleted for
            raise ConfigError(
                "output_dir", str(self.path), "a folder that no other run begins in at the same moment"
            ) from error
        except BaseException:  # half a run could neither be resumed nor overwritten
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _require_run(self) -> None:
        """Only a folder that a run made is ever deleted or resumed."""
        if not has_run(self.path):
            raise ConfigError(
                "output_dir", str(self.path), "a folder that an earlier run made (config.json and seed_log)"
            )

    def _require_same_settings(self) -> None:
        try:
            earlier = dict(json.loads((self.path / "config.json").read_text()))
        except (TypeError, ValueError) as error:
            raise ConfigError("output_dir", str(self.path), f"a run whose config.json can be read ({error})") from error
        for one in fields(self._config):
            if setting_of(one).resume != "same":
                continue
            value = json.loads(json.dumps(getattr(self._config, one.name)))
            # A version that did not know a setting did what its default does.
            known = earlier.get(one.name, None if setting_of(one).follows else one.default)
            if isinstance(known, str):
                known = OF_EARLIER_VERSIONS.get(one.name, {}).get(known, known)
            if known != value:
                raise ConfigError(one.name, value, f"the run to resume has {known!r}")
        self._require_base_model(earlier.get("base_model"))

    def _resume(self, trainable: Trainable) -> SeedLog:
        log = SeedLog.open(self.path / "seed_log")
        log.claim()
        try:
            trainable.resume_initial(self.path)
            log.require_initial(trainable.theta)
        except BaseException:
            log.close()
            raise
        return log

    def _require_base_model(self, earlier: Any) -> None:
        """A run of a version that kept no record of it is taken for one of this base model."""
        if not isinstance(earlier, dict) or self._base_model is None:
            return
        if earlier.get("fingerprint") != self._base_model["fingerprint"]:
            raise BaseModelError(self._base_model["name"], earlier.get("name"))
        if earlier.get("precision") != self._base_model["precision"]:
            raise ConfigError(
                "dtype", self._base_model["precision"], f"the run to resume has {earlier.get('precision')!r}"
            )

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def drop_best(self, step: int) -> None:
        shutil.rmtree(self.best(step), ignore_errors=True)

    def save_portions(self, portions: Sequence[Portion]) -> None:
        write_checked_json(self.portions, {"parts": portions})

    def save_checkpoint(self, trainable: Trainable, state: dict[str, Any]) -> Path:
        folder = self.checkpoint(state["global_step"])
        with atomic_directory(folder) as checkpoint:
            trainable.save_pretrained(checkpoint)
            write_checked_json(checkpoint / "trainer_state.json", state)
        return folder

    def save_state(self, state: dict[str, Any]) -> None:
        write_checked_json(self.path / "trainer_state.json", state)

    def load_state(self) -> dict[str, Any] | None:
        """None where there is none; raises DamagedError where it is not as ``save_state`` wrote it."""
        path = self.path / "trainer_state.json"
        return read_checked_json(path) if path.is_file() else None


def has_run(folder: Path) -> bool:
    """Whether there is a run to go on with: its configuration is the last that is written of what it starts from."""
    return (folder / "config.json").is_file() and (folder / "seed_log").is_file()


def is_half_made(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run has left that was stopped before it could begin: no record."""
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return "seed_log" in left <= {"seed_log", "initial_adapter"} and not _has_records(folder / "seed_log")


def _has_records(log: Path) -> bool:
    """Or what cannot be read, and may be some."""
    try:
        return len(SeedLog.open(log)) > 0
    except LogError:
        return log.stat().st_size > 0


def read_portions(path: Path) -> list[Portion]:
    """Of a run's training examples; none before some were added.

    Raises:
        DamagedError: the file is not as ``save_portions`` wrote it.
    """
    try:
        earlier_format = path.read_bytes().startswith(b"[")
    except FileNotFoundError:
        return []
    try:
        found = json.loads(path.read_bytes()) if earlier_format else read_checked_json(path)["parts"]
        return [Portion(first_step, examples) for first_step, examples in found]
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, DamagedError) else DamagedError(path, str(error)) from error
