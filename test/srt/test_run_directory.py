"""A run's folder: new, refused, overwritten, resumed; never half-written."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch

from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec, Site
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import BaseModelError, ConfigError, LogError
from sglang.srt.mezo.core.integrity import read_checked_json, write_json
from sglang.srt.mezo.core.noise import step_seed
from sglang.srt.mezo.core.optimizer import Optimizer
from sglang.srt.mezo.core.seed_log import LogRecord, SeedLog
from sglang.srt.mezo.training.run_directory import RunDirectory, has_run, is_half_made
from sglang.srt.mezo.training.tracking import Tracker
from tiny import file_size_limit

SITES = [Site("model.layers.0.self_attn.q_proj", 64, 96)]


def config(folder: Path, **settings) -> MezoConfig:
    return MezoConfig(
        output_dir=str(folder / "run"),
        **{"num_perturbations": 2, "estimator": "two_sided", "weight_decay": 0.1, **settings},
    )


def initial_adapter(seed: int = 42, r: int = 4) -> Adapter:
    return Adapter.initial(AdapterSpec("base-model", r, 16, ("q_proj",)), SITES, seed)


def start(settings: MezoConfig, adapter: Adapter) -> SeedLog:
    """Open a run's folder and bring the adapter to where the log ends."""
    log = RunDirectory(settings).open(adapter)
    log.replay(adapter.theta)
    return log


def run(folder: Path, steps: int, **settings) -> Adapter:
    """A run of a few steps; returns the adapter that it ends with."""
    adapter = initial_adapter()
    log = start(config(folder, **settings), adapter)
    optimizer = Optimizer(adapter.theta, adapter.shapes, log.header.rule)
    for step in range(len(log), steps):
        record = LogRecord(step_seed(42, step), 1e-2 / (step + 1), (1.5, -0.25 * step))
        log.append(record)
        optimizer.replay(record.seed, record.projected_grads, record.learning_rate)
    log.close()
    return adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_run_keeps_its_settings_and_its_initial_adapter(tmp_path):
    run(tmp_path, steps=3)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "initial_adapter", "seed_log"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config(tmp_path).to_dict()
    stored = Adapter(initial_adapter().spec, SITES)
    stored.load_weights(tmp_path / "run" / "initial_adapter")
    assert stored.theta.equal(initial_adapter().theta)


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "run").mkdir()
    run(tmp_path, steps=1)
    assert (tmp_path / "run" / "seed_log").is_file()


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(tmp_path):
    run(tmp_path, steps=3)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="overwrite_output_dir or resume_from_checkpoint"):
        start(config(tmp_path), initial_adapter())
    assert contents(tmp_path) == before


def test_overwriting_starts_from_nothing(tmp_path):
    run(tmp_path, steps=3)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    adapter = initial_adapter()
    log = start(config(tmp_path, overwrite_output_dir=True), adapter)
    assert len(log) == 0
    assert adapter.theta.equal(initial_adapter().theta)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_overwriting_a_folder_that_is_not_there_is_a_new_run(tmp_path):
    run(tmp_path, steps=1, overwrite_output_dir=True)
    assert (tmp_path / "run" / "seed_log").is_file()


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.json"], ["seed_log", "thesis.tex"]])
@pytest.mark.parametrize("setting", ["overwrite_output_dir", "resume_from_checkpoint"])
def test_a_folder_that_no_run_made_is_neither_deleted_nor_resumed(tmp_path, setting, names):
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="a folder that an earlier run made"):
        start(config(tmp_path, **{setting: True}), initial_adapter())
    assert contents(tmp_path) == before


def test_a_folder_whose_log_is_none_is_not_overwritten(tmp_path):
    run(tmp_path, steps=1)
    (tmp_path / "run" / "seed_log").write_text("my notes")
    with pytest.raises(LogError, match="is not a seed log"):
        start(config(tmp_path, overwrite_output_dir=True), initial_adapter())
    assert (tmp_path / "run" / "seed_log").read_text() == "my notes"


def test_a_log_with_records_is_no_half_made_run(tmp_path):
    """Of a run that has lost its config.json."""
    run(tmp_path, steps=3)
    (tmp_path / "run" / "config.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="overwrite_output_dir or resume_from_checkpoint"):
        start(config(tmp_path), initial_adapter())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", [["seed_log"], ["seed_log", "initial_adapter", ".config.json.partial"]])
def test_a_run_that_was_stopped_before_it_could_begin_is_begun_anew(tmp_path, left):
    ended = run(tmp_path / "whole", steps=3)
    run(tmp_path, steps=0)
    for path in (tmp_path / "run").iterdir():
        if path.name not in left:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    if ".config.json.partial" in left:
        (tmp_path / "run" / ".config.json.partial").write_text("{")
    with pytest.raises(ConfigError, match="a folder that an earlier run made"):
        start(config(tmp_path, resume_from_checkpoint=True), initial_adapter())
    with closing(SeedLog.open(tmp_path / "run" / "seed_log")) as other:
        other.claim()
        with pytest.raises(LogError, match="is being written by another run"):
            start(config(tmp_path), initial_adapter())
    assert run(tmp_path, steps=3).theta.equal(ended.theta)


def test_nothing_can_be_gone_on_with_before_all_that_a_run_starts_from_is_there(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=begin_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not has_run(tmp_path / "run") and is_half_made(tmp_path / "run")


class Deadly(Adapter):
    def save_initial(self, run: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def begin_and_die(folder: Path) -> None:
    start(config(folder), Deadly(initial_adapter().spec, SITES))


def test_resuming_brings_the_adapter_to_where_the_run_stopped_bit_for_bit(tmp_path):
    ended = run(tmp_path, steps=5)
    resumed = initial_adapter(seed=1)  # whatever it held before
    log = start(config(tmp_path, resume_from_checkpoint=True), resumed)
    assert len(log) == 5
    assert resumed.theta.equal(ended.theta)
    assert not resumed.theta.equal(initial_adapter().theta)


def test_a_resumed_run_ends_as_the_whole_run_does(tmp_path):
    whole = run(tmp_path / "whole", steps=7)
    run(tmp_path / "halves", steps=4)
    with open(tmp_path / "halves" / "run" / "seed_log", "ab") as file:
        file.write(b"\x01\x02\x03")  # a crash in the middle of step 4
    resumed = run(tmp_path / "halves", steps=7, resume_from_checkpoint=True)
    assert resumed.theta.equal(whole.theta)
    logs = [(tmp_path / name / "run" / "seed_log").read_bytes() for name in ("whole", "halves")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"seed": 7}, "seed"),
        ({"r": 2}, "r"),
        ({"num_perturbations": 3}, "num_perturbations"),
        ({"tuning": "lora"}, "tuning"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name_and_changes_nothing(tmp_path, settings, field):
    run(tmp_path, steps=2)
    before, adapter = contents(tmp_path), initial_adapter(seed=1)
    with pytest.raises(ConfigError) as caught:
        start(config(tmp_path, resume_from_checkpoint=True, **settings), adapter)
    assert caught.value.field == field
    assert "the run to resume has" in str(caught.value)
    assert contents(tmp_path) == before
    assert adapter.theta.equal(initial_adapter(seed=1).theta)


def test_resuming_may_go_on_for_longer(tmp_path):
    run(tmp_path, steps=2, max_steps=2, target_modules=["q_proj"])
    settings = {"max_steps": 50, "logging_steps": 3, "save_steps": 5, "target_modules": ["q_proj"]}
    log = start(config(tmp_path, resume_from_checkpoint=True, **settings), initial_adapter())
    assert len(log) == 2


def test_a_run_of_a_version_that_did_not_know_a_setting_did_what_its_default_does(tmp_path):
    run(tmp_path, steps=2)
    path = tmp_path / "run" / "config.json"
    earlier = json.loads(path.read_text())
    del earlier["echoes"], earlier["prefix_reuse"]
    earlier["objective"] = "language_modeling"  # of texts, as it was called
    path.write_text(json.dumps(earlier))
    with pytest.raises(ConfigError, match="echoes=2 .* the run to resume has 32"):
        start(config(tmp_path, resume_from_checkpoint=True, echoes=2, objective="completion"), initial_adapter())
    for objective in ("completion", "language_modeling"):
        log = start(config(tmp_path, resume_from_checkpoint=True, objective=objective), initial_adapter())
        assert len(log) == 2
        log.close()


def test_resuming_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a folder that an earlier run made"):
        start(config(tmp_path, resume_from_checkpoint=True), initial_adapter())
    assert os.listdir(tmp_path) == []


def test_resuming_on_another_model_is_refused(tmp_path):
    run(tmp_path, steps=2)
    other = Adapter(AdapterSpec("other", 4, 16, ("q_proj",)), [Site("model.layers.0.self_attn.q_proj", 64, 80)])
    with pytest.raises(ConfigError, match="matrices of rank 4"):
        start(config(tmp_path, resume_from_checkpoint=True), other)


def test_a_log_that_is_damaged_is_refused(tmp_path):
    run(tmp_path, steps=2)
    (tmp_path / "run" / "seed_log").write_bytes(b"")
    with pytest.raises(LogError):
        start(config(tmp_path, resume_from_checkpoint=True), initial_adapter())


@pytest.mark.parametrize("room", [0, 50, 2000], ids=["no byte fits", "half the settings fit", "half the adapter fits"])
def test_a_full_disk_at_the_start_leaves_no_run(tmp_path, room):
    with file_size_limit(room), pytest.raises(OSError):
        start(config(tmp_path), initial_adapter())
    assert os.listdir(tmp_path) == []
    run(tmp_path, steps=1)  # there is room again


def test_a_checkpoint_holds_the_adapter_and_the_state(tmp_path):
    adapter = run(tmp_path, steps=3)
    directory = RunDirectory(config(tmp_path))
    directory.save_checkpoint(adapter, {"global_step": 3, "log_history": []})
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert read_checked_json(checkpoint / "trainer_state.json") == {"global_step": 3, "log_history": []}
    stored = Adapter(adapter.spec, SITES)
    stored.load_weights(checkpoint)
    assert stored.theta.equal(adapter.theta)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-3", "config.json", "initial_adapter", "seed_log"]


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path):
    adapter = run(tmp_path, steps=3)
    before = contents(tmp_path)
    state = {"global_step": 3, "log_history": ["x" * 10_000]}
    with file_size_limit(8000), pytest.raises(OSError):  # the adapter fits, its state does not
        RunDirectory(config(tmp_path)).save_checkpoint(adapter, state)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "initial_adapter", "seed_log"]


def test_state_is_read_back_or_absent(tmp_path):
    run(tmp_path, steps=1)
    directory = RunDirectory(config(tmp_path))
    assert directory.load_state() is None
    directory.save_state({"global_step": 1})
    assert directory.load_state() == {"global_step": 1}


def test_a_json_file_that_cannot_be_written_keeps_its_older_content(tmp_path):
    write_json(tmp_path / "state.json", {"step": 1})
    with file_size_limit(100), pytest.raises(OSError):
        write_json(tmp_path / "state.json", {"step": "x" * 1000})
    with pytest.raises(TypeError):
        write_json(tmp_path / "state.json", {"step": torch.zeros(1)})
    assert os.listdir(tmp_path) == ["state.json"]
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}


def test_a_run_goes_on_with_its_own_base_model_and_precision_only(tmp_path):
    base_model = {"name": "facebook/opt-125m", "fingerprint": "sha256:1", "precision": "float32"}
    adapter = initial_adapter()
    RunDirectory(config(tmp_path), base_model).open(adapter).close()
    resumed = config(tmp_path, resume_from_checkpoint=True)
    before = contents(tmp_path)
    with pytest.raises(
        BaseModelError, match="base_model='facebook/opt-125m' is not allowed: .* other weights under this name"
    ):
        RunDirectory(resumed, base_model | {"fingerprint": "sha256:2"}).open(initial_adapter())
    with pytest.raises(ConfigError, match="dtype='bfloat16' is not allowed: the run to resume has 'float32'"):
        RunDirectory(resumed, base_model | {"precision": "bfloat16"}).open(initial_adapter())
    assert contents(tmp_path) == before
    RunDirectory(resumed, base_model | {"name": "/models/opt-125m"}).open(initial_adapter()).close()


def test_a_run_that_kept_no_record_of_its_base_model_goes_on(tmp_path):
    run(tmp_path, steps=1)
    base_model = {"name": "facebook/opt-125m", "fingerprint": "sha256:1", "precision": "float32"}
    RunDirectory(config(tmp_path, resume_from_checkpoint=True), base_model).open(initial_adapter()).close()


def test_a_line_of_metrics_that_a_full_disk_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first_step, cut in ((0, b'{"step": 2, "lo'), (1, b""), (2, b"{")):
        tracker = Tracker(config(tmp_path, disable_tqdm=True), path, first_step, 10)
        tracker.record(first_step + 1, {"loss": 0.5})
        tracker.close()
        path.write_bytes(path.read_bytes() + cut)
    Tracker(config(tmp_path, disable_tqdm=True), path, 3, 10).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
