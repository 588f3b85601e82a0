"""What is asked of a job while the scheduler has it: more rows, single operations, and numbers that overflow."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oracle
from runner_engine import (  # noqa: F401
    OPTIONS,
    TRAIN,
    begun_with,
    config,
    engine,
    events,
    first_batch,
    flush,
    held,
    log_of,
    model_path,
    process,
    send,
    spec_of,
    start,
    stop,
    tick,
    tick_to_step,
)
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.service.wire.events import Started, Succeeded
from sglang.srt.mezo.service.wire.packed import pack
from small_disk import small_disk


def test_rows_and_updates_that_find_no_room_are_not_there(engine, config, model_path, tmp_path):
    config = replace(config, r=4, max_steps=3)
    rows = pack(oracle.examples(6, OPTIONS, seed=2))
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
        engine.call(tick_to_step, 2)
        refused = engine.call(reply_to, "AppendExamples", {"job_id": "job", "examples": rows})
        assert not refused.success and "none any more: the last of 3 steps is under way" in refused.message
        assert json.loads((Path(config.output_dir) / "segments.json").read_text())["parts"] == [[0, 10], [2, 6]]
        engine.call(tick)
        again = replace(config, resume_from_checkpoint=True)
        assert start(engine, again, model_path, evaluation=(), held=True)[0]
        engine.call(tick)
        log = log_of(config.output_dir)
        update = {"job_id": "job", "zo_random_seed": 7, "projected_grad": [0.5, -0.5, 1.0, 0.0], "learning_rate": 1e-3}
        disk.fill()
        assert engine.call(refused_for_room, "ApplyUpdate", update)
        assert log_of(config.output_dir) == log
        disk.free()
        assert engine.call(send, "ApplyUpdate", update)[3] == {"step": 4}
        stop(engine)


def refused_for_room(engine, name, fields) -> bool:
    reply = reply_to(engine, name, fields)
    return not reply.success and reply.code == "disk_full"


def reply_to(engine, name, fields):
    from sglang.srt.mezo.service.wire import messages

    return engine.runner.handle(messages.MezoReqInput(command=getattr(messages, name)(**fields)))


def test_added_examples_count_from_the_next_step_and_after_a_restart(engine, config, model_path, tmp_path):
    config = replace(config, r=4)
    added = oracle.examples(6, OPTIONS, seed=2)
    logs = []
    for name, interrupted in (("whole", False), ("halves", True)):
        engine.call(flush)
        config = replace(config, output_dir=str(tmp_path / name), resume_from_checkpoint=False)
        assert start(engine, config, model_path, evaluation=())[0]
        engine.call(tick_to_step, 3)
        ok, _, _, result = engine.call(send, "AppendExamples", {"job_id": "job", "examples": pack(added)})
        assert ok and result == {"step": 4}
        portions = json.loads((Path(config.output_dir) / "segments.json").read_text())["parts"]
        assert portions == [[0, 10], [4, 6]]
        if interrupted:
            engine.call(tick_to_step, 5)
            stop(engine)
            resumed = replace(config, resume_from_checkpoint=True)
            assert start(engine, resumed, model_path, train=TRAIN + added, evaluation=(), portions=portions)[0]
        engine.call(tick)
        logs.append(log_of(config.output_dir))
    assert logs[0] == logs[1]
    plain = replace(config, output_dir=str(tmp_path / "plain"))
    assert start(engine, plain, model_path, evaluation=())[0]
    engine.call(tick)
    assert log_of(plain.output_dir)[:160] == logs[0][:160] and log_of(plain.output_dir) != logs[0]


def test_single_operations_take_the_steps_of_the_run(engine, config, model_path, tmp_path):
    """evaluate + update by hand, with a step's seed and batch, is that step."""
    config = replace(config, r=4, max_steps=2, lr_scheduler_type="constant", load_best_model_at_end=False)
    assert start(engine, config, model_path, evaluation=())[0]
    engine.call(tick)
    (record, _) = SeedLog.open(Path(config.output_dir) / "seed_log").records()
    by_hand = replace(config, output_dir=str(tmp_path / "by_hand"))
    assert start(engine, by_hand, model_path, evaluation=(), held=True)[0]
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
    [evaluated] = engine.call(events)
    assert evaluated.operation == "a"
    assert evaluated.losses["projected_grad"] == pytest.approx(record.projected_grads, rel=1e-6)
    update = {
        "job_id": "job",
        "zo_random_seed": record.seed,
        "projected_grad": evaluated.losses["projected_grad"],
        "learning_rate": record.learning_rate,
    }
    assert engine.call(send, "ApplyUpdate", update)[3] == {"step": 1}
    assert engine.call(send, "ApplyUpdate", {**update, "projected_grad": [1.0]})[2] == "projected_grad"
    folder = tmp_path / "saved"
    assert engine.call(send, "SaveAdapter", {"job_id": "job", "directory": str(folder)})[3] == {"step": 1}
    stop(engine)
    assert SeedLog.open(Path(by_hand.output_dir) / "seed_log").records() == [record]
    saved, rebuilt = begun_with(by_hand.output_dir), begun_with(by_hand.output_dir)
    saved.load_weights(folder)
    SeedLog.open(Path(by_hand.output_dir) / "seed_log").replay(rebuilt.theta)
    assert torch.equal(saved.theta, rebuilt.theta)


def test_updates_of_a_finished_job_go_on_from_the_adapter_that_is_served(engine, config, model_path):
    config = replace(config, r=4)
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    succeeded = engine.call(events)[-1]
    best = succeeded.best_step
    assert best < succeeded.step == 8, "the case of interest"
    again = replace(config, resume_from_checkpoint=True)
    for expected in (best + 1, best + 2):
        assert start(engine, again, model_path, held=True)[0]
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

    assert start(engine, again, model_path, held=True)[0]
    engine.call(tick)
    [failed] = engine.call(events)
    assert failed.code == "LogError", "a single operation must not get another adapter"
    assert f"{path} is damaged: record 5 of 8" in failed.message

    assert start(engine, again, model_path)[0]
    engine.call(tick)
    warned, started, *_, last = engine.call(events)
    assert "record 5 of 8" in warned.message and "goes on from step 4" in warned.message
    assert (type(started), started.step, type(last)) == (Started, 4, Succeeded)
    assert log_of(config.output_dir) == whole
    state = json.loads((path.parent / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [0, 3, 6, 8]


@pytest.mark.parametrize("update", [([1e30], 1e6), ([3e38], 1e6), ([1e20], 1.0)])
def test_an_update_that_overflows_is_refused_and_changes_nothing(engine, config, model_path, tmp_path, update):
    grads, rate = update
    config = replace(config, r=4, num_perturbations=1, estimator="two_sided", scale_by_loss_std=False)
    assert start(engine, config, model_path, evaluation=(), held=True)[0]
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
    saved, rebuilt = begun_with(config.output_dir), begun_with(config.output_dir)
    saved.load_weights(tmp_path / "saved")
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
    failed = engine.call(events)[-1]
    assert failed.code == "DivergedError" and "lower learning_rate" in failed.message
    log = SeedLog.open(Path(config.output_dir) / "seed_log")
    assert len(log) == failed.step >= 3
    torch.testing.assert_close(engine.call(base_values, config), expected, atol=1e-6, rtol=0)


def advance_to(engine, step):
    while engine.runner._job.learner.global_step < step:
        engine.runner.tick()


def make_too_large(engine):
    """As a few more steps at a learning rate that is too large would."""
    engine.runner._job.learner.trainable.theta.fill_(1e18)


def base_values(engine, config):
    """What the base model makes of the training examples, over the prefixes that the tree holds."""
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.engine.points import BASE
    from sglang.srt.mezo.scoring.plan import Planner
    from sglang.srt.mezo.scoring.scorer import Scorer

    planner = Planner(config.tuning, oracle.INVOCATION)
    values = drain(
        Scorer(engine.handle, planner.scope, 64).passes(
            [planner.plan(example) for example in TRAIN], [(BASE,)], "classification"
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

    from sglang.srt.mezo.core.estimator import SIGNS
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.training.trainer import MezoTrainer

    with closing(MezoTrainer(engine.handle, config, spec, TRAIN)) as trainer:
        points, signs = trainer.points, len(SIGNS[config.estimator])
        numbers = range(1, 1 + 4 * signs, signs)  # of each direction the first, behind theta
        for seed, number in enumerate(numbers):
            weights = 0.1 * torch.randn(trainer.trainable.numel, generator=torch.Generator().manual_seed(seed))
            points.write(number, weights)
        group = tuple(points.of_direction(place)[0] for place in range(4))
        found = []
        for spoil in (False, True):
            engine.scheduler.flush_cache()
            if spoil:
                points.write(numbers[1], torch.full((trainer.trainable.numel,), value))
            found.append(drain(trainer.scorer.passes(trainer.source.plans, [group], "completion")))
        base = base_values(engine, config)
        engine.scheduler.flush_cache()
    return *found, base
