"""A job's files are tokenised once, in a process of their own, which can be killed, may crash, and takes no time
from requests."""

import asyncio
import errno
import os
import random
from pathlib import Path

import psutil
import pytest

import fork_tasks
from service_server import ROW, ROWS, anyio_backend, eventually, runtime_context, server, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.service.jobs import tokenising
from sglang.srt.mezo.service.jobs.forks import Forks, Shared, TaskEnded
from sglang.srt.mezo.service.jobs.job_data import JobReader
from sglang.srt.mezo.service.store.example_files import read_examples, write_examples
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import LoadExamples
from sglang.srt.mezo.service.wire.packed import MAX_EXAMPLES, MAX_TOKENS, pack, parts, size, unpack

pytestmark = pytest.mark.anyio


def random_examples(count: int, longest: int = 300) -> list[Example]:
    draw = random.Random(count)

    def text() -> tuple[int, ...]:
        return tuple(draw.randrange(2**31) for _ in range(draw.randint(1, longest)))

    return [Example(text(), tuple(text() for _ in range(draw.randint(1, 4))), draw.randint(0, 3)) for _ in range(count)]


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_packed_examples_come_out_as_they_went_in(count):
    examples = random_examples(count)
    assert unpack(pack(examples)) == examples


def test_what_completions_are_graded_by_goes_along():
    columns = {"prompt": [{"role": "user", "content": "où?"}], "answers": ["ici", "là"], "weight": 0.5, "note": None}
    examples = [Example((1, 2), columns=columns), Example((3,), columns={**columns, "note": "x" * 4 * MAX_TOKENS})] * 2
    assert unpack(pack(examples)) == examples
    assert [len(part) for part in parts(examples)] == [1, 1, 1, 1]


def test_parts_are_bounded_and_keep_the_order():
    examples = random_examples(2000, longest=900)
    split = list(parts(examples))
    assert [example for part in split for example in part] == examples
    assert all(len(part) <= MAX_EXAMPLES and sum(map(size, part)) <= MAX_TOKENS for part in split)


@pytest.mark.parametrize("cut", [4, 8, -4])
def test_bytes_that_are_no_part_are_told(cut):
    with pytest.raises(ValueError):
        unpack(pack(random_examples(3))[:cut])
    with pytest.raises(ValueError):
        unpack(pack(random_examples(3)) + bytes(4))


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_examples_on_disk_are_those_that_were_written(tmp_path):
    splits = {"train": random_examples(700), "eval": random_examples(3)}
    write_examples(tmp_path / "examples", {"file": "a"}, splits, {"objective": "classification"})
    files = read_examples(tmp_path / "examples", {"file": "a"})
    assert {split: list(files.examples(split)) for split in splits} == splits
    assert files.counts == {"train": 700, "eval": 3} and files.found == {"objective": "classification"}
    assert read_examples(tmp_path / "examples", {"file": "b"}) is None
    assert read_examples(tmp_path / "nothing", {"file": "a"}) is None


@pytest.mark.parametrize("name", ["train", "eval", "examples.json", "SHA256SUMS"])
def test_examples_that_have_changed_on_disk_are_not_taken(tmp_path, name):
    directory = tmp_path / "examples"
    write_examples(directory, {}, {"train": random_examples(3), "eval": random_examples(2)}, {})
    content = bytearray((directory / name).read_bytes())
    content[min(20, len(content) - 1)] ^= 1
    (directory / name).write_bytes(content)
    assert read_examples(directory, {}) is None
    (directory / name).write_bytes(content[:-1])
    assert read_examples(directory, {}) is None


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks():
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "PYTHONPATH",
        os.pathsep.join(filter(None, [str(Path(fork_tasks.__file__).parent), os.environ.get("PYTHONPATH")])),
    )
    forks = Forks()
    yield forks
    forks.close()
    patch.undo()


@pytest.fixture(scope="module")
def shared():
    shared = Shared([1, 2, 3])
    yield shared
    shared.close()


async def test_a_task_runs_in_a_process_of_its_own_with_the_shared_object(forks, shared):
    answers = await asyncio.gather(*(forks.run(shared, fork_tasks.add, number) for number in range(5)))
    assert [answer["sum"] for answer in answers] == [6, 7, 8, 9, 10]
    processes, parents = ({answer[name] for answer in answers} for name in ("process", "parent"))
    assert len(processes) == 5 and len(parents) == 1 and os.getpid() not in processes | parents
    other = Shared([100])
    assert (await forks.run(other, fork_tasks.add, 1))["sum"] == 101
    assert (await forks.run(shared, fork_tasks.add, 1))["sum"] == 7
    other.close()


async def test_requests_go_before_it(forks, shared):
    assert await forks.run(shared, fork_tasks.niceness) == 19


async def test_a_task_whose_caller_goes_is_killed(forks, shared, tmp_path):
    waiting = asyncio.create_task(forks.run(shared, fork_tasks.wait, tmp_path / "process"))
    process = await process_in(tmp_path / "process")
    waiting.cancel()
    await ended(process)
    assert (await forks.run(shared, fork_tasks.add, 1))["sum"] == 7


async def test_a_task_that_crashes_is_tried_once_more(forks, shared, tmp_path):
    assert await forks.run(shared, fork_tasks.die, tmp_path / "once", 1) == "alive"
    with pytest.raises(TaskEnded, match="2 times: signal SIGSEGV"):
        await forks.run(shared, fork_tasks.die, tmp_path / "always", 9)
    assert (tmp_path / "always").read_text() == "xx"


async def test_memory_is_bounded(forks, shared):
    with pytest.raises(TaskEnded, match="more than [0-9]+ GiB of memory"):
        await forks.run(shared, fork_tasks.take_memory)


async def test_an_error_of_a_task_is_named_and_no_more(forks, shared):
    with pytest.raises(RequestError, match="ZeroDivisionError in the process") as caught:
        await forks.run(shared, fork_tasks.break_down)
    assert (caught.value.status, caught.value.code) == (500, "internal_error") and "secret" not in caught.value.message


async def test_a_full_disk_is_told_as_in_this_process(forks, shared):
    with pytest.raises(OSError) as caught:
        await forks.run(shared, fork_tasks.fill_disk)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/full")


async def test_where_the_process_that_forks_is_killed_another_one_takes_the_task(forks, shared, tmp_path):
    waiting = asyncio.create_task(forks.run(shared, fork_tasks.wait, tmp_path / "process"))
    process = await process_in(tmp_path / "process")
    (tmp_path / "process").unlink()
    psutil.Process(process).parent().kill()
    await ended(process)
    again = await process_in(tmp_path / "process")
    assert again != process
    waiting.cancel()
    await ended(again)


async def process_in(path: Path) -> int:
    await eventually(lambda: path.exists() and path.read_text())
    return int(path.read_text())


async def ended(process: int) -> None:
    await eventually(lambda: not psutil.pid_exists(process))


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def forking(tmp_path, tokenizer, forks, monkeypatch):
    """A server that leaves no file to a thread."""
    monkeypatch.setattr(tokenising, "_SMALL_BYTES", -1)
    async with serving(tmp_path, tokenizer) as server:
        server.manager._tokenising._forks = forks
        yield server


def tasks(forks) -> list[psutil.Process]:
    return psutil.Process(forks._running[0].pid).children()


async def test_a_job_whose_files_are_tokenised_elsewhere_trains_on_the_same_examples(forking, tokenizer, tmp_path):
    rows = [{**ROW, "prompt": f"the movie number {number} is great. It was"} for number in range(400)]
    job = await forking.create(*rows, validation=forking.upload(ROW, rows[0]))
    await forking.until(job, "running")
    *train, evaluation = [unpack(command.examples) for command in forking.scheduler.sent(LoadExamples)]
    async with serving(tmp_path / "other", tokenizer) as server:
        other = await server.running(*rows, validation=server.upload(ROW, rows[0]))
        *expected, expected_evaluation = [unpack(command.examples) for command in server.scheduler.sent(LoadExamples)]
        assert (train, evaluation) == (expected, expected_evaluation) and sum(map(len, train)) == 400
        warning = "1 of 2 examples of the validation file are in the training file too"
        assert (
            any(message.startswith(warning) for message in forking.messages(job))
            and server.messages(other)[2:4] == forking.messages(job)[2:4]
        )


async def test_a_bad_row_of_a_file_that_is_tokenised_elsewhere_is_named(forking):
    failed = await forking.until(await forking.create(*[ROW] * 300, {**ROW, "label": 2}), "failed")
    assert failed.error["message"].startswith("train.jsonl:301: label=2") and failed.error["param"] == "training_file"
    assert failed.error["code"] == "invalid_training_file"
    await forking.until(await forking.create(), "running")


async def test_a_cancelled_job_is_tokenised_no_further(forking, forks, tmp_path):
    job = await forking.create(*[ROW] * 100_000)
    await eventually(lambda: forks._running is not None and tasks(forks))
    await forking.manager.cancel(job.id)
    await eventually(lambda: not tasks(forks))
    assert not (tmp_path / "jobs" / job.id / "examples").exists()
    await forking.until(await forking.create(), "running")


async def test_the_process_ends_after_a_rest_and_another_one_begins(forking, forks, monkeypatch):
    monkeypatch.setattr(tokenising, "_REST_SECONDS", 0.0)
    await forking.until(await forking.create(), "running")
    await eventually(lambda: forks._running is None)
    waiting = await forking.create()
    await forking.until(waiting, "queued")


async def test_a_server_that_ends_leaves_no_process(tmp_path, tokenizer, forks, monkeypatch):
    monkeypatch.setattr(tokenising, "_SMALL_BYTES", -1)
    async with serving(tmp_path, tokenizer) as server:
        server.manager._tokenising._forks = forks
        await server.create(*[ROW] * 100_000)
        await eventually(lambda: forks._running is not None and tasks(forks))
    await eventually(lambda: not tasks(forks))
    process = psutil.Process(forks._running[0].pid)
    forks.close()
    assert not process.is_running()


async def test_a_file_is_tokenised_once_for_all_starts_of_a_job(tmp_path, tokenizer, monkeypatch):
    reads = []
    original = JobReader.read
    monkeypatch.setattr(
        JobReader, "read", lambda self, job, *files: reads.append(job.id) or original(self, job, *files)
    )
    async with serving(tmp_path, tokenizer) as server:
        job = await server.running()
        await server.manager.pause(job.id)
        await server.manager.resume(job.id)
        await server.started(job)
        await server.manager.append_rows(job.id, [ROW, ROW])
    async with serving(tmp_path, tokenizer) as server:
        await server.started(job)
        assert reads == [job.id]
        sent = [example for command in server.scheduler.sent(LoadExamples) for example in unpack(command.examples)]
        assert len(sent) == 5
        await server.manager.pause(job.id)
        files = tmp_path / "jobs" / job.id / "examples"
        (files / "train").write_bytes((files / "train").read_bytes()[:-1])
        await server.manager.resume(job.id)
        await server.started(job)
        assert reads == [job.id] * 2 and len(server.scheduler.sent(LoadExamples)) > 0
        server.scheduler.succeed()
        await server.until(job, "succeeded")
        await eventually(lambda: not files.exists())
