"""Runs over streamed text: their batches are the stream's, what is held out is never among them, and a run that is
killed goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from engine_process import require_devices
from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.named import named_data
from test_examples import ROOT, run, summary_of
from test_ranks import require_same, steps_of
from test_streams import TEXTS, packed, write
from trainer_engine import adapter_in, build, config, engine, model_path, spec  # noqa: F401
from trainer_engine import run as train

LENGTH, BATCH, STEPS = 48, 3, 14
LISTED = [Example((2,), ((10 + number, 11, 12 + number, 13),), 0) for number in range(10)]


class Stream:
    """Examples that are only there one after the other."""

    def __init__(self, examples: list[Example]):
        self._examples = examples

    def __iter__(self):
        return iter(self._examples)


# --- in an engine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(config, spec):
    config = replace(config, tuning="lora", objective="completion", lr_scheduler_type="constant", warmup_steps=0)
    return config, replace(spec, invocation=())


def batches_of(engine, config, spec, stream, steps):
    """Tokens of the batches of some steps, and the epochs before them."""
    trainer = build(engine, config, spec, stream, LISTED[:1])
    try:
        batches = [[(row.suffix, row.reads) for plan in trainer.batch(step) for row in plan.rows] for step in steps]
        return batches, [trainer.source.epoch(step) for step in steps]
    finally:
        trainer.close()


def test_batches_are_those_of_the_stream_again_and_again(engine, settings):
    steps = [0, 1, 2, 3, 4, 1, 4, 7, 7]
    batches, epochs = engine.call(batches_of, *settings, Stream(LISTED), steps)
    rows = [(example.prompt + example.options[0][:-1], tuple(enumerate(example.options[0]))) for example in LISTED]
    size = settings[0].train_batch_size
    assert batches == [[rows[place % 10] for place in range(step * size, (step + 1) * size)] for step in steps]
    assert epochs == [step * size / 10 for step in steps]
    assert engine.call(batches_of, *settings, Stream(LISTED), [0, 1])[1] == [0.0, 0.0]  # its length is not known yet


def test_a_resumed_run_over_a_stream_equals_the_whole_run(engine, settings, tmp_path):
    config, spec = settings
    whole, part = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "part"))
    engine.call(train, whole, spec, Stream(LISTED), LISTED[:2])
    engine.call(train, replace(part, max_steps=7), spec, Stream(LISTED), LISTED[:2])
    resumed = replace(part, resume_from_checkpoint=True)
    others = ([*LISTED[1:], LISTED[0]], [*LISTED[:9], LISTED[0]], LISTED[:9], [LISTED[5], *LISTED[1:]])
    for wrong in (*map(Stream, others), LISTED):
        with pytest.raises(DataError, match="not those that the run in .* has been trained on"):
            engine.call(train, resumed, spec, wrong, LISTED[:2])
    with pytest.raises(DataError, match="not those that the run in .* has been trained on"):
        engine.call(train, resumed, spec, Stream(LISTED), LISTED[:3])
    engine.call(train, resumed, spec, Stream(LISTED), LISTED[:2])
    records = [SeedLog.open(tmp_path / name / "seed_log").records() for name in ("whole", "part")]
    assert records[0] == records[1] and len(records[0]) == 12
    adapters = [adapter_in(tmp_path / name / "adapter", spec).theta for name in ("whole", "part")]
    assert torch.equal(*adapters)


def test_a_run_whose_log_is_damaged_reads_the_stream_again(engine, settings):
    config, spec = settings
    engine.call(train, config, spec, Stream(LISTED), LISTED[:2])
    log = Path(config.output_dir) / "seed_log"
    whole = log.read_bytes()
    log.write_bytes(whole[:-100])
    engine.call(train, replace(config, resume_from_checkpoint=True), spec, Stream(LISTED), LISTED[:2])
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "stream", "error", "message"),
    [
        ({"max_steps": -1}, LISTED, ConfigError, "max_steps=-1 is not allowed: at least 1 beside a stream"),
        ({}, [], DataError, "no example in the stream"),
        ({}, [Example((2,), ((3,) * 200,), 0)], DataError, "a sequence of 200 tokens is longer than the engine's"),
        ({"objective": "classification"}, LISTED, ConfigError, "objective='classification' is not allowed"),
    ],
)
def test_a_stream_that_cannot_be_trained_on_begins_no_run(engine, settings, changes, stream, error, message):
    config, spec = settings
    with pytest.raises(error, match=message):
        engine.call(build, replace(config, **changes), spec, Stream(stream))
    assert not Path(config.output_dir).exists()


# --- as a program -----------------------------------------------------------------------------------------------------


def command(folder: Path, data: str, tuning: str, *more: str) -> list[str]:
    return [
        *("examples/mezo_opt_training.py", "--output_dir", str(folder), "--tuning", tuning, "--task", "text"),
        *("--dataset", data, "--streaming", "--pack", "--max_length", str(LENGTH), "--num_dev", "4", "--num_test", "2"),
        *("--max_steps", str(STEPS), "--per_device_train_batch_size", str(BATCH), "--num_perturbations", "2"),
        *("--eval_steps", "5", "--save_steps", str(STEPS), "--logging_steps", "1", "--disable_tqdm", "true", *more),
    ]


def shards(folder: Path) -> str:
    """A folder with the texts in three files."""
    folder.mkdir()
    for number in range(3):
        write(folder / f"train-{number:05}-of-00003.jsonl", TEXTS[20 * number : 20 * number + 20])
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full", "prefix"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path, tuning):
    whole, killed, data = tmp_path / "whole", tmp_path / "killed", shards(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "assets" / "opt-reviews")
    blocks = len(packed(tokenizer, TEXTS, LENGTH)) - 6
    assert BATCH * 5 < blocks < BATCH * STEPS, "it goes over the files more than once"
    printed = run(*command(whole, data, tuning)).stdout
    assert f"trained loss           {summary_of(whole)['loss']:.4f} " in printed
    arguments = command(killed, data, tuning)
    started = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while steps_of(killed) < 7:
        assert started.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert 7 <= steps_of(killed) < STEPS
    run(*arguments, "--resume_from_checkpoint")
    assert (whole / "seed_log").read_bytes() == (killed / "seed_log").read_bytes()
    [kept], [again] = (
        [load_file(path) for path in (folder / f"checkpoint-{STEPS}").glob("*.safetensors")]
        for folder in (whole, killed)
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept) and kept.keys() == again.keys()
    assert summary_of(whole)["loss"] == summary_of(killed)["loss"]
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["epoch"] == pytest.approx(STEPS * BATCH / blocks)


@pytest.mark.slow
def test_a_run_with_other_texts_does_not_go_on(tmp_path):
    folder, data = tmp_path / "run", shards(tmp_path / "data")
    run(*command(folder, data, "lora", "--max_steps", "4"))
    write(tmp_path / "data" / "train-00000-of-00003.jsonl", TEXTS[1:20])
    log = (folder / "seed_log").read_bytes()
    refused = run(*command(folder, data, "lora", "--resume_from_checkpoint"), succeed=False)
    assert "error: the training examples are not those that the run in" in refused.stderr
    assert (folder / "seed_log").read_bytes() == log


@pytest.mark.slow
def test_two_ranks_see_the_blocks_of_one(tmp_path):
    require_devices(2)
    data = shards(tmp_path / "data")
    paper = ("--num_perturbations", "1", "--perturbation", "gaussian", "--max_total_tokens", "8000")
    for ranks in (1, 2):
        run(*command(tmp_path / str(ranks), data, "lora", *paper, "--tp_size", str(ranks)))
    require_same(tmp_path / "1", tmp_path / "2", STEPS, 1e-5)


def test_the_texts_of_a_data_set_at_hand_are_those_of_its_stream(tmp_path):
    named = named_data("text", shards(tmp_path / "data"))
    assert [row.fields for row in named.texts("train")] == [row.fields for row in named.rows("train")]
