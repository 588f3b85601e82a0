"""A job's run as the engine is to take it up: from its folder, its configuration and its examples."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang.srt.mezo.data.batches import Portion
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.service.jobs.job_data import AppendedRows, JobReader
from sglang.srt.mezo.service.jobs.origins import origin_directory
from sglang.srt.mezo.service.store.example_files import ExampleFiles, Split
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription, HoldJob, StartJob
from sglang.srt.mezo.service.wire.packed import pack
from sglang.srt.mezo.service.wire.records import StoredJob
from sglang.srt.mezo.training.run_directory import has_run, read_portions


@dataclass(frozen=True)
class RunData:
    """All examples that a run has drawn from so far.

    Attributes:
        files: those of the job's files.
        appended: those of its files of appended rows, each packed.
        portions: of those to train on.
    """

    files: ExampleFiles
    appended: list[bytes]
    portions: list[Portion]

    def parts(self, split: Split) -> Iterator[bytes]:
        return itertools.chain(self.files.parts(split), self.appended if split == "train" else ())


class JobRuns:
    """Where runs lie, and the commands that begin or continue them."""

    def __init__(self, store: Store, reader: JobReader, engine: EngineDescription):
        self._store = store
        self._reader = reader
        self._engine = engine

    def directory(self, job_id: str) -> Path:
        """The folder that the engine trains in."""
        return self._store.job_directory(job_id) / "run"

    def appended(self, job_id: str) -> AppendedRows:
        return AppendedRows(self._store.job_directory(job_id))

    def has_begun(self, job_id: str) -> bool:
        """Whether there is a run to go on with."""
        directory = self.directory(job_id)
        return has_run(directory) and (directory / "seed_log").stat().st_size > 0

    def checkpoints(self, job_id: str) -> Iterator[tuple[int, Path]]:
        """Step and folder of every checkpoint that the run has left."""
        for folder in self.directory(job_id).glob("checkpoint-*"):
            if (step := folder.name.removeprefix("checkpoint-")).isdecimal():
                yield int(step), folder

    def prepare(self, job: StoredJob, files: ExampleFiles) -> RunData:
        """What a run has drawn from so far, of the job's files and of rows that were appended.

        Raises:
            RequestError, DataError, DamagedError: they cannot be read, or are not those that the run has drawn from.
        """
        of_files = count = files.counts["train"]
        portions = read_portions(self.directory(job.id) / "segments.json") or [Portion(0, of_files)]
        expected = sum(number for _, number in portions)
        appended = []
        for path in self.appended(job.id).files():
            if count >= expected:
                break
            examples = self._reader.encode_file(job, path)
            appended.append(pack(examples))
            count += len(examples)
        if count != expected or portions[0].examples != of_files:
            cause = "a file with examples has changed, or is gone"
            message = (
                f"job {job.id} has {count} examples, and its run has drawn from {list(map(tuple, portions))}: {cause}"
            )
            raise RequestError(500, message, None, "examples_lost")
        return RunData(files, appended, portions)

    def encode_appended(self, job: StoredJob, path: Path) -> list[Example]:
        return self._reader.encode_file(job, path)

    def start_command(self, job: StoredJob, portions: list[Portion]) -> StartJob:
        """Begin the run, or go on with it where there is one.

        Raises:
            RequestError: there is a run, without its configuration or its seed log.
        """
        return StartJob(portions=portions, **self._take_up(job))

    def hold_command(self, job: StoredJob) -> HoldJob:
        """Have the adapter as the run has left it; raises what ``start_command`` does."""
        return HoldJob(**self._take_up(job))

    def _take_up(self, job: StoredJob) -> dict[str, Any]:
        directory = self.directory(job.id)
        resumes = self.has_begun(job.id)
        if not resumes and job.step > 0:
            raise _lost(directory, job.step)
        if not resumes:
            _clear(directory)
        config = replace(job.settings, output_dir=str(directory), resume_from_checkpoint=resumes, disable_tqdm=True)
        return {
            "job_id": job.id,
            "config": config,
            "base_model": self._engine.model_path,
            "invocation": list(self._reader.invocation(job)),
            "start": None if config.init_from is None else str(origin_directory(self._store, job.id)),
        }


def _lost(directory: Path, step: int) -> RequestError:
    missing = [name for name in ("config.json", "seed_log") if not (directory / name).is_file()]
    what = f"its {' and its '.join(missing)}" if missing and directory.is_dir() else "its folder"
    message = f"the run in {directory} was at step {step} and has lost {what}: put it back"
    return RequestError(500, message, None, "run_damaged")


def _clear(directory: Path) -> None:
    """Make room for a run where there is none yet: what a server that was stopped in its first moment has left is
    none."""
    if not directory.exists():
        return
    left = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if not {"config.json", "initial_adapter", "seed_log"}.issuperset(left):
        missing = "config.json" if not (directory / "config.json").is_file() else "seed_log"
        beside = f"Beside it lie {', '.join(left)}, which stay as they are"
        message = f"the run in {directory} has lost its {missing}: put it back. {beside}"
        raise RequestError(500, message, None, "run_damaged")
    shutil.rmtree(directory)
