"""A job's run as the engine is to take it up: from its folder, its configuration and its examples."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sglang.srt.mezo.data import Example
from sglang.srt.mezo.service.job_data import AppendedRows, JobData, JobReader
from sglang.srt.mezo.service.messages import EngineDescription, StartJob
from sglang.srt.mezo.service.records import StoredJob
from sglang.srt.mezo.service.store import Store


class Runs:
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
        log = directory / "seed_log"
        return (directory / "config.json").is_file() and log.is_file() and log.stat().st_size > 0

    def checkpoints(self, job_id: str) -> Iterator[tuple[int, Path]]:
        """Step and folder of every checkpoint that the run has left."""
        for folder in self.directory(job_id).glob("checkpoint-*"):
            yield int(folder.name.removeprefix("checkpoint-")), folder

    def prepare(self, job: StoredJob) -> tuple[JobData, list[tuple[int, int]], int]:
        """All examples that a run has drawn from so far.

        Returns:
            The examples, appended ones included; (step, number) of each part of those to train on; and how many files
            of appended rows are among them.
        """
        data = self._reader.read(job)
        segments = self._segments(job.id) or [(0, len(data.train))]
        train, applied = list(data.train), 0
        expected = sum(count for _, count in segments)
        for path in self.appended(job.id).files():
            if len(train) >= expected:
                break
            train += self._reader.encode_file(job, path)
            applied += 1
        if len(train) != expected or segments[0][1] != len(data.train):
            raise RuntimeError(f"job {job.id} has {len(train)} examples, and its run has drawn from {segments}")
        return replace(data, train=train), segments, applied

    def encode_appended(self, job: StoredJob, path: Path) -> list[Example]:
        return self._reader.encode_file(job, path)

    def start_command(self, job: StoredJob, segments: list[tuple[int, int]], manual: bool = False) -> StartJob:
        """Begin the run, or go on with it where there is one. For manual work nothing is drawn, and ``segments`` is empty."""
        directory = self.directory(job.id)
        resumes = self.has_begun(job.id)
        if not resumes:  # what a server that was stopped in the first moment has left is no run
            shutil.rmtree(directory, ignore_errors=True)
        config = {**job.config, "output_dir": str(directory), "resume_from_checkpoint": resumes, "disable_tqdm": True}
        return StartJob(
            job_id=job.id,
            config=config,
            base_model=self._engine.model_path,
            target_modules=job.config["target_modules"],
            invocation=list(self._reader.invocation(job)),
            objective=job.config["objective"],
            segments=segments,
            manual=manual,
        )

    def _segments(self, job_id: str) -> list[tuple[int, int]]:
        """(first step that draws from them, number) of each part of the training examples; none before rows were added."""
        path = self.directory(job_id) / "segments.json"
        return [(step, count) for step, count in json.loads(path.read_text())] if path.is_file() else []
