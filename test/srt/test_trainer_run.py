"""Whole runs of the trainer on a small random OPT: repeatable, resumable, and clear when something cannot work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oracle
from sglang.srt.mezo.core.errors import CapacityError, ConfigError, DamagedError, DataError, DivergedError, UsageError
from sglang.srt.mezo.core.integrity import read_checked_json, write_checked_json
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.training.trainer import MezoTrainer
from trainer_engine import (  # noqa: F401
    EVALUATION,
    NUM_SLOTS,
    TRAIN,
    SecondTry,
    adapter_in,
    config,
    engine,
    leave_spare_slots,
    long_examples,
    lost_share,
    missing_after_an_eviction,
    model_path,
    passes_of_a_batch,
    places_in_use_after_a_release,
    run,
    spec,
    start,
    step_with_theta,
    steps,
    steps_without_a_cache,
    windowed_steps,
)

# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["alora", "lora"])
def test_same_seed_same_series_bit_for_bit_across_processes(engine, model_path, spec, config, tuning):
    config = replace(config, tuning=tuning)
    spec = replace(spec, invocation=oracle.INVOCATION if tuning == "alora" else ())
    first = engine.call(steps, config, spec, TRAIN, 6)
    other_process = start(model_path)
    try:
        second = other_process.call(steps, config, spec, TRAIN, 6)
    finally:
        other_process.close()
    assert first == second
    assert engine.call(steps, replace(config, seed=1), spec, TRAIN, 6) != first


def test_batch_split_and_gradient_accumulation_keep_the_series(engine, spec, config):
    whole = engine.call(steps, config, spec, TRAIN, 5)
    split = engine.call(steps, replace(config, max_tokens_per_batch=8), spec, TRAIN, 5)
    accumulated = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert engine.call(steps, accumulated, spec, TRAIN, 5) == whole
    for (plus, minus, _), (split_plus, split_minus, _) in zip(whole, split):
        assert split_plus + split_minus == pytest.approx(plus + minus, abs=1e-5)


def test_a_run_writes_everything_and_the_log_rebuilds_the_adapter(engine, spec, config):
    result, stats = engine.call(run, config, spec, TRAIN, EVALUATION)
    folder = Path(config.output_dir)
    assert result.global_step == 12
    assert {
        "config.json",
        "seed_log",
        "metrics.jsonl",
        "trainer_state.json",
        "initial_adapter",
        f"best-{result.best_step}",
        "adapter",
    } <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert stats.reused > stats.computed > 0
    log = SeedLog.open(folder / "seed_log")
    rebuilt = adapter_in(folder / "initial_adapter", spec)
    log.replay(rebuilt.theta, result.best_step)
    assert torch.equal(rebuilt.theta, adapter_in(folder / "adapter", spec).theta)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 12 and state["best_global_step"] == result.best_step
    assert [record["step"] for record in state["log_history"]] == [0, 5, 10, 12]


def test_a_run_that_nobody_can_be_told_of_begins_nothing(engine, spec, config):
    with pytest.raises(ConfigError, match="report_to='tensorbord'"):
        engine.call(run, replace(config, report_to="tensorbord"), spec, TRAIN)
    assert not Path(config.output_dir).exists()


def test_a_resumed_run_equals_the_whole_run(engine, spec, config, tmp_path):
    engine.call(run, config, spec, TRAIN, EVALUATION)
    # The part is evaluated at its end, where the whole is not: that may be its best step.
    part = replace(
        config,
        output_dir=str(tmp_path / "part"),
        warmup_steps=0,
        lr_scheduler_type="constant",
        load_best_model_at_end=False,
    )
    whole = replace(part, output_dir=str(tmp_path / "whole"))
    engine.call(run, whole, spec, TRAIN, EVALUATION)
    engine.call(run, replace(part, max_steps=7), spec, TRAIN, EVALUATION)
    engine.call(run, replace(part, resume_from_checkpoint=True), spec, TRAIN, EVALUATION)
    assert (
        SeedLog.open(tmp_path / "part" / "seed_log").records()
        == SeedLog.open(tmp_path / "whole" / "seed_log").records()
    )
    assert torch.equal(
        adapter_in(tmp_path / "part" / "adapter", spec).theta, adapter_in(tmp_path / "whole" / "adapter", spec).theta
    )


def test_a_resumed_run_is_not_trained_on_other_examples(engine, spec, config):
    engine.call(run, replace(config, max_steps=3), spec, TRAIN, EVALUATION)
    resumed = replace(config, max_steps=4, resume_from_checkpoint=True)
    first, *others = TRAIN
    for wrong in ([replace(first, label=1 - first.label), *others], [*others, first], TRAIN[:-1], [*TRAIN, first]):
        with pytest.raises(DataError, match="not those that the run in .* has been trained on"):
            engine.call(run, resumed, spec, wrong, EVALUATION)
    with pytest.raises(DataError, match="development examples are not those that the run in .* has been judged by"):
        engine.call(run, resumed, spec, TRAIN, EVALUATION[1:])
    result, _ = engine.call(run, resumed, spec, TRAIN, EVALUATION)
    assert result.global_step == 4


def test_a_run_whose_log_is_damaged_ends_as_if_it_were_not(engine, spec, config):
    engine.call(run, config, spec, TRAIN, EVALUATION)
    folder = Path(config.output_dir)
    log, adapter = folder / "seed_log", adapter_in(folder / "adapter", spec).theta
    whole = log.read_bytes()
    damaged = bytearray(whole)
    damaged[-6 * (8 + 8 + 4 * 4 + 4)] ^= 1
    log.write_bytes(damaged)
    engine.call(run, replace(config, resume_from_checkpoint=True), spec, TRAIN, EVALUATION)
    assert log.read_bytes() == whole and torch.equal(adapter_in(folder / "adapter", spec).theta, adapter)
    assert (folder / "seed_log.damaged-1").read_bytes() == damaged
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [record["step"] for record in state["log_history"]] == [0, 5, 10, 12]


def test_a_best_adapter_that_is_damaged_is_made_anew_from_the_log(engine, spec, config):
    result, _ = engine.call(run, config, spec, TRAIN, EVALUATION)
    folder = Path(config.output_dir)
    adapter = adapter_in(folder / "adapter", spec).theta
    weights = folder / f"best-{result.best_step}" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-2] ^= 1
    weights.write_bytes(damaged)
    again, _ = engine.call(run, replace(config, resume_from_checkpoint=True), spec, TRAIN, EVALUATION)
    assert again.best_step == result.best_step and torch.equal(adapter_in(folder / "adapter", spec).theta, adapter)
    assert weights.read_bytes() == damaged


def test_a_state_that_is_damaged_is_named_and_one_that_is_gone_goes_without(engine, spec, config):
    engine.call(run, config, spec, TRAIN, EVALUATION)
    state = Path(config.output_dir) / "trainer_state.json"
    state.write_text(state.read_text().replace("0", "1", 1))
    resumed = replace(config, resume_from_checkpoint=True)
    with pytest.raises(DamagedError, match="trainer_state.json is damaged"):
        engine.call(run, resumed, spec, TRAIN, EVALUATION)
    state.unlink()
    result, _ = engine.call(run, resumed, spec, TRAIN, EVALUATION)
    assert (result.global_step, result.best_step) == (12, 12)


def test_a_pool_too_small_for_all_prefixes_is_gone_over_in_windows(engine, spec, config):
    train = oracle.examples(300, [(11,), (12,)])
    window, reused, computed, stats = engine.call(
        windowed_steps, replace(config, echoes=8, learning_rate=1e-4), spec, train, 400
    )
    assert 4 < window < 200
    for with_reuse, without in zip(reused, computed, strict=True):
        assert with_reuse == pytest.approx(without, abs=1e-5)
    # 1,600 examples in windows that are each gone over eight times: little more than an eighth is computed.
    assert stats.computed < 0.2 * stats.total / config.forward_passes


def test_a_mistaken_argument_does_not_cost_a_process_its_engine(model_path, config, spec):
    process = start(model_path, kind=SecondTry)
    try:
        assert len(process.call(steps, config, spec, TRAIN, 1)) == 1
    finally:
        process.close()


def test_an_engine_without_a_prefix_cache_computes_prompts_anew(engine, spec, config):
    with_cache = engine.call(steps, config, spec, TRAIN, 3)
    without, missing = engine.call(steps_without_a_cache, config, spec, TRAIN, 3)
    for (plus, minus, _), (other_plus, other_minus, _) in zip(with_cache, without, strict=True):
        assert other_plus + other_minus == pytest.approx(plus + minus, abs=1e-5)
    assert missing == 0


def test_a_prefix_that_is_evicted_before_it_is_read_is_computed_again(engine, spec, config):
    assert engine.call(missing_after_an_eviction, config, spec, TRAIN) == 0


def test_prefixes_that_a_pass_reads_are_nobody_elses(engine, spec, config):
    """Though they are given up meanwhile, as a server does that needs the room."""
    assert engine.call(places_in_use_after_a_release, config, spec, TRAIN) == (0, 52, 0)


def test_a_resumed_run_keeps_its_window(engine, spec, config):
    train = oracle.examples(300, [(11,), (12,)])
    engine.call(run, replace(config, max_steps=3), spec, train)
    state = json.loads((Path(config.output_dir) / "trainer_state.json").read_text())
    assert state["window"] > 4
    path = Path(config.output_dir) / "trainer_state.json"
    write_checked_json(path, {**read_checked_json(path), "window": 5})
    engine.call(run, replace(config, max_steps=6, resume_from_checkpoint=True), spec, train)
    assert json.loads(path.read_text())["window"] == 5


def test_training_lowers_the_loss(engine, spec, config):
    config = replace(config, max_steps=100, learning_rate=5e-2, lr_scheduler_type="constant", eval_steps=100)
    always_first = [replace(example, label=0) for example in TRAIN]
    result, _ = engine.call(run, config, spec, always_first, always_first)
    state = json.loads((Path(config.output_dir) / "trainer_state.json").read_text())
    first = state["log_history"][0]["eval_loss"]
    assert result.metrics["eval_loss"] < first - 0.1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"tuning": "lora"}, ConfigError, "invocation"),
        ({"metric_for_best_model": "eval_f1"}, ConfigError, "metric_for_best_model='eval_f1'"),
    ],
)
def test_settings_that_cannot_work(engine, spec, config, changes, error, message):
    with pytest.raises(error, match=message):
        engine.call(run, replace(config, **changes), spec, TRAIN, EVALUATION)


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided", "leave_one_out"])
def test_directions_take_turns_where_the_pool_has_less_room(engine, model_path, spec, config, estimator):
    config = replace(config, num_perturbations=7, estimator=estimator)
    assert config.num_slots > NUM_SLOTS
    in_turns = engine.call(steps, config, spec, TRAIN, 4)
    roomy = start(model_path, num_slots=config.num_slots)
    try:
        at_once = roomy.call(steps, config, spec, TRAIN, 4)
    finally:
        roomy.close()
    assert in_turns == at_once


def test_an_adapter_that_the_pool_cannot_hold(engine, spec, config):
    with pytest.raises(CapacityError, match="6 adapter slots are needed, but 5 of the pool's 6 are free"):
        engine.call(leave_spare_slots, config, spec, 4)
    with pytest.raises(CapacityError, match="rank 8"):
        engine.call(run, replace(config, r=8), replace(spec, r=8), TRAIN)
    with pytest.raises(ConfigError, match="target_modules"):
        engine.call(run, config, replace(spec, target_modules=("fc1",)), TRAIN)
    with pytest.raises(ConfigError, match="invocation"):
        engine.call(run, config, replace(spec, invocation=()), TRAIN)


@pytest.mark.parametrize(("field", "value"), [("r", 2), ("lora_alpha", 16), ("target_modules", ["q_proj"])])
def test_an_adapter_that_is_described_otherwise_than_the_run(engine, spec, config, field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* as the adapter has it"):
        engine.call(run, replace(config, **{field: value}), spec, TRAIN)


def test_a_prompt_without_the_invocation(engine, spec, config):
    with pytest.raises(DataError, match="invocation tokens"):
        engine.call(run, config, replace(spec, invocation=(5, 5)), TRAIN)


def test_a_prompt_longer_than_the_context(engine, spec, config):
    long = replace(TRAIN[0], prompt=(*range(10, 140), *oracle.INVOCATION))
    with pytest.raises(DataError, match="132 tokens is longer than the engine's context of 128"):
        engine.call(run, config, spec, [*TRAIN, long])


def test_nothing_to_train_on_or_to_evaluate(engine, spec, config):
    with pytest.raises(DataError, match="there is no example to train on"):
        engine.call(run, config, spec, [], EVALUATION)
    assert not Path(config.output_dir).exists()
    with pytest.raises(DataError, match="there is no example to evaluate"):
        engine.call(evaluate_nothing, config, spec)


def evaluate_nothing(engine, config, spec):
    trainer = MezoTrainer(engine.handle, config, spec, TRAIN)
    try:
        trainer.evaluate()
    finally:
        trainer.close()


def test_a_trainer_trains_once(engine, spec, config):
    with pytest.raises(UsageError, match="a trainer trains once: make another one"):
        engine.call(train_twice, replace(config, max_steps=2), spec)


def train_twice(engine, config, spec):
    trainer = MezoTrainer(engine.handle, config, spec, TRAIN)
    try:
        trainer.train()
        trainer.train()
    finally:
        trainer.close()


def test_a_batch_larger_than_the_kv_pool_is_cut(engine, spec, config):
    config = replace(config, per_device_train_batch_size=64)
    window, reused, computed, _ = engine.call(windowed_steps, config, spec, long_examples(64, options=2), 2)
    assert window < 64
    for with_reuse, without in zip(reused, computed, strict=True):
        assert with_reuse == pytest.approx(without, abs=1e-5)


def test_an_example_that_the_kv_pool_cannot_hold(engine, spec, config):
    with pytest.raises(CapacityError, match="KV tokens"):
        engine.call(run, config, spec, long_examples(4, options=70))


@pytest.mark.parametrize("kept_tokens, passes", [(None, 1), (0, 2)])
def test_prefixes_that_may_be_kept_are_read_in_one_pass(engine, spec, config, kept_tokens, passes):
    """The 18 prefixes fill 37 % of the pool."""
    config = replace(config, per_device_train_batch_size=18, max_tokens_per_batch=10_000)
    assert engine.call(passes_of_a_batch, config, spec, long_examples(18, options=2), kept_tokens) == passes


def test_a_loss_that_is_not_finite_stops_the_run(engine, spec, config):
    with pytest.raises(DivergedError, match="step 0"):
        engine.call(step_with_theta, config, spec, TRAIN, float("nan"))


def test_a_perturbation_that_rounding_swallows_is_measured(engine, spec, config):
    small, large = replace(config, zo_eps=1e-5), replace(config, zo_eps=1e-2)
    assert engine.call(lost_share, small, spec, TRAIN, torch.bfloat16) > 0.9
    assert engine.call(lost_share, large, spec, TRAIN, torch.bfloat16) < 0.1
    assert engine.call(lost_share, small, spec, TRAIN, torch.float32) < 0.01


def test_the_engine_still_trains_after_every_error(engine, spec, config):
    result, _ = engine.call(run, config, spec, TRAIN, EVALUATION)
    assert result.global_step == 12
