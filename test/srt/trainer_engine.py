"""An engine that trainers run on, and what tests have it do."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example

NUM_SLOTS = 5


TARGETS = ("q_proj", "v_proj")


# --- run in the engine's process --------------------------------------------------------------------------------------


def build(engine, config, spec, train, evaluation=()):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    return MezoTrainer(engine.handle, config, spec, train, evaluation)


def run(engine, *arguments):
    """The result of a run and the state that it leaves the engine's pools in."""
    before = (engine.handle.free_kv_tokens, engine.handle.free_rows, engine.handle.lora_manager.num_pinned_loras)
    trainer = build(engine, *arguments)
    try:
        result = trainer.train()
    finally:
        trainer.close()
        after = (engine.handle.free_kv_tokens, engine.handle.free_rows, engine.handle.lora_manager.num_pinned_loras)
        assert before == after
    return result, trainer.scorer.prefix_stats


def steps(engine, config, spec, train, count):
    """(loss_plus, loss_minus, projected_grad) of the first steps."""
    engine.scheduler.flush_cache()
    trainer = build(engine, config, spec, train)
    try:
        results = [drain(trainer.step_passes(trainer.batch(trainer.global_step))) for _ in range(count)]
    finally:
        trainer.close()
    return [(result.loss_plus, result.loss_minus, result.projected_grad) for result in results]


def windowed_steps(engine, config, spec, train, count):
    """The window, the series of a run and of one that computes every prefix anew, and what the first has computed."""
    engine.scheduler.flush_cache()
    series = []
    for reuse in (True, False):
        trainer = build(engine, replace(config, prefix_reuse=reuse), spec, train)
        if reuse:
            window, stats = trainer.source.window, trainer.scorer.prefix_stats
        trainer.source.window = window
        try:
            results = [drain(trainer.step_passes(trainer.batch(trainer.global_step))) for _ in range(count)]
        finally:
            trainer.close()
        series.append([result.loss_plus + result.loss_minus for result in results])
    return window, *series, stats


def passes_of_a_batch(engine, config, spec, train, kept_tokens):
    """Forward passes that score a batch whose prefixes are in the tree."""
    from sglang.srt.mezo.training.trainer import MezoTrainer

    trainer = MezoTrainer(engine.handle, config, spec, train, kept_tokens=kept_tokens)
    try:
        drain(trainer.step_passes(trainer.batch(0)))
        return len(list(trainer.scorer.passes(trainer.batch(0), [(trainer.points.current,)], "classification")))
    finally:
        trainer.close()


def steps_without_a_cache(engine, *arguments):
    """The steps of an engine that keeps no prefixes, and how many places of the pool are missing afterwards."""
    engine.scheduler.flush_cache()
    free = engine.handle.free_kv_tokens
    engine.handle.tree_cache.disable = True
    try:
        return steps(engine, *arguments), free - engine.handle.free_kv_tokens
    finally:
        engine.handle.tree_cache.disable = False


def places_in_use_after_a_release(engine, config, spec, train):
    """How many places of kept prefixes somebody else could get while a pass reads them, and how many are kept after
    it and after one more release."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    engine.scheduler.flush_cache()
    trainer = build(engine, config, spec, train)
    try:
        prefixes = trainer.scorer.base_prefixes
        wanted = [(2, *range(10, 40)), (2, *range(10, 20), *range(50, 60))]
        with prefixes.acquire(wanted, 0, True):
            pass
        assert prefixes.kept_tokens == sum(map(len, wanted))
        with prefixes.acquire(wanted, 0, True) as found:
            prefixes.release()
            engine.handle.tree_cache.evict(EvictParams(num_tokens=engine.handle.kv_capacity))
            free = set(engine.handle.kv_allocator.alloc(engine.handle.kv_allocator.available_size()).tolist())
            lost = free & set(torch.cat(list(found.values())).tolist())
            engine.handle.kv_allocator.free(torch.tensor(sorted(free)))
        kept = prefixes.kept_tokens
        prefixes.release()
        return len(lost), kept, prefixes.kept_tokens
    finally:
        trainer.close()


def missing_after_an_eviction(engine, config, spec, train):
    """How many prefixes are not there in the end where requests take the places of one that has been computed."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    engine.scheduler.flush_cache()
    trainer = build(engine, replace(config, max_tokens_per_batch=32), spec, train)
    try:
        prefixes, wanted = trainer.scorer.base_prefixes, [(2, *range(first, first + 30)) for first in (10, 50, 20)]
        passes = prefixes.prepare(wanted)
        next(passes)
        engine.handle.tree_cache.evict(EvictParams(num_tokens=engine.handle.kv_capacity))
        drain(passes)
        return len(prefixes._missing(wanted))
    finally:
        trainer.close()


def step_with_theta(engine, config, spec, train, value):
    trainer = build(engine, config, spec, train)
    try:
        trainer.trainable.theta.fill_(value)
        drain(trainer.step_passes(trainer.batch(0)))
    finally:
        trainer.close()


def leave_spare_slots(engine, config, spec, spare_slots):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    MezoTrainer(engine.handle, config, spec, TRAIN, spare_slots=spare_slots)


def lost_share(engine, config, spec, train, dtype):
    """Share of the perturbation that a slot of another dtype would lose at a typical adapter."""
    trainer = build(engine, config, spec, train)
    try:
        trainer.trainable.theta.fill_(0.04)
        trainer.slot_dtype = dtype
        return trainer.lost_perturbations(0)
    finally:
        trainer.close()


def long_examples(count: int, options: int) -> list[Example]:
    """Prefixes of 62 tokens, no two of which begin alike; 50 tokens in all options but the last, no two of which
    begin alike."""
    prompts = [(2, 10 + i, *range(10, 70), *oracle.INVOCATION) for i in range(count)]
    options = (*(tuple(range(10 + i, 60 + i)) for i in range(options - 1)), (9,))
    return [Example(prompt, options, i % len(options)) for i, prompt in enumerate(prompts)]


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return oracle.save_model("opt-125m", tmp_path_factory.mktemp("opt") / "model")


@pytest.fixture(scope="module")
def engine(model_path):
    process = start(model_path)
    yield process
    process.close()


def start(model_path: str, num_slots: int = NUM_SLOTS, kind: type[EngineProcess] = EngineProcess) -> EngineProcess:
    return kind(
        model_path=model_path,
        r=4,
        target_modules=TARGETS,
        num_slots=num_slots,
        dtype="float32",
        skip_tokenizer_init=True,
        max_total_tokens=3000,
    )


class SecondTry(EngineProcess):
    """An engine whose arguments were mistaken at first."""

    @staticmethod
    def _make(**arguments):
        from sglang.srt.mezo.engine.handle import MezoEngine

        with pytest.raises(ConfigError, match="target_modules"):
            MezoEngine(**{**arguments, "target_modules": ("nonsense",)})
        return MezoEngine(**arguments)


@pytest.fixture
def spec(config, model_path) -> AdapterSpec:
    return AdapterSpec.of(config, model_path, oracle.INVOCATION)


@pytest.fixture
def config(tmp_path) -> MezoConfig:
    return MezoConfig(
        output_dir=str(tmp_path / "run"),
        r=4,
        lora_alpha=8,
        target_modules=list(TARGETS),
        max_steps=12,
        per_device_train_batch_size=4,
        eval_steps=5,
        logging_steps=3,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        num_perturbations=4,
        disable_tqdm=True,
    )


TRAIN = oracle.examples(10, [(11,), (12,)])


EVALUATION = oracle.examples(6, [(11,), (12,)], seed=1)


def adapter_in(folder: Path, spec: AdapterSpec) -> Adapter:
    """The adapter that a run saved, with its sites read off the file."""
    from sglang.srt.mezo.adapters.adapter import Site

    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    sites = []
    for layer in range(2):
        for name in TARGETS:
            path = f"model.decoder.layers.{layer}.self_attn.{name}"
            a, b = (stored[f"base_model.model.{path}.lora_{m}.weight"] for m in "AB")
            sites.append(Site(path, a.shape[1], b.shape[0]))
    adapter = Adapter(spec, sites)
    adapter.load_weights(folder)
    return adapter
