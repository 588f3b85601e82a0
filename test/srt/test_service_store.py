"""The service's store: records in and out, pages, what is refused, and what is there after a kill in mid-write."""

import itertools
import json
import os
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.service.store import database
from sglang.srt.mezo.service.store.store import Store
from sglang.srt.mezo.service.wire.errors import NotFound, RequestError
from sglang.srt.mezo.service.wire.records import StoredCheckpoint, StoredEvent, new_id
from stored import add_file, add_job, make_job, reopened


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "service")
    yield store
    store.close()


# --- records ----------------------------------------------------------------------------------------------------------


def test_ids_have_a_prefix_and_24_hexadecimal_digits():
    assert len(new_id("ftjob-")) == len("ftjob-") + 24
    int(new_id("file-").removeprefix("file-"), 16)


def test_what_goes_in_comes_out_after_a_restart(store):
    file = add_file(store, filename='../../ü "quoted" ;DROP TABLE files')
    job = store.add_job(make_job(file.id, metadata={"a": "1"}, error={"code": "x", "message": "y", "param": None}))
    event = store.add_event(job.id, "warn", "careful", "metrics", {"step": 1, "loss": 0.25})
    checkpoint = store.add_checkpoint(
        StoredCheckpoint(job.id, 250, "ft:ckpt-step-250", "run/checkpoint-250", {"step": 250})
    )
    store = reopened(store)
    assert store.file(file.id) == file
    assert store.job(job.id) == job
    assert store.events(job.id).data == [event]
    assert store.checkpoint(checkpoint.id) == checkpoint
    store.close()


def test_a_change_and_its_events_come_together_or_not_at_all(store):
    job = add_job(store)
    event = StoredEvent(job.id, "started")
    changed = store.update_job(job.id, event, status="running", step=3)
    assert changed == store.job(job.id) == replace(job, status="running", step=3)
    with pytest.raises(sqlite3.IntegrityError):
        store.update_job(job.id, event, status="succeeded")  # the event's id is taken
    assert store.job(job.id) == changed
    with pytest.raises(TypeError, match="colour"):
        store.update_job(job.id, colour="red")


@pytest.mark.parametrize(
    "what", ["file", "job", "checkpoint", "events", "checkpoints", "delete_file", "update_job", "job_by_adapter"]
)
def test_what_is_not_there_is_named(store, what):
    with pytest.raises(NotFound, match="file-0") as caught:
        getattr(store, what)("file-0")
    assert (caught.value.status, caught.value.code, caught.value.id) == (404, "not_found", "file-0")


def test_a_job_needs_files_that_are_there(store):
    with pytest.raises(NotFound) as caught:
        store.add_job(make_job(add_file(store).id, validation_file="file-gone"))
    assert (caught.value.what, caught.value.param) == ("file", "validation_file")
    assert store.jobs().data == []


def test_jobs_are_found_by_status_and_by_adapter(store):
    first, second = add_job(store, status="paused"), add_job(store)
    third = add_job(store, adapter_name=first.adapter_name)
    assert store.oldest("queued") == second and store.oldest("running") is None
    assert store.with_status("queued", "paused") == [first, second, third]
    assert store.job_by_adapter(first.adapter_name) == third
    with pytest.raises(NotFound):
        store.job_by_adapter("")


def test_a_step_has_one_checkpoint(store):
    job = add_job(store)
    first = store.add_checkpoint(StoredCheckpoint(job.id, 5, "a", "run/checkpoint-5", {}), StoredEvent(job.id, "made"))
    again = store.add_checkpoint(StoredCheckpoint(job.id, 5, "b", "run/checkpoint-5", {}), StoredEvent(job.id, "made"))
    assert again == first
    assert len(store.events(job.id).data) == len(store.checkpoints(job.id).data) == 1


def test_served_are_published_versions_and_checkpoints_but_of_no_deleted_model(store):
    job = add_job(store, adapter_name="mine", version=2)
    add_job(store, adapter_name="unpublished")
    deleted = add_job(store, adapter_name="", version=1)
    for owner in (job, deleted):
        store.add_checkpoint(StoredCheckpoint(owner.id, 5, "mine:ckpt-step-5", "run/checkpoint-5", {}))
    folder = store.job_directory(job.id)
    assert [(adapter.name, adapter.directory) for adapter in store.served()] == [
        ("mine", folder / "adapters" / "v2"),
        ("mine:ckpt-step-5", folder / "run" / "checkpoint-5"),
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_deleted_file_is_gone_with_its_content(store):
    file = add_file(store)
    store.delete_file(file.id)
    assert not store.file_path(file.id).exists() and store.files().data == []


@pytest.mark.parametrize("status", ["validating_files", "queued", "running", "paused"])
@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_live_job_keeps_its_files(store, status, field):
    file = add_file(store)
    job = add_job(store, status=status, **{field: file.id})
    with pytest.raises(RequestError, match=f"{job.id}.*{status}") as caught:
        store.delete_file(file.id)
    assert (caught.value.status, caught.value.code) == (409, "file_in_use")
    assert store.file_path(file.id).exists()
    store.update_job(job.id, status="cancelled")
    store.delete_file(file.id)


# --- pages ------------------------------------------------------------------------------------------------------------


def walk(page_of, limit: int) -> list[str]:
    """Ids of a whole list, read page by page as a client does."""
    ids, after = [], None
    while True:
        page = page_of(after=after, limit=limit)
        ids += [record.id for record in page.data]
        if not page.has_more:
            return ids
        assert len(page.data) == limit
        after = ids[-1]


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7])
def test_pages_hold_everything_once_newest_first(store, limit):
    jobs = [add_job(store).id for _ in range(6)]
    assert walk(store.jobs, limit) == jobs[::-1]
    events = [store.add_event(jobs[i % 2], "info", str(i)).id for i in range(12)]
    assert walk(lambda **page: store.events(jobs[0], **page), limit) == events[::2][::-1]
    for step in range(6):
        store.add_checkpoint(StoredCheckpoint(jobs[0], step, str(step), "run", {}))
    assert [store.checkpoint(id).step for id in walk(lambda **page: store.checkpoints(jobs[0], **page), limit)] == [
        5,
        4,
        3,
        2,
        1,
        0,
    ]


def test_files_come_in_either_order_and_by_purpose(store):
    files = [add_file(store, purpose=purpose).id for purpose in ("fine-tune", "other", "fine-tune")]
    assert [file.id for file in store.files().data] == files[::-1]
    assert walk(lambda **page: store.files(order="asc", **page), 2) == files
    assert [file.id for file in store.files(purpose="other").data] == [files[1]]


def test_an_unknown_cursor_is_an_error_and_one_of_another_list_is_unknown(store):
    job, other = add_job(store), add_job(store)
    event = store.add_event(other.id, "info", "hello")
    for call in (
        lambda: store.jobs(after="ftjob-0"),
        lambda: store.files(after="x"),
        lambda: store.events(job.id, after=event.id),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.param == "after"


def test_jobs_are_filtered_by_metadata(store):
    plain = add_job(store)
    one = add_job(store, metadata={"team": "a"})
    both = add_job(store, metadata={"team": "a", 'o"d$d': "x"})
    assert store.jobs(metadata={"team": "a"}).data == [both, one]
    assert store.jobs(metadata={"team": "a", 'o"d$d': "x"}).data == [both]
    assert store.jobs(metadata={"team": "b"}).data == []
    assert store.jobs(metadata={}).data == [plain]


# --- the directory ----------------------------------------------------------------------------------------------------


def test_a_directory_has_one_store_at_a_time(store):
    with pytest.raises(ConfigError, match="no other server"):
        Store(store.directory)
    reopened(store).close()


def test_threads_share_a_store(store):
    job = add_job(store)

    def work(name: str) -> None:
        for i in range(25):
            store.update_job(job.id, StoredEvent(job.id, f"{name}{i}"), step=i)
            assert store.events(job.id, limit=1).data

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = [event.message for event in store.events(job.id, limit=1000).data]
    assert sorted(messages) == sorted(f"{name}{i}" for name in "abcd" for i in range(25))


# --- the end of the process at any moment -----------------------------------------------------------------------------


def write_until_killed(directory: Path, said: int) -> None:
    """Change a store without end, and write to the file descriptor ``said`` what has been acknowledged."""

    def say(**what) -> None:
        os.write(said, json.dumps(what).encode() + b"\n")

    store = Store(directory)
    job = store.add_job(make_job(add_file(store).id, status="running"))
    for step in itertools.count(1):
        store.update_job(job.id, StoredEvent(job.id, f"step {step}", data={"step": step}), step=step)
        say(job=job.id, step=step)
        if step % 3 == 0:
            file = add_file(store, content=b"x" * 1000)
            say(file=file.id)
        if step % 9 == 0:
            store.delete_file(file.id)
            say(deleted=file.id)


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path):
    moments = random.Random(0)
    kept, steps = set(), {}
    for kill in range(1, 11):
        listen, said = os.pipe()
        child = get_context("fork").Process(target=write_until_killed, args=(tmp_path, said))
        child.start()
        os.close(said)
        with open(listen, "rb") as lines:
            heard = [lines.readline()]
            time.sleep(moments.uniform(0.0, 0.2))
            child.kill()
            heard += lines.readlines()
        child.join()
        for line in heard:
            match json.loads(line):
                case {"job": job, "step": step}:
                    steps[job] = step
                case {"file": file}:
                    kept.add(file)
                case {"deleted": file}:
                    kept.discard(file)
        assert len(steps) == kill

        store = Store(tmp_path)
        for job_id, step in steps.items():
            newest = store.events(job_id, limit=1).data[0]
            assert store.job(job_id).step == newest.data["step"] >= step
        stored = {file.id: file for file in store.files().data}
        missing = kept - stored.keys()
        assert len(missing) <= 1  # one that was deleted before this was said
        kept -= missing
        assert (
            len(stored.keys() - kept) <= 2 * kill
        )  # of each process its training file, and one that it has not spoken of
        on_disk = {path.name: path.stat().st_size for path in (tmp_path / "files").iterdir()}
        assert on_disk == {id: file.bytes for id, file in stored.items()}
        store.close()


def test_a_store_is_closed_once_other_threads_have_read_what_they_were_at(tmp_path, monkeypatch):
    """SQLite's connection would be gone under their statement, and the process with it."""
    store = Store(tmp_path / "service")
    add_file(store)
    reads, goes_on, read = threading.Event(), threading.Event(), database._record

    def slow(*arguments):
        reads.set()
        assert goes_on.wait(60)
        return read(*arguments)

    monkeypatch.setattr(database, "_record", slow)
    with ThreadPoolExecutor(2) as threads:
        listed = threads.submit(lambda: store.files().data)
        assert reads.wait(60)
        closed = threads.submit(store.close)
        with pytest.raises(TimeoutError):
            closed.result(0.5)
        goes_on.set()
        assert len(listed.result(60)) == 1
        closed.result(60)
        assert isinstance(threads.submit(store.files).exception(60), sqlite3.ProgrammingError)
