"""Jobs that train by what the model writes, on a real engine: in pieces, beside requests, with registered rewards."""

from dataclasses import replace

import pytest

from runner_engine import (  # noqa: F401
    EVALUATION,
    TRAIN,
    config,
    engine,
    events,
    flush,
    make_runner,
    model_path,
    process,
    send,
    series,
    spec_of,
    start,
    stop,
    tick,
    tick_to_step,
    tuned,
)
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.service.wire.events import Evaluated, Failed, Succeeded
from test_writing import tokenizer

REWARDS = ["few=test_service_runner_writing:few_kinds", "broken=test_service_runner_writing:broken"]
TUNINGS = ["alora", "prefix"]


def few_kinds(completions: list[str], level: list[int]) -> list[float]:
    """More for texts of fewer different words."""
    return [number / (1 + len(set(text.split()))) for text, number in zip(completions, level)]


def broken(completions: list[str]) -> list[float]:
    raise KeyError("nobody knows")


def to_write_after(examples: list[Example]) -> list[Example]:
    return [Example(one.prompt, columns={"prompt": "", "answers": [], "level": one.label + 1}) for one in examples]


WRITTEN, EVALUATED = to_write_after(TRAIN), to_write_after(EVALUATION)


@pytest.fixture
def writing(engine, config):
    engine.call(have_rewards)
    return replace(config, r=4, reward="few", max_new_tokens=6, temperature=1.0, max_steps=4, zo_eps=0.1)


def have_rewards(engine):
    engine.scheduler.tokenizer = tokenizer()
    make_runner(engine, rewards=REWARDS)


def begin(engine, config, model_path, **fields):
    return start(engine, config, model_path, train=WRITTEN, evaluation=EVALUATED, **fields)


def whole(engine, config, model_path, tmp_path):
    """The series of the same run without pauses."""
    config = replace(config, reward=f"{__name__}:few_kinds", output_dir=str(tmp_path / "offline"))
    engine.call(train_offline, config, spec_of(config, model_path))
    engine.call(flush)
    return series(config.output_dir)


def train_offline(engine, config, spec):
    from contextlib import closing

    from sglang.srt.mezo.training.rewards import Writer
    from sglang.srt.mezo.training.trainer import MezoTrainer

    engine.scheduler.flush_cache()
    writer = Writer.of(config.generation, engine.scheduler.tokenizer)
    with closing(MezoTrainer(engine.handle, config, spec, WRITTEN, EVALUATED, writer=writer)) as trainer:
        trainer.train()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_job_writes_what_the_offline_run_writes(engine, writing, model_path, tmp_path, tuning):
    config = tuned(writing, tuning)
    expected = whole(engine, config, model_path, tmp_path)
    assert begin(engine, config, model_path)[0]
    engine.call(tick)
    assert series(config.output_dir) == expected
    assert any(plus != minus for _, plus, minus, _ in expected)
    told = engine.call(events)
    assert isinstance(told[-1], Succeeded)
    [first, *_] = [event for event in told if isinstance(event, Evaluated)]
    assert first.metrics["eval_reward"] == -first.metrics["eval_loss"] > 0


def test_no_piece_is_longer_than_it_may_be_and_what_is_written_stays_the_same(engine, writing, model_path, tmp_path):
    expected = whole(engine, writing, model_path, tmp_path)
    assert begin(engine, writing, model_path)[0]
    engine.call(tick_to_step, 1)
    tokens = engine.call(tokens_of_pieces, 5)
    assert max(tokens) <= 5 and len(tokens) > 20
    engine.call(tick)
    for cut, quiet in zip(series(writing.output_dir), expected, strict=True):
        assert cut[1] + cut[2] == pytest.approx(quiet[1] + quiet[2], rel=1e-6)


def tokens_of_pieces(engine, most: int) -> list[int]:
    """What each piece of a step runs through the model, beside a request."""
    runner, model = engine.runner, engine.handle.model_runner.model.model
    job, found = runner._job, []
    step, max_tokens, forward = job.learner.global_step, runner._max_tokens, model.forward

    def counted(input_ids, *arguments, **others):
        found[-1] += len(input_ids)
        return forward(input_ids, *arguments, **others)

    runner._max_tokens, model.forward = (lambda *load: most), counted
    while job.learner.global_step == step or len(found) < 20:
        found.append(0)
        runner.tick()
    runner._max_tokens, model.forward = max_tokens, forward
    return found


@pytest.mark.parametrize("tuning", TUNINGS)
def test_flushes_while_it_writes_change_nothing_but_time(engine, writing, model_path, tmp_path, tuning):
    config = tuned(writing, tuning)
    expected = whole(engine, config, model_path, tmp_path)
    assert begin(engine, config, model_path)[0]
    for pieces in (1, 3, 4, 9, 2, 30, 31):
        engine.call(tick, pieces)
        engine.call(flush)
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Succeeded)
    for flushed, quiet in zip(series(config.output_dir), expected, strict=True):
        assert flushed[1] + flushed[2] == pytest.approx(quiet[1] + quiet[2], rel=1e-6)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_it_holds_goes_when_requests_want_the_room(engine, writing, model_path, tmp_path, tuning):
    config = tuned(writing, tuning)
    expected = whole(engine, config, model_path, tmp_path)
    assert begin(engine, config, model_path)[0]
    engine.call(tick_to_step, 1)
    engine.call(tick, 5)
    before, beside = engine.call(held_beside_requests)
    assert before > 0 == beside
    engine.call(tick)
    for cut, quiet in zip(series(config.output_dir), expected, strict=True):
        assert cut[1] + cut[2] == pytest.approx(quiet[1] + quiet[2], rel=1e-6)


def held_beside_requests(engine) -> tuple[int, int]:
    from sglang.srt.mem_cache.allocation import alloc_token_slots

    handle, runner = engine.handle, engine.runner
    before, load = runner._job.learner.held_tokens, runner._load
    runner._load = lambda: (1, 0)
    taken = alloc_token_slots(handle.tree_cache, handle.free_kv_tokens - 100)
    runner.tick()
    beside = runner._job.learner.held_tokens
    handle.kv_allocator.free(taken)
    runner._load, runner._retry_at = load, 0
    return before, beside


def test_a_job_that_is_stopped_while_it_writes_goes_on(engine, writing, model_path, tmp_path):
    expected = whole(engine, writing, model_path, tmp_path)
    resumed = writing
    for pieces in (7, 40, 13):
        assert begin(engine, resumed, model_path)[0]
        engine.call(tick, pieces)
        stop(engine)
        resumed = replace(writing, resume_from_checkpoint=True)
    assert begin(engine, resumed, model_path)[0]
    engine.call(tick)
    assert series(writing.output_dir) == expected


def test_a_reward_that_fails_ends_its_job_alone(engine, writing, model_path):
    assert begin(engine, replace(writing, reward="broken"), model_path)[0]
    engine.call(tick)
    [*_, failed] = engine.call(events)
    assert isinstance(failed, Failed) and failed.code == "RewardError"
    assert "broken failed in" in failed.message and "KeyError" in failed.message and "nobody knows" in failed.message


@pytest.mark.parametrize("reward", ["other", "os:system", "test_service_runner_writing:few_kinds"])
def test_only_what_is_registered_is_called(engine, writing, model_path, reward):
    ok, message, param, _ = begin(engine, replace(writing, reward=reward), model_path)
    assert not ok and param == "reward" and "one of few, broken, the server's --mezo-rewards" in message
