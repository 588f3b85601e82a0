"""Training in the scheduler, piece by piece: the offline run's numbers, whatever happens between the pieces."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner_engine import (  # noqa: F401
    EVALUATION,
    TRAIN,
    config,
    engine,
    events,
    flush,
    kept,
    log_of,
    model_path,
    offline,
    process,
    series,
    spec_of,
    start,
    stop,
    tick,
    tick_to_step,
    tuned,
)
from sglang.srt.mezo.core.seed_log import LogRecord
from sglang.srt.mezo.service.wire.events import CheckpointSaved, Started, Succeeded
from sglang.srt.mezo.training.pass_sizes import read_pass_sizes
from small_disk import small_disk


@pytest.mark.parametrize("tuning", ["alora", "lora", "prefix"])
def test_pieces_give_the_series_of_the_offline_run_bit_for_bit(engine, config, model_path, tmp_path, tuning):
    config = tuned(config, tuning)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    assert series(config.output_dir) == series(whole.output_dir)
    assert log_of(config.output_dir) == log_of(whole.output_dir)
    kinds = list(map(type, engine.call(events)))
    assert kinds[0] is Started and kinds[-1] is Succeeded and kinds.count(CheckpointSaved) == 2


def test_pieces_are_long_until_a_request_comes_and_the_run_says_which_steps_were_cut_how(
    engine, config, model_path, tmp_path
):
    config = replace(config, r=4, max_tokens_per_batch=32, per_device_train_batch_size=8)
    engine.call(set_piece_sizes, 8, 32)
    assert start(engine, config, model_path)[0]
    engine.call(tick_to_step, 2)
    assert engine.call(tick_beside_a_request, 11) == {8}
    engine.call(tick)
    sizes = read_pass_sizes(Path(config.output_dir) / "passes.jsonl")
    assert list(sizes) == [2, 3], "a step that was cut in its midst, and those after it"
    assert [tokens for tokens, _ in sizes[2]] == [32, 8] and [tokens for tokens, _ in sizes[3]] == [8]
    engine.call(flush)
    again = replace(config, output_dir=str(tmp_path / "again"))
    engine.call(train_in_pieces, again, spec_of(config, model_path), sizes)
    assert log_of(again.output_dir) == log_of(config.output_dir)


def set_piece_sizes(engine, beside_requests, idle):
    engine.runner._describe().update(micro_step_tokens=beside_requests, idle_step_tokens=idle)


def request(rid: str, tokens: int) -> SimpleNamespace:
    """As the scheduler has one that waits."""
    sampling = SimpleNamespace(max_new_tokens=1)
    return SimpleNamespace(rid=rid, lora_id=None, origin_input_ids=[1] * (tokens - 1), sampling_params=sampling)


def tick_beside_a_request(engine, pieces):
    """The sizes of so many pieces after a request has been served; the first ones of the step ran before it."""
    runner, sizes = engine.runner, set()
    step = runner._job.learner.global_step
    for _ in range(runner._job.learner.config.num_perturbations + 1):  # directions written, and a forward pass
        runner.tick()
    assert runner._job.learner.global_step == step
    waiting = engine.scheduler.waiting_queue
    waiting.append(request("HEALTH_CHECK_1", tokens=1))
    runner.tick()
    assert runner._pacer.quiet, "a probe is no request"
    waiting[0].rid = "somebody"
    runner.tick()
    waiting.clear()
    for _ in range(pieces):
        runner.tick()
        sizes.add(runner._job.learner.scorer.max_tokens)
    return sizes


def test_all_that_runs_the_model_or_fills_its_slots_queues_behind_the_batch_in_flight(engine, config, model_path):
    assert start(engine, replace(config, r=4), model_path)[0]
    assert engine.call(streams_of_work) == {"calibration": True, "claim": True, "piece": True}
    stop(engine)


def streams_of_work(engine):
    """Kind of work -> whether it ran on the stream of forward passes."""
    from contextlib import contextmanager

    from sglang.srt.mezo.service.scheduler import calibrate, runner

    on_stream, seen, running = [], {}, engine.runner

    @contextmanager
    def forward_stream():
        on_stream.append(True)
        yield
        on_stream.pop()

    def seeing(kind, function):
        def call(*args, **kwargs):
            seen[kind] = bool(on_stream)
            return function(*args, **kwargs)

        return call

    running._description, original = None, runner.forward_stream
    runner.forward_stream = lambda scheduler: forward_stream()
    slots = running._job.learner.points
    slots.claim = seeing("claim", slots.claim)
    running._job.advance = seeing("piece", running._job.advance)
    runner.calibrate = seeing("calibration", calibrate.calibrate)
    try:
        running.tick()
    finally:
        runner.calibrate, runner.forward_stream = calibrate.calibrate, original
    return seen


def train_in_pieces(engine, config, spec, sizes):
    """A run whose passes are of the sizes that another has written down."""
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.training.run import TrainingRun
    from sglang.srt.mezo.training.tracking import Tracker
    from sglang.srt.mezo.training.trainer import MezoTrainer

    trainer = MezoTrainer(engine.handle, config, spec, TRAIN, EVALUATION)
    run = drain(TrainingRun.open(trainer, Tracker))
    while trainer.global_step < trainer.max_steps:
        last = max((step for step in sizes if step <= trainer.global_step), default=None)
        of_step = [tokens for tokens, pieces in sizes.get(last, []) for _ in range(pieces)] or [
            config.max_tokens_per_batch
        ]
        passes, result = trainer.step_passes(trainer.batch(trainer.global_step)), None
        for number in itertools.count():
            trainer.scorer.max_tokens = of_step[min(number, len(of_step) - 1)]
            try:
                next(passes)
            except StopIteration as stop:
                result = stop.value
                break
        run._record._log.append(LogRecord(result.zo_random_seed, result.learning_rate, result.projected_grad))
    run.close()
    trainer.close()


@pytest.mark.parametrize("tuning", ["alora", "prefix"])
def test_flushes_between_pieces_change_nothing_but_time(engine, config, model_path, tmp_path, tuning):
    config = tuned(config, tuning)
    whole = offline(engine, config, model_path, tmp_path)
    assert start(engine, config, model_path)[0]
    for pieces in (1, 4, 9, 2, 30):
        engine.call(tick, pieces)
        engine.call(flush)
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Succeeded)
    # A prefix that is computed again shares its pass with others than the first time: the last bits may differ.
    for flushed, quiet in zip(series(config.output_dir), series(whole.output_dir), strict=True):
        assert flushed[1] + flushed[2] == pytest.approx(quiet[1] + quiet[2], rel=1e-5)


@pytest.mark.parametrize("tuning", ["alora", "prefix"])
def test_stopped_and_started_again_it_ends_as_the_whole_run(engine, config, model_path, tmp_path, tuning):
    config = tuned(config, tuning)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    resumed = config
    for pieces in (7, 40, 3, 11):
        assert start(engine, resumed, model_path)[0]
        engine.call(tick, pieces)
        stop(engine)
        resumed = replace(config, resume_from_checkpoint=True)
    assert start(engine, resumed, model_path)[0]
    engine.call(tick)
    assert log_of(config.output_dir) == log_of(whole.output_dir)
    first, second = (json.loads((Path(c.output_dir) / "trainer_state.json").read_text()) for c in (config, whole))
    assert (first["best_global_step"], first["best_metric"]) == (
        second["best_global_step"],
        pytest.approx(second["best_metric"]),
    )


def test_a_run_on_a_full_disk_stops_and_goes_on_when_there_is_room(engine, config, model_path, tmp_path):
    """Wherever the room ends: while the folder is made, in a line of metrics, a checkpoint, the best adapter, the
    result."""
    config = replace(config, r=4)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        config = replace(config, output_dir=str(disk.path / "run"))
        stops = 0
        for pages in (1, 5, 8, 4, 6, 2, 3, 9, 9, 9, 9, None):
            disk.free()
            if pages is not None:
                disk.fill(pages)
            begun = (disk.path / "run" / "seed_log").exists()
            assert start(engine, replace(config, resume_from_checkpoint=begun), model_path)[0]
            engine.call(tick)
            last = engine.call(events)[-1]
            if isinstance(last, Succeeded):
                break
            assert last.code == "disk_full" and "No space left on device" in last.message
            stops += 1
        assert isinstance(last, Succeeded) and stops >= 4
        assert log_of(config.output_dir) == log_of(whole.output_dir)
        assert [step for step, *_ in series(config.output_dir)] == sorted(
            {step for step, *_ in series(config.output_dir)}
        )
        assert not list(disk.path.glob("run/**/.*"))


def test_kept_prefixes_stay_within_their_budget_and_go_when_the_pool_is_wanted(engine, config, model_path):
    assert start(engine, replace(config, r=4), model_path)[0]
    engine.call(tick_to_step, 2)
    assert 0 < engine.call(kept) <= 0.25 * 3000
    with_pool_taken, after = engine.call(tick_with_the_pool_taken)
    assert with_pool_taken == 0, "requests need the room"
    assert after > 0, "the job goes on"
    stop(engine)


def tick_with_the_pool_taken(engine):
    handle, runner = engine.handle, engine.runner
    step = runner._job.learner.global_step
    taken = handle.kv_allocator.alloc(handle.kv_allocator.available_size())
    runner.tick()
    locked = kept(engine)
    handle.kv_allocator.free(taken)
    runner._retry_at = 0
    while runner._job.learner.global_step == step:
        runner.tick()
    return locked, kept(engine)


def test_points_in_the_pool_go_when_requests_want_it_and_come_again(engine, config, model_path, tmp_path):
    config = tuned(config, "prefix")
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    assert start(engine, config, model_path)[0]
    engine.call(tick_to_step, 2)
    assert engine.call(tick_while_requests_want_the_pool) == [True, False, False, True]
    assert engine.call(tick_while_a_request_wants_more_than_is_free) == [True, False, True]
    engine.call(tick)
    assert log_of(config.output_dir) == log_of(whole.output_dir)


def tick_while_requests_want_the_pool(engine):
    """Whether the engine has the points: before, twice while requests have taken the pool, and once they leave."""
    from sglang.srt.mem_cache.allocation import alloc_token_slots

    handle, runner = engine.handle, engine.runner
    points, load = runner._job.learner.points, runner._load
    found = [points.claimed]
    runner._load = lambda: (1, 0)
    taken = alloc_token_slots(handle.tree_cache, handle.free_kv_tokens - 100)
    for _ in range(2):
        runner.tick()
        found.append(points.claimed)
    handle.kv_allocator.free(taken)
    runner.tick()
    runner._load = load
    return [*found, points.claimed]


def tick_while_a_request_wants_more_than_is_free(engine):
    """Whether the engine has the points: before, while the request waits, and once it does not."""
    runner, waiting = engine.runner, engine.scheduler.waiting_queue
    points = runner._job.learner.points
    found = [points.claimed]
    waiting.append(request("long", engine.handle.free_kv_tokens + 1))
    runner.tick()
    found.append(points.claimed)
    waiting.clear()
    runner.tick()
    return [*found, points.claimed]


@pytest.mark.parametrize("tuning", ["alora", "prefix"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_for_which_there_is_no_room_waits_for_requests_to_end(
    engine, config, model_path, tmp_path, tuning, step
):
    config = tuned(config, tuning)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    assert start(engine, config, model_path)[0]
    engine.call(tick_to_step, step)
    assert engine.call(tick_while_requests_hold_every_row) == ("job", 0)
    engine.call(tick)
    assert log_of(config.output_dir) == log_of(whole.output_dir)


def tick_while_requests_hold_every_row(engine):
    """The job that has the engine after a tick without room, and the steps that it made."""
    pool, runner = engine.handle.req_to_token_pool, engine.runner
    step = runner._job.learner.global_step
    runner._load, load = lambda: (1, 0), runner._load
    runner._pacer.allows = lambda running, waiting: True
    rows = pool.alloc_rows(pool.available_size())
    for _ in range(5):
        runner._retry_at = 0
        runner.tick()
    made = runner._job.learner.global_step - step
    pool.free_rows(rows)
    runner._load, runner._retry_at = load, 0
    return runner._job.job_id, made


def test_a_job_that_never_fits_fails_and_leaves_the_engine(engine, config, model_path):
    assert start(engine, replace(config, r=4), model_path)[0]
    assert engine.call(tick_in_a_pool_without_room) == []
    failed = engine.call(events)[-1]
    assert failed.code == "CapacityError" and "rows" in failed.message


def tick_in_a_pool_without_room(engine):
    pool = engine.handle.req_to_token_pool
    rows = pool.alloc_rows(pool.available_size())
    for _ in range(50):
        engine.runner._retry_at = 0
        engine.runner.tick()
    pool.free_rows(rows)
    return [] if engine.runner._job is None else [engine.runner._job.learner.global_step]
