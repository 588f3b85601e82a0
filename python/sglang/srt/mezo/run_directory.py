"""Files of one run: config.json, the initial adapter, the seed log, metrics.jsonl, checkpoints, trainer_state.json."""

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from sglang.srt.mezo.adapter import Adapter, atomic_directory
from sglang.srt.mezo.config import MezoConfig
from sglang.srt.mezo.errors import ConfigError
from sglang.srt.mezo.seed_log import LogHeader, SeedLog, digest_of

_MAY_DIFFER_ON_RESUME = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "logging_steps", "save_steps",
    "report_to", "disable_tqdm", "per_device_eval_batch_size",
}  # fmt: skip


class RunDirectory:
    """Creates a run's folder or takes up an earlier run in it."""

    def __init__(self, config: MezoConfig):
        self.path = Path(config.output_dir)
        self._config = config

    def best(self, step: int) -> Path:
        """The adapter of the best step so far; the step is in the name, so that a new one never replaces what is needed."""
        return self.path / f"best-{step}"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def pass_sizes(self) -> Path:
        return self.path / "passes.jsonl"

    @property
    def segments(self) -> Path:
        return self.path / "segments.json"

    def open(self, adapter: Adapter) -> SeedLog:
        """Make the folder of a new run, or take up the log and the initial ``adapter`` of the earlier run in it.

        Raises:
            ConfigError: the folder holds a run and the configuration does not say what to do with it, or the earlier
                run's settings differ.
            LogError: another process runs in the folder, the log's header is damaged, or the initial adapter is not the one
                that it starts from.
        """
        self.check()
        if self._config.resume_from_checkpoint:
            return self._resume(adapter)
        if self.path.exists() and any(self.path.iterdir()):
            with closing(SeedLog.open(self.path / "seed_log")) as earlier:
                earlier.claim()  # a run that is still going is not deleted
                shutil.rmtree(self.path)
        try:
            return self._create(adapter)
        except BaseException:  # half a run could neither be resumed nor overwritten
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def check(self) -> None:
        """Raise ConfigError for what can be told of the folder before there is an adapter."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "may not be written to" if there.is_dir() else "is a file"
            raise ConfigError("output_dir", str(self.path), f"a folder that can be made: {there} {reason}")
        if self._config.resume_from_checkpoint:
            self._require_run()
            self._require_same_settings()
        elif self.path.exists() and any(self.path.iterdir()):
            if not self._config.overwrite_output_dir:
                raise ConfigError("output_dir", str(self.path), "a new or empty folder; or set overwrite_output_dir or resume_from_checkpoint")
            self._require_run()

    def _create(self, adapter: Adapter) -> SeedLog:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", self._config.to_dict())
        adapter.save_pretrained(self.path / "initial_adapter")
        header = LogHeader(adapter.shapes, self._config.num_perturbations, self._config.update_rule, digest_of(adapter.theta))
        log = SeedLog.create(self.path / "seed_log", header)
        log.claim()
        return log

    def _require_run(self) -> None:
        """Only a folder that a run made is ever deleted or resumed."""
        if not (self.path / "config.json").is_file() or not (self.path / "seed_log").is_file():
            raise ConfigError("output_dir", str(self.path), "a folder that an earlier run made (config.json and seed_log)")

    def _require_same_settings(self) -> None:
        try:
            earlier = dict(json.loads((self.path / "config.json").read_text()))
        except (TypeError, ValueError) as error:
            raise ConfigError("output_dir", str(self.path), f"a run whose config.json can be read ({error})") from error
        for name, value in json.loads(json.dumps(self._config.to_dict())).items():
            if name not in _MAY_DIFFER_ON_RESUME and earlier.get(name) != value:
                raise ConfigError(name, value, f"the run to resume has {earlier.get(name)!r}")

    def _resume(self, adapter: Adapter) -> SeedLog:
        log = SeedLog.open(self.path / "seed_log")
        log.claim()
        try:
            adapter.load_weights(self.path / "initial_adapter")
            log.require_initial(adapter.theta)
        except BaseException:
            log.close()
            raise
        return log

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def drop_best_but(self, step: int) -> None:
        for folder in self.path.glob("best-*"):
            if folder != self.best(step):
                shutil.rmtree(folder)

    def save_checkpoint(self, adapter: Adapter, state: dict[str, Any]) -> Path:
        folder = self.checkpoint(state["global_step"])
        with atomic_directory(folder) as checkpoint:
            adapter.save_pretrained(checkpoint)
            write_json(checkpoint / "trainer_state.json", state)
        return folder

    def save_state(self, state: dict[str, Any]) -> None:
        write_json(self.path / "trainer_state.json", state)

    def load_state(self) -> dict[str, Any] | None:
        path = self.path / "trainer_state.json"
        return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
