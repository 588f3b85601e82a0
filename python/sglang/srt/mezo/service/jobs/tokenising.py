"""The files of jobs as examples: tokenised once for each job, beside the requests that are served."""

import asyncio
from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.service.jobs.forks import Forks, Shared
from sglang.srt.mezo.service.jobs.job_data import JobReader, SourceFile
from sglang.srt.mezo.service.store.example_files import (
    ExampleFiles,
    read_examples,
    remove_examples,
    remove_partial,
    write_examples,
)
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.records import ENDED, LIVE, StoredJob

_REST_SECONDS = 600.0  # after the last task until the process that starts them ends, for the memory that it takes
_SMALL_BYTES = 128 << 10  # of files that take a moment, in a thread: less than it takes to send for a process


class Tokenising:
    """Used in one event loop. What is small is tokenised in a thread of this process, the rest in processes of their
    own."""

    def __init__(self, store: Store, reader: JobReader, forks: Forks):
        self._store = store
        self._reader = reader
        self._forks = forks
        self._shared: Shared | None = None
        self._tasks: dict[str, asyncio.Task[ExampleFiles]] = {}
        self._rest: asyncio.Task | None = None

    async def examples(self, job: StoredJob) -> ExampleFiles | None:
        """Those of the job's files; None where ``stop`` has been called meanwhile.

        Raises:
            RequestError: naming the file, line and reason of the first row that cannot be used.
        """
        self._wake()
        task = self._tasks[job.id] = asyncio.create_task(self._examples(job))
        try:
            return await task
        except asyncio.CancelledError:
            waiting = asyncio.current_task()
            if waiting is not None and waiting.cancelling():
                raise
            return None
        finally:
            del self._tasks[job.id]
            if not self._tasks:
                self._rest = asyncio.create_task(self._end_of_rest())

    def stop(self, job_id: str) -> None:
        """End the work on a job's files, at once."""
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel()

    async def remove(self, job_id: str) -> None:
        """Of a job that does not train any more."""
        await asyncio.to_thread(remove_examples, self._directory(job_id))

    async def tidy(self) -> None:
        """Before the first task: remove what an earlier server did not come to, of jobs that do not train any more."""
        for job in self._store.with_status(*LIVE):
            await asyncio.to_thread(remove_partial, self._directory(job.id))
        for job in self._store.with_status(*ENDED):
            await self.remove(job.id)

    async def close(self) -> None:
        """After the last task."""
        self._wake()
        if self._shared is not None:
            self._shared.close()

    def _wake(self) -> None:
        if self._rest is not None:
            self._rest.cancel()

    async def _end_of_rest(self) -> None:
        await asyncio.sleep(_REST_SECONDS)
        await asyncio.to_thread(self._forks.close)

    def _directory(self, job_id: str) -> Path:
        return self._store.job_directory(job_id) / "examples"

    async def _examples(self, job: StoredJob) -> ExampleFiles:
        if self._shared is None:
            self._shared = await asyncio.to_thread(Shared, self._reader)
        made_from = {
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "reader": self._shared.digest.hex(),
        }
        known = await asyncio.to_thread(read_examples, self._directory(job.id), made_from)
        if known is not None:
            return known
        training_file, validation_file = await asyncio.to_thread(self._files, job)
        arguments = job, training_file, validation_file, self._directory(job.id), made_from
        if sum(file.path.stat().st_size for file in (training_file, validation_file) if file) <= _SMALL_BYTES:
            refusal = await asyncio.to_thread(tokenise, self._reader, *arguments)
        else:
            refusal = await self._forks.run(self._shared, tokenise, *arguments)
        if refusal is not None:
            raise RequestError(**refusal)
        made = await asyncio.to_thread(read_examples, self._directory(job.id), made_from)
        assert made is not None, "what has just been tokenised can be read"
        return made

    def _files(self, job: StoredJob) -> tuple[SourceFile, SourceFile | None]:
        def found(file_id: str, param: str) -> SourceFile:
            file = self._store.file(file_id)
            return SourceFile(self._store.content(file, param), file.filename)

        validation_file = None if job.validation_file is None else found(job.validation_file, "validation_file")
        return found(job.training_file, "training_file"), validation_file


def tokenise(
    reader: JobReader,
    job: StoredJob,
    training_file: SourceFile,
    validation_file: SourceFile | None,
    directory: Path,
    made_from: dict[str, Any],
) -> dict[str, Any] | None:
    """Write the examples of a job's files; the fields of a RequestError where they cannot be used. Called in any
    process."""
    try:
        data = reader.read(job, training_file, validation_file)
    except RequestError as error:
        return {"status": error.status, "message": error.message, "param": error.param, "code": error.code}
    found = {"objective": data.objective, "shared": data.shared, "invocation": data.invocation}
    if isinstance(data.invocation, DataError):
        found |= {"invocation": None, "no_invocation": data.invocation.reason}
    write_examples(directory, made_from, {"train": data.train, "eval": data.evaluation}, found)
    return None


def found_invocation(files: ExampleFiles) -> str | list[int] | DataError | None:
    """Of a job that leaves it open: what its rows suggest, or why they suggest none."""
    return DataError(files.found["no_invocation"]) if "no_invocation" in files.found else files.found["invocation"]
