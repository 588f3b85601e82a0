"""An engine with a runner as a server's scheduler has it, and what tests have it do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.adapters.prefix_adapter import PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.service.wire.packed import pack
from sglang.srt.mezo.training.replay import initial_adapter

TARGETS = ("q_proj", "v_proj")
OPTIONS = [(11,), (12,)]
TRAIN = oracle.examples(10, OPTIONS)
EVALUATION = oracle.examples(6, OPTIONS, seed=1)


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
    taken = list(engine.runner.events)
    engine.runner.events.clear()
    return taken


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
        engine.runner._end(engine.runner._job)


def kept(engine):
    return engine.runner._job.learner.scorer.base_prefixes.kept_tokens


def train_offline(engine, config, spec, train, evaluation):
    from contextlib import closing

    from sglang.srt.mezo.training.trainer import MezoTrainer

    engine.scheduler.flush_cache()
    with closing(MezoTrainer(engine.handle, config, spec, train, evaluation)) as trainer:
        return trainer.train()


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
        target_modules=list(TARGETS),
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


def start(
    engine, config, model_path, job_id="job", train=TRAIN, evaluation=EVALUATION, portions=None, held=False, **fields
):
    for split, examples in (("train", train), ("eval", evaluation)):
        for part in (examples[:3], examples[3:]):
            assert engine.call(send, "LoadExamples", {"job_id": job_id, "split": split, "examples": pack(part)})[0]
    fields = {
        "job_id": job_id,
        "config": config,
        "base_model": model_path,
        "invocation": list(oracle.INVOCATION) if config.tuning == "alora" else [],
        **fields,
    }
    if held:
        return engine.call(send, "HoldJob", fields)
    return engine.call(send, "StartJob", fields | {"portions": portions or [(0, len(train))]})


def stop(engine, job_id="job"):
    assert engine.call(send, "StopJob", {"job_id": job_id})[0]


def tuned(config: MezoConfig, tuning: str) -> MezoConfig:
    """The same run of another way of tuning, which the engine has room for."""
    if tuning != "prefix":
        return replace(config, tuning=tuning, r=4)
    of_adapters = dict.fromkeys(("r", "lora_alpha", "target_modules", "learning_rate", "zo_eps"))
    return replace(config, tuning=tuning, **of_adapters)


def spec_of(config, model_path) -> AdapterSpec | PrefixSpec:
    if config.tuning == "prefix":
        return PrefixSpec.of(config, model_path, AutoConfig.from_pretrained(model_path))
    return AdapterSpec.of(config, model_path, oracle.INVOCATION if config.tuning == "alora" else ())


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


def begun_with(run) -> Adapter:
    """The adapter that a run has started from."""
    run = Path(run)
    return initial_adapter(run, SeedLog.open(run / "seed_log"))


def first_batch(engine):
    trainer = engine.runner._job.learner
    return pack([TRAIN[i] for i in trainer.drawn.stream.batch(0)])


def tick_to_step(engine, step):
    while engine.runner._job is None or engine.runner._job.learner.global_step < step:
        engine.runner.tick()
