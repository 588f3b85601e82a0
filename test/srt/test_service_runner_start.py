"""How jobs in the scheduler start, and what they give back where they cannot."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from runner_engine import (  # noqa: F401
    begun_with,
    config,
    engine,
    events,
    flush,
    held,
    kept,
    log_of,
    model_path,
    process,
    send,
    start,
    stop,
    tick,
    tick_to_step,
)
from sglang.srt.mezo.core.errors import LogError
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.engine import lora_capacity
from sglang.srt.mezo.service.wire.events import Failed, Succeeded
from sglang.srt.mezo.service.wire.packed import pack


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
    beside = runner._job.learner.points.claimed
    admitted = lora_capacity.admits(manager, {*ids, "another"}), lora_capacity.admits(manager, {"adapter 0"})
    scheduler.running_batch = batch
    runner.tick()
    return beside, admitted, runner._job.learner.points.claimed, lora_capacity.admits(manager, ids)


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
        ({"target_modules": ["gate_proj"]}, {}, "target_modules", "gate_proj"),
        ({}, {"invocation": []}, "invocation", "activated LoRA"),
        ({}, {"portions": [(0, 10), (4, 6)]}, "portions", "10 examples"),
    ],
)
def test_a_job_that_cannot_start_is_refused_and_holds_nothing(
    engine, config, model_path, settings, fields, param, message
):
    ok, text, at, _ = start(engine, replace(config, **{"r": 4, **settings}), model_path, **fields)
    assert not ok and at == param and message in text
    assert start(engine, replace(config, r=4), model_path)[0], "the engine is free"
    stop(engine)


@pytest.mark.parametrize(
    "targets", [names for n in (1, 2, 3) for names in combinations(["q_proj", "k_proj", "v_proj"], n)], ids="-".join
)
def test_every_subset_of_a_fused_layer_can_be_trained(engine, config, model_path, targets):
    config = replace(config, r=4, max_steps=2, target_modules=list(targets))
    assert start(engine, config, model_path)[0]
    engine.call(tick)
    last = engine.call(events)[-1]
    assert isinstance(last, Succeeded), last
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
        assert isinstance(engine.call(events)[-1], Succeeded)
        logs.append(log_of(further.output_dir))
        assert tensors_in(tmp_path / name / "initial_adapter") == tensors_in(Path(first.output_dir) / "adapter")
        assert json.loads((tmp_path / name / "config.json").read_text())["init_from"] == "served:first"
    assert logs[0] == logs[1]
    log = SeedLog.open(tmp_path / "whole" / "seed_log")
    begun = begun_with(tmp_path / "whole")
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
    assert f"no memory while {place}" in engine.call(events)[-1].message
    engine.call(flush)
    assert engine.call(held) == before
    again = replace(config, r=4, max_steps=2, output_dir=str(tmp_path / "again"))
    assert start(engine, again, model_path)[0]
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Succeeded)


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


def admits_the_base_model(engine):
    return lora_capacity.admits(engine.handle.lora_manager, {None})


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
        failed = engine.call(events)[-1]
        assert (type(failed), failed.code) == (Failed, "CapacityError")
        assert "5 adapter slots are needed" in failed.message and engine.call(admits_the_base_model)
        stop(engine)
    finally:
        engine.call(unpin)
    assert engine.call(held) == before
    assert start(engine, replace(config, r=4, max_steps=1, output_dir=str(tmp_path / "again")), model_path)[0]
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Succeeded)


def test_a_users_adapter_of_any_name_is_in_no_jobs_way(engine, config, model_path):
    engine.call(pin_another, ["mezo-current"])
    try:
        assert start(engine, replace(config, r=4, max_steps=1), model_path)[0]
        engine.call(tick)
        assert isinstance(engine.call(events)[-1], Succeeded)
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
    assert isinstance(engine.call(events)[-1], Failed)
    assert engine.call(held) == before
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    assert start(engine, replace(config, resume_from_checkpoint=True, max_steps=4), model_path)[0], (
        "the log has no other writer"
    )
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Succeeded)


def test_a_folder_that_cannot_be_made_ends_the_job_and_no_other(engine, config, model_path, tmp_path):
    before = engine.call(held)
    (tmp_path / "file").write_text("")
    assert start(engine, replace(config, r=4, output_dir=str(tmp_path / "file")), model_path)[0]
    engine.call(tick)
    assert isinstance(engine.call(events)[-1], Failed)
    assert engine.call(held) == before


def test_commands_for_another_job_are_refused(engine, config, model_path):
    assert engine.call(send, "SaveAdapter", {"job_id": "job", "directory": "x"})[1].endswith("(none has)")
    assert start(engine, replace(config, r=4), model_path)[0]
    ok, message, param, _ = start(engine, replace(config, r=4), model_path, job_id="second")
    assert (ok, param) == (False, "job") and "one job at a time" in message
    assert engine.call(send, "AppendExamples", {"job_id": "second", "examples": pack([])})[2] == "job"
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
