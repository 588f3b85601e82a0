"""Training in the scheduler, piece by piece: the offline run's numbers, whatever happens between the pieces."""

import itertools
import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import LogError
from sglang.srt.mezo.core.seed_log import LogRecord, SeedLog
from sglang.srt.mezo.service.wire.packed import pack
from sglang.srt.mezo.training.pass_sizes import read_pass_sizes
from small_disk import small_disk

TARGETS = ("q_proj", "v_proj")
OPTIONS = [(11,), (12,)]
TRAIN = oracle.examples(10, OPTIONS)
EVALUATION = oracle.examples(6, OPTIONS, seed=1)


# --- run in the engine's process --------------------------------------------------------------------------------------


def make_runner(engine, **settings):
    """The engine's runner, kept on the scheduler as in a server; events are collected instead of sent."""
    from sglang.srt.mezo.service.scheduler.runner import MezoRunner
    from sglang.srt.mezo.service.wire.settings import ServiceSettings

    runner = MezoRunner(engine.scheduler, ServiceSettings(enabled=True, **settings))
    runner.events = []
    runner._emit = runner.events.append
    engine.runner = runner
    send(engine, "Describe", {})


def send(engine, name, fields):
    from sglang.srt.mezo.service.wire import messages

    reply = engine.runner.handle(messages.MezoReqInput(command=getattr(messages, name)(**fields)))
    return reply.success, reply.message, reply.param, reply.result


def tick(engine, pieces=10**6):
    """Tick until the job has no more work, or so often; then what an idle scheduler checks must hold."""
    while pieces and engine.runner.has_work:
        engine.runner.tick()
        pieces -= 1
    checker = engine.scheduler.invariant_checker
    leaks, messages = checker._check_all_pools(engine.scheduler.pool_stats_observer.get_pool_stats())
    assert not leaks, messages
    checker._check_req_pool()


def flush(engine):
    assert engine.scheduler.flush_cache()
    engine.runner.on_flush()


def events(engine):
    taken, engine.runner.events = engine.runner.events, []
    engine.runner._emit = engine.runner.events.append
    return [(event.kind, event.step, event.message, event.data) for event in taken]


def held(engine):
    from sglang.srt.mezo.engine import lora_capacity

    handle, manager = engine.handle, engine.handle.lora_manager
    registries = [sorted(known) for known in (manager.configs, manager.loras, manager.lora_refs)]
    in_pool = sorted(uid for uid in manager.memory_pool.uid_to_buffer_id if uid is not None)
    loaded = sum(map(len, engine.runner._loaded.values()))
    return (
        handle.free_kv_tokens,
        handle.free_rows,
        manager.num_pinned_loras,
        registries,
        in_pool,
        lora_capacity._reserved,
        loaded,
    )


def end_job(engine):
    """What a failed test leaves."""
    if engine.runner._job is not None:
        engine.runner._end_job()


def kept(engine):
    return engine.runner._job.learner.scorer.base_prefixes.kept_tokens


def train_offline(engine, config, spec, train, evaluation):
    from contextlib import closing

    from sglang.srt.mezo.training.trainer import MezoTrainer

    engine.scheduler.flush_cache()
    with closing(MezoTrainer(engine.handle, config, spec, train, evaluation)) as trainer:
        return trainer.train()


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return oracle.save_model("opt-125m", tmp_path_factory.mktemp("opt") / "model")


@pytest.fixture(scope="module")
def process(model_path):
    process = EngineProcess(
        model_path=model_path,
        r=4,
        target_modules=TARGETS,
        num_slots=6,
        dtype="float32",
        skip_tokenizer_init=True,
        max_total_tokens=3000,
    )
    yield process
    process.close()


@pytest.fixture
def engine(process):
    process.call(make_runner)
    before = process.call(held)
    yield process
    process.call(end_job)
    assert process.call(held) == before


@pytest.fixture
def config(tmp_path) -> MezoConfig:
    return MezoConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=4,
        eval_steps=3,
        logging_steps=1,
        save_steps=4,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        num_perturbations=4,
        max_tokens_per_batch=16,
        disable_tqdm=True,
    )


def start(engine, config, model_path, job_id="job", train=TRAIN, evaluation=EVALUATION, segments=None, **fields):
    for split, examples in (("train", train), ("eval", evaluation)):
        for part in (examples[:3], examples[3:]):
            assert engine.call(send, "LoadExamples", {"job_id": job_id, "split": split, "examples": pack(part)})[0]
    invocation = list(oracle.INVOCATION) if config.tuning == "alora" else []
    fields = {
        "job_id": job_id,
        "config": config.to_dict(),
        "base_model": model_path,
        "target_modules": list(TARGETS),
        "invocation": invocation,
        "objective": "classification",
        "segments": segments or [(0, len(train))],
        **fields,
    }
    return engine.call(send, "StartJob", fields)


def stop(engine, job_id="job"):
    assert engine.call(send, "StopJob", {"job_id": job_id})[0]


def spec_of(config, model_path) -> AdapterSpec:
    return AdapterSpec(
        model_path, config.r, config.lora_alpha, TARGETS, oracle.INVOCATION if config.tuning == "alora" else ()
    )


def log_of(folder: str) -> bytes:
    return (Path(folder) / "seed_log").read_bytes()


def series(folder: str) -> list[tuple]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss_plus"], line["loss_minus"], line["projected_grad"])
        for line in lines
        if "loss_plus" in line
    ]


def offline(engine, config, model_path, tmp_path) -> MezoConfig:
    config = replace(config, output_dir=str(tmp_path / "offline"))
    engine.call(train_offline, config, spec_of(config, model_path), TRAIN, EVALUATION)
    return config


# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["alora", "lora"])
def test_pieces_give_the_series_of_the_offline_run_bit_for_bit(engine, config, model_path, tmp_path, tuning):
    config = replace(config, tuning=tuning, r=4)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    assert series(config.output_dir) == series(whole.output_dir)
    assert log_of(config.output_dir) == log_of(whole.output_dir)
    kinds = [kind for kind, *_ in engine.call(events)]
    assert kinds[0] == "started" and kinds[-1] == "succeeded" and kinds.count("checkpoint") == 2


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


def tick_beside_a_request(engine, pieces):
    """The sizes of so many pieces after a request has been served; the first ones of the step ran before it."""
    runner, sizes = engine.runner, set()
    step = runner._job.learner.global_step
    for _ in range(
        runner._job.learner.config.num_perturbations + 5
    ):  # directions drawn and written, and a forward pass
        runner.tick()
    assert runner._job.learner.global_step == step
    waiting = engine.scheduler.waiting_queue
    waiting.append(SimpleNamespace(rid="HEALTH_CHECK_1", lora_id=None))
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
    assert engine.call(streams_of_work) == {"describe": True, "claim": True, "piece": True}
    stop(engine)


def streams_of_work(engine):
    """Kind of work -> whether it ran on the stream of forward passes."""
    from contextlib import contextmanager

    from sglang.srt.mezo.service.scheduler import describe, runner

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

    running._forward_stream, running._description = forward_stream, None
    slots = running._job.learner.slots
    slots.claim = seeing("claim", slots.claim)
    running._job.advance = seeing("piece", running._job.advance)
    runner.describe = seeing("describe", describe.describe)
    try:
        running.tick()
    finally:
        runner.describe = describe.describe
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


def test_flushes_between_pieces_change_nothing_but_time(engine, config, model_path, tmp_path):
    config = replace(config, r=4)
    whole = offline(engine, config, model_path, tmp_path)
    assert start(engine, config, model_path)[0]
    for pieces in (1, 4, 9, 2, 30):
        engine.call(tick, pieces)
        engine.call(flush)
    engine.call(tick)
    assert [kind for kind, *_ in engine.call(events)][-1] == "succeeded"
    # A prefix that is computed again shares its pass with others than the first time: the last bits may differ.
    for flushed, quiet in zip(series(config.output_dir), series(whole.output_dir), strict=True):
        assert flushed[1] + flushed[2] == pytest.approx(quiet[1] + quiet[2], rel=1e-5)


def test_stopped_and_started_again_it_ends_as_the_whole_run(engine, config, model_path, tmp_path):
    config = replace(config, r=4)
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
            kind, _, message, data = engine.call(events)[-1]
            if kind == "succeeded":
                break
            assert (kind, data["code"]) == ("failed", "disk_full") and "No space left on device" in message
            stops += 1
        assert kind == "succeeded" and stops >= 4
        assert log_of(config.output_dir) == log_of(whole.output_dir)
        assert [step for step, *_ in series(config.output_dir)] == sorted(
            {step for step, *_ in series(config.output_dir)}
        )
        assert not list(disk.path.glob("run/**/.*"))


def test_rows_and_updates_that_find_no_room_are_not_there(engine, config, model_path, tmp_path):
    config = replace(config, r=4, max_steps=2)
    rows = [(list(e.prompt), [list(o) for o in e.options], e.label) for e in oracle.examples(6, OPTIONS, seed=2)]
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        config = replace(config, output_dir=str(disk.path / "run"))
        assert start(engine, config, model_path, evaluation=())[0]
        engine.call(tick_to_step, 1)
        disk.fill()
        assert engine.call(refused_for_room, "AppendExamples", {"job_id": "job", "examples": rows})
        assert engine.call(refused_for_room, "SaveAdapter", {"job_id": "job", "directory": str(disk.path / "saved")})
        disk.free()
        assert engine.call(send, "AppendExamples", {"job_id": "job", "examples": rows})[3] == {"step": 2}
        assert json.loads((Path(config.output_dir) / "segments.json").read_text())["parts"] == [[0, 10], [2, 6]]
        engine.call(tick)
        again = replace(config, resume_from_checkpoint=True)
        assert start(engine, again, model_path, evaluation=(), manual=True)[0]
        engine.call(tick)
        log = log_of(config.output_dir)
        update = {"job_id": "job", "zo_random_seed": 7, "projected_grad": [0.5, -0.5, 1.0, 0.0], "learning_rate": 1e-3}
        disk.fill()
        assert engine.call(refused_for_room, "ApplyUpdate", update)
        assert log_of(config.output_dir) == log
        disk.free()
        assert engine.call(send, "ApplyUpdate", update)[3] == {"step": 3}
        stop(engine)


def refused_for_room(engine, name, fields) -> bool:
    from sglang.srt.mezo.service.wire import messages

    reply = engine.runner.handle(messages.MezoReqInput(command=getattr(messages, name)(**fields)))
    return not reply.success and reply.code == "disk_full"


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


def test_a_step_for_which_there_is_no_room_waits_for_requests_to_end(engine, config, model_path, tmp_path):
    config = replace(config, r=4)
    whole = offline(engine, config, model_path, tmp_path)
    engine.call(flush)
    assert start(engine, config, model_path)[0]
    engine.call(tick_to_step, 2)
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
    (kind, _, message, data) = engine.call(events)[-1]
    assert (kind, data["code"]) == ("failed", "CapacityError") and "rows" in message


def tick_in_a_pool_without_room(engine):
    pool = engine.handle.req_to_token_pool
    rows = pool.alloc_rows(pool.available_size())
    for _ in range(50):
        engine.runner._retry_at = 0
        engine.runner.tick()
    pool.free_rows(rows)
    return [] if engine.runner._job is None else [engine.runner._job.learner.global_step]


def test_added_examples_count_from_the_next_step_and_after_a_restart(engine, config, model_path, tmp_path):
    config = replace(config, r=4)
    added = oracle.examples(6, OPTIONS, seed=2)
    parts = [(list(e.prompt), [list(o) for o in e.options], e.label) for e in added]
    logs = []
    for name, interrupted in (("whole", False), ("halves", True)):
        engine.call(flush)
        config = replace(config, output_dir=str(tmp_path / name), resume_from_checkpoint=False)
        assert start(engine, config, model_path, evaluation=())[0]
        engine.call(tick_to_step, 3)
        ok, _, _, result = engine.call(send, "AppendExamples", {"job_id": "job", "examples": parts})
        assert ok and result == {"step": 4}
        segments = json.loads((Path(config.output_dir) / "segments.json").read_text())["parts"]
        assert segments == [[0, 10], [4, 6]]
        if interrupted:
            engine.call(tick_to_step, 5)
            stop(engine)
            resumed = replace(config, resume_from_checkpoint=True)
            assert start(engine, resumed, model_path, train=TRAIN + added, evaluation=(), segments=segments)[0]
        engine.call(tick)
        logs.append(log_of(config.output_dir))
    assert logs[0] == logs[1]
    plain = replace(config, output_dir=str(tmp_path / "plain"))
    assert start(engine, plain, model_path, evaluation=())[0]
    engine.call(tick)
    assert log_of(plain.output_dir)[:160] == logs[0][:160] and log_of(plain.output_dir) != logs[0]


def tick_to_step(engine, step):
    while engine.runner._job is None or engine.runner._job.learner.global_step < step:
        engine.runner.tick()


def test_single_operations_take_the_steps_of_the_run(engine, config, model_path, tmp_path):
    """evaluate + update by hand, with a step's seed and batch, is that step."""
    config = replace(config, r=4, max_steps=2, lr_scheduler_type="constant", load_best_model_at_end=False)
    assert start(engine, config, model_path, evaluation=())[0]
    engine.call(tick)
    (record, _) = SeedLog.open(Path(config.output_dir) / "seed_log").records()
    by_hand = replace(config, output_dir=str(tmp_path / "by_hand"))
    assert start(engine, by_hand, model_path, evaluation=(), manual=True)[0]
    engine.call(tick)
    engine.call(events)
    batch = engine.call(first_batch)
    command = {
        "job_id": "job",
        "operation": "a",
        "examples": batch,
        "zo_random_seed": record.seed,
        "zo_eps": config.zo_eps,
    }
    assert engine.call(send, "EvaluatePerturbed", command)[0]
    assert engine.call(send, "EvaluatePerturbed", command)[2] == "job", "one at a time"
    engine.call(tick)
    ((kind, _, _, data),) = engine.call(events)
    assert (kind, data["operation"]) == ("evaluated", "a")
    assert data["projected_grad"] == pytest.approx(record.projected_grads, rel=1e-6)
    update = {
        "job_id": "job",
        "zo_random_seed": record.seed,
        "projected_grad": data["projected_grad"],
        "learning_rate": record.learning_rate,
    }
    assert engine.call(send, "ApplyUpdate", update)[3] == {"step": 1}
    assert engine.call(send, "ApplyUpdate", {**update, "projected_grad": [1.0]})[2] == "projected_grad"
    folder = tmp_path / "saved"
    assert engine.call(send, "SaveAdapter", {"job_id": "job", "directory": str(folder)})[3] == {"step": 1}
    stop(engine)
    assert SeedLog.open(Path(by_hand.output_dir) / "seed_log").records() == [record]
    saved, rebuilt = (empty_adapter(by_hand, model_path) for _ in range(2))
    saved.load_weights(folder)
    rebuilt.load_weights(Path(by_hand.output_dir) / "initial_adapter")
    SeedLog.open(Path(by_hand.output_dir) / "seed_log").replay(rebuilt.theta)
    assert torch.equal(saved.theta, rebuilt.theta)


def first_batch(engine):
    trainer = engine.runner._job.learner
    chosen = [TRAIN[i] for i in trainer.stream.batch(0)]
    return [(list(e.prompt), [list(o) for o in e.options], e.label) for e in chosen]


def empty_adapter(config, model_path) -> Adapter:
    from safetensors.torch import load_file

    from sglang.srt.mezo.adapters.adapter import Site

    state = load_file(Path(config.output_dir) / "initial_adapter" / "adapter_model.safetensors")
    names = sorted({name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in state})
    sites = [
        Site(
            name,
            state[f"base_model.model.{name}.lora_A.weight"].shape[1],
            state[f"base_model.model.{name}.lora_B.weight"].shape[0],
        )
        for name in names
    ]
    return Adapter(spec_of(config, model_path), sites)


def test_updates_of_a_finished_job_go_on_from_the_adapter_that_is_served(engine, config, model_path):
    config = replace(config, r=4)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    (_, steps, _, data) = engine.call(events)[-1]
    best = data["best_step"]
    assert best < steps == 8, "the case of interest"
    again = replace(config, resume_from_checkpoint=True)
    for expected in (best + 1, best + 2):
        assert start(engine, again, model_path, manual=True)[0]
        engine.call(tick)
        update = {"job_id": "job", "zo_random_seed": 7, "projected_grad": [0.5, -0.5, 1.0, 0.0], "learning_rate": 1e-3}
        assert engine.call(send, "ApplyUpdate", update)[3] == {"step": expected}
        stop(engine)
        assert len(SeedLog.open(Path(config.output_dir) / "seed_log")) == expected


def test_a_job_whose_log_is_damaged_goes_on_before_the_damage_and_says_so(engine, config, model_path):
    config = replace(config, r=4)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    whole = log_of(config.output_dir)
    engine.call(events)
    path = Path(config.output_dir) / "seed_log"
    record = len(whole) - 4 * (8 + 8 + 4 * 4 + 4)  # the fifth of eight
    path.write_bytes(whole[:record] + bytes([whole[record] ^ 4]) + whole[record + 1 :])
    again = replace(config, resume_from_checkpoint=True)

    assert start(engine, again, model_path, manual=True)[0]
    engine.call(tick)
    ((kind, _, message, data),) = engine.call(events)
    assert (kind, data["code"]) == ("failed", "LogError"), "a single operation must not get another adapter"
    assert f"{path} is damaged: record 5 of 8" in message

    assert start(engine, again, model_path)[0]
    engine.call(tick)
    told = engine.call(events)
    assert [kind for kind, *_ in told][:2] == ["warning", "started"] and told[-1][0] == "succeeded"
    assert "record 5 of 8" in told[0][2] and "goes on from step 4" in told[0][2] and told[1][1] == 4
    assert log_of(config.output_dir) == whole
    state = json.loads((path.parent / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [0, 3, 6, 8]


def tick_beside_adapters(engine, adapters):
    """Whether the job has its slots after a tick while requests of so many adapters are in the batch, and after they
    are done; whether a batch with one adapter more, and one of theirs alone, would be admitted in between."""
    from types import SimpleNamespace

    from sglang.srt.mezo.engine import lora_capacity

    runner, manager, scheduler = engine.runner, engine.handle.lora_manager, engine.scheduler
    ids = {f"adapter {i}" for i in range(adapters)}
    scheduler.running_batch, batch = (
        SimpleNamespace(reqs=[SimpleNamespace(rid="a", lora_id=one) for one in ids]),
        scheduler.running_batch,
    )
    runner.tick()
    beside = runner._job.learner.slots.claimed
    admitted = lora_capacity.admits(manager, {*ids, "another"}), lora_capacity.admits(manager, {"adapter 0"})
    scheduler.running_batch = batch
    runner.tick()
    return beside, admitted, runner._job.learner.slots.claimed, lora_capacity.admits(manager, ids)


def test_slots_are_taken_only_once_requests_in_flight_leave_the_room(engine, config, model_path):
    """Of the pool's 7 slots the job needs 5 and the base model one."""
    for adapters, claimed in ((1, True), (2, False), (4, False)):
        assert start(engine, replace(config, r=4, output_dir=f"{config.output_dir}-{adapters}"), model_path)[0]
        beside, admitted, after, again = engine.call(tick_beside_adapters, adapters)
        assert beside == claimed and after and again
        assert admitted == ((True, True) if claimed else (False, True)), (
            "room is made, and what leaves it is served meanwhile"
        )
        stop(engine)


@pytest.mark.parametrize(
    ("settings", "fields", "param", "message"),
    [
        ({"r": 64}, {}, None, "rank"),
        ({}, {"target_modules": ["gate_proj"]}, "target_modules", "gate_proj"),
        ({"zo_eps": -1.0}, {}, "zo_eps", "positive"),
        ({}, {"segments": [(0, 10), (4, 6)]}, "segments", "10 examples"),
    ],
)
def test_a_job_that_cannot_start_is_refused_and_holds_nothing(
    engine, config, model_path, settings, fields, param, message
):
    raw = {**replace(config, r=4).to_dict(), **settings}

    class Raw:
        tuning, to_dict = "alora", staticmethod(lambda: raw)

    ok, text, at, _ = start(engine, Raw, model_path, **fields)
    assert not ok and at == param and message in text
    assert start(engine, replace(config, r=4), model_path)[0], "the engine is free"
    stop(engine)


@pytest.mark.parametrize(
    "targets", [names for n in (1, 2, 3) for names in combinations(["q_proj", "k_proj", "v_proj"], n)], ids="-".join
)
def test_every_subset_of_a_fused_layer_can_be_trained(engine, config, model_path, targets):
    config = replace(config, r=4, max_steps=2)
    assert start(engine, config, model_path, target_modules=list(targets))[0]
    engine.call(tick)
    kind, _, message, _ = engine.call(events)[-1]
    assert kind == "succeeded", message
    saved = json.loads((Path(config.output_dir) / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(targets)


@pytest.mark.parametrize("tuning", ["alora", "lora"])
def test_a_run_goes_on_from_an_adapter_and_needs_its_folder_once(engine, config, model_path, tmp_path, tuning):
    first = replace(config, tuning=tuning, r=4, max_steps=3, save_steps=0)
    assert start(engine, first, model_path)[0]
    engine.call(tick)
    origin = tmp_path / "origin"
    shutil.copytree(Path(first.output_dir) / "adapter", origin)
    logs = []
    for name, stops in (("whole", ()), ("halves", (9, 30))):
        engine.call(flush)
        further = replace(first, output_dir=str(tmp_path / name), init_from="served:first", max_steps=4, seed=5)
        for pieces in stops:
            assert start(engine, further, model_path, start=str(origin))[0]
            engine.call(tick, pieces)
            stop(engine)
            further = replace(further, resume_from_checkpoint=True)
            origin.rename(tmp_path / "elsewhere") if origin.exists() else None
        assert start(engine, further, model_path, start=str(origin))[0]
        engine.call(events)
        engine.call(tick)
        assert engine.call(events)[-1][0] == "succeeded"
        logs.append(log_of(further.output_dir))
        assert tensors_in(tmp_path / name / "initial_adapter") == tensors_in(Path(first.output_dir) / "adapter")
        assert json.loads((tmp_path / name / "config.json").read_text())["init_from"] == "served:first"
    assert logs[0] == logs[1]
    log = SeedLog.open(tmp_path / "whole" / "seed_log")
    begun = empty_adapter(further, model_path)
    begun.load_weights(tmp_path / "whole" / "initial_adapter")
    log.require_initial(begun.theta)
    begun.load_weights(Path(first.output_dir) / "initial_adapter")
    with pytest.raises(LogError):
        log.require_initial(begun.theta)


def tensors_in(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"r": 2}, "r", "4, as the adapter"),
        ({"tuning": "lora"}, "tuning", "'alora', as the adapter"),
        ({}, "init_from", "adapter_config.json"),
    ],
)
def test_a_job_that_contradicts_the_adapter_that_it_goes_on_from_is_refused(
    engine, config, model_path, tmp_path, settings, field, message
):
    first = replace(config, r=4, max_steps=1, save_steps=0)
    assert start(engine, first, model_path)[0]
    engine.call(tick)
    folder = Path(first.output_dir) / "adapter"
    if not settings:
        (folder / "adapter_config.json").unlink()
    further = replace(first, output_dir=str(tmp_path / "further"), init_from="served:first", **settings)
    ok, text, at, _ = start(engine, further, model_path, start=str(folder))
    assert not ok and at == field and message in text


# --- what fails while a job is set up ---------------------------------------------------------------------------------


def fail_once(engine, place, call):
    """The ``call``-th call of a function of the engine ends as if the memory did."""
    from sglang.srt.mezo.engine.slots import SlotLayout

    owner, name = {
        "loading": (engine.handle.lora_manager, "load_lora_weights_from_tensors"),
        "fetching": (engine.handle.lora_manager, "fetch_new_loras"),
        "writing": (SlotLayout, "targets"),
        "computing": (engine.handle.model_runner.model.model, "forward"),
        "inserting": (engine.scheduler.tree_cache, "insert"),
    }[place]
    original, calls = getattr(owner, name), iter(range(call - 1, -1, -1))

    def failing(*arguments, **named):
        if next(calls, None) == 0:
            raise MemoryError(f"no memory while {place}")
        return original(*arguments, **named)

    engine.restore = (owner, name, original)
    setattr(owner, name, failing)


def restore(engine):
    setattr(*engine.restore)


@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["loading", "fetching", "writing", "computing", "inserting"])
def test_a_job_that_fails_as_it_is_set_up_gives_back_all_that_it_took(
    engine, config, model_path, tmp_path, place, call
):
    before = engine.call(flush) or engine.call(held)
    assert start(engine, replace(config, r=4, max_steps=2), model_path)[0]
    engine.call(fail_once, place, call)
    try:
        engine.call(tick)
    finally:
        engine.call(restore)
    kind, _, message, _ = engine.call(events)[-1]
    assert kind == "failed" and f"no memory while {place}" in message
    engine.call(flush)
    assert engine.call(held) == before
    again = replace(config, r=4, max_steps=2, output_dir=str(tmp_path / "again"))
    assert start(engine, again, model_path)[0]
    engine.call(tick)
    assert engine.call(events)[-1][0] == "succeeded"


def pin_another(engine, names):
    """Adapters that a request pins while a job waits for its slots."""
    from sglang.srt.lora.lora_registry import LoRARef

    refs = [LoRARef(lora_name=name, lora_path="__tensor__", pinned=True) for name in names]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    state = {
        f"base_model.model.model.decoder.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(*shape)
        for layer in range(2)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    for ref in refs:
        result = engine.handle.lora_manager.load_lora_adapter_from_tensors(ref, state, config)
        assert result.success, result.error_message
    engine.pinned = refs


def unpin(engine):
    for ref in engine.pinned:
        engine.handle.lora_manager.unload_lora_adapter(ref)


def test_slots_that_others_pin_in_the_meantime_end_the_job_and_no_other(engine, config, model_path, tmp_path):
    """The job needs five slots; six are free as it starts, and four when it comes to take them."""
    before = engine.call(held)
    assert start(engine, replace(config, r=4), model_path)[0]
    engine.call(pin_another, ["mezo-current", "mine"])
    try:
        engine.call(tick, 20)
        stop(engine)
    finally:
        engine.call(unpin)
    assert engine.call(held) == before
    assert start(engine, replace(config, r=4, max_steps=1, output_dir=str(tmp_path / "again")), model_path)[0]
    engine.call(tick)
    assert engine.call(events)[-1][0] == "succeeded"


def test_a_users_adapter_of_any_name_is_in_no_jobs_way(engine, config, model_path):
    engine.call(pin_another, ["mezo-current"])
    try:
        assert start(engine, replace(config, r=4, max_steps=1), model_path)[0]
        engine.call(tick)
        assert engine.call(events)[-1][0] == "succeeded"
    finally:
        engine.call(unpin)


def damage_state(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("{")


def damage_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()


def damage_initial_adapter(folder: Path) -> None:
    (folder / "initial_adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)


@pytest.mark.parametrize("damage", [damage_state, damage_metrics, damage_initial_adapter])
def test_a_run_that_cannot_be_taken_up_leaves_engine_and_files_free(engine, config, model_path, damage, tmp_path):
    config = replace(config, r=4, max_steps=2)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    folder, kept = Path(config.output_dir), tmp_path / "kept"
    shutil.copytree(folder, kept)
    before = engine.call(held)
    damage(folder)
    assert start(engine, replace(config, resume_from_checkpoint=True, max_steps=4), model_path)[0]
    engine.call(tick)
    assert engine.call(events)[-1][0] == "failed"
    assert engine.call(held) == before
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    assert start(engine, replace(config, resume_from_checkpoint=True, max_steps=4), model_path)[0], (
        "the log has no other writer"
    )
    engine.call(tick)
    assert engine.call(events)[-1][0] == "succeeded"


def test_a_folder_that_cannot_be_made_ends_the_job_and_no_other(engine, config, model_path, tmp_path):
    before = engine.call(held)
    (tmp_path / "file").write_text("")
    assert start(engine, replace(config, r=4, output_dir=str(tmp_path / "file")), model_path)[0]
    engine.call(tick)
    assert engine.call(events)[-1][0] == "failed"
    assert engine.call(held) == before


def test_commands_for_another_job_are_refused(engine, config, model_path):
    assert engine.call(send, "SaveAdapter", {"job_id": "job", "directory": "x"})[1].endswith("(none has)")
    assert start(engine, replace(config, r=4), model_path)[0]
    ok, message, param, _ = start(engine, replace(config, r=4), model_path, job_id="second")
    assert (ok, param) == (False, "job") and "one job at a time" in message
    assert engine.call(send, "AppendExamples", {"job_id": "second", "examples": []})[2] == "job"
    assert engine.call(send, "SaveAdapter", {"job_id": "job", "directory": "x"})[1].endswith("brought to its last step")
    stop(engine, "second")
    engine.call(tick_to_step, 1)
    stop(engine)


def test_the_description_says_what_a_job_may_ask(engine):
    ok, _, _, description = engine.call(send, "Describe", {})
    assert ok and description["max_lora_rank"] == 4 and description["max_loras_per_batch"] == 7
    assert description["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert description["default_target_modules"] == {
        "alora": ["q_proj", "k_proj", "v_proj"],
        "lora": ["q_proj", "v_proj"],
    }
    assert description["context_length"] == 128 and description["kv_capacity"] == 3000 and description["no_alora"] == ""
    tokens = description["micro_step_tokens"]
    assert tokens >= 8 and tokens & (tokens - 1) == 0


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [([1e30], 1e6), ([3e38], 1e6), ([1e20], 1.0)])
def test_an_update_that_overflows_is_refused_and_changes_nothing(engine, config, model_path, tmp_path, update):
    grads, rate = update
    config = replace(config, r=4, num_perturbations=1, estimator="two_sided", scale_by_loss_std=False)
    assert start(engine, config, model_path, evaluation=(), manual=True)[0]
    engine.call(tick)
    good = {"job_id": "job", "zo_random_seed": 7, "projected_grad": [0.5], "learning_rate": 1e-3}
    assert engine.call(send, "ApplyUpdate", good)[3] == {"step": 1}
    log = log_of(config.output_dir)
    success, message, param, _ = engine.call(
        send, "ApplyUpdate", {**good, "projected_grad": grads, "learning_rate": rate}
    )
    assert (success, param) == (False, "projected_grad")
    assert all(word in message for word in ("projected_grad=", f"learning_rate={rate:g}", "finite"))
    assert log_of(config.output_dir) == log
    assert engine.call(send, "ApplyUpdate", {**good, "zo_random_seed": 8})[3] == {"step": 2}
    engine.call(send, "SaveAdapter", {"job_id": "job", "directory": str(tmp_path / "saved")})
    stop(engine)
    log = SeedLog.open(Path(config.output_dir) / "seed_log")
    assert [record.seed for record in log.records()] == [7, 8]
    saved, rebuilt = (empty_adapter(config, model_path) for _ in range(2))
    saved.load_weights(tmp_path / "saved")
    rebuilt.load_weights(Path(config.output_dir) / "initial_adapter")
    log.replay(rebuilt.theta)
    assert torch.equal(saved.theta, rebuilt.theta)


def test_a_run_that_diverges_ends_with_its_last_logged_state_and_spoils_no_prefix(engine, config, model_path):
    engine.call(flush)
    expected = engine.call(base_values, config)
    engine.call(flush)
    config = replace(config, r=4, eval_steps=100, max_steps=100)
    assert start(engine, config, model_path, evaluation=())[0]
    engine.call(advance_to, 3)
    engine.call(make_too_large)
    engine.call(tick)
    kind, step, message, data = engine.call(events)[-1]
    assert (kind, data["code"]) == ("failed", "DivergedError") and "lower learning_rate" in message
    log = SeedLog.open(Path(config.output_dir) / "seed_log")
    assert len(log) == step >= 3
    torch.testing.assert_close(engine.call(base_values, config), expected, atol=1e-6, rtol=0)


def advance_to(engine, step):
    while engine.runner._job.learner.global_step < step:
        engine.runner.tick()


def make_too_large(engine):
    """As a few more steps at a learning rate that is too large would."""
    engine.runner._job.learner.adapter.theta.fill_(1e18)


def base_values(engine, config):
    """What the base model makes of the training examples, over the prefixes that the tree holds."""
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.scoring.plan import Planner
    from sglang.srt.mezo.scoring.scorer import Scorer

    planner = Planner(config.tuning, oracle.INVOCATION)
    values = drain(
        Scorer(engine.handle, planner.scope, 64).passes(
            [planner.plan(example) for example in TRAIN], [(None,)], "classification"
        )
    )
    assert values.isfinite().all()
    return values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("tuning", ["alora", "lora"])
def test_a_slot_whose_numbers_are_not_finite_leaves_the_others_of_its_pass_alone(
    engine, config, model_path, tuning, value
):
    config = replace(config, r=4, tuning=tuning, max_tokens_per_batch=512)
    clean, spoiled, base = engine.call(score_beside, config, spec_of(config, model_path), value)
    assert not spoiled[1].isfinite().any(), "the slot in question shows it"
    others = [slot for slot in range(len(clean)) if slot != 1]
    assert clean.isfinite().all() and torch.equal(spoiled[others], clean[others])
    torch.testing.assert_close(base, engine.call(base_values, config), atol=1e-6, rtol=0)


def score_beside(engine, config, spec, value):
    """Values of four directions in one pass; the same with `value` for weights in the second slot; then those of the
    base model."""
    from contextlib import closing

    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.training.trainer import MezoTrainer

    with closing(MezoTrainer(engine.handle, config, spec, TRAIN)) as trainer:
        slots = [trainer.slots.of_direction(place)[0] for place in range(4)]
        for seed, slot in enumerate(slots):
            slot.write(0.1 * torch.randn(trainer.adapter.numel, generator=torch.Generator().manual_seed(seed)))
        found = []
        for spoil in (False, True):
            engine.scheduler.flush_cache()
            if spoil:
                slots[1].write(torch.full((trainer.adapter.numel,), value))
            found.append(
                drain(trainer.scorer.passes(trainer.train_plans, [tuple(slot.lora_id for slot in slots)], "completion"))
            )
        base = base_values(engine, config)
        engine.scheduler.flush_cache()
    return *found, base
