"""Metrics of a run for Transformers' callbacks."""

import json

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils as integrations

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.training.arguments import build, read
from sglang.srt.mezo.training.tracking import Tracker


class Told(TrainerCallback):
    """Keeps what it is told; a class, as Transformers makes its callbacks itself."""

    calls: list[tuple] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.append(
            ("begin", state.global_step, state.max_steps, args.output_dir, json.loads(args.to_json_string()))
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls.append(("log", state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.calls.append(("end",))


class Absent(TrainerCallback):
    def __init__(self):
        raise RuntimeError("Absent requires absent to be installed")


@pytest.fixture
def known(monkeypatch):
    """Two integrations beside Transformers' own; of "all", the first is installed."""
    monkeypatch.setattr(Told, "calls", [])
    table = {**integrations.INTEGRATION_TO_CALLBACK, "told": Told, "absent": Absent}
    monkeypatch.setattr(integrations, "INTEGRATION_TO_CALLBACK", table)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["told"])


def track(folder, report_to) -> list[tuple]:
    config = MezoConfig(output_dir=str(folder), report_to=report_to, disable_tqdm=True, learning_rate=0.25)
    tracker = Tracker(config, folder / "metrics.jsonl", 3, 9)
    tracker.record(4, {"loss": 0.5, "loss_plus": [0.5, 0.6], "train_seconds": 1})
    tracker.record(4, {"eval_loss": 0.25, "eval_accuracy": 0.75})
    tracker.close()
    return Told.calls


@pytest.mark.parametrize("report_to", ["told", ["told"], "all", ["all"]], ids=str)
def test_a_run_is_told_from_its_beginning_to_its_end(known, tmp_path, report_to):
    (begin, *logs, end) = track(tmp_path, report_to)
    settings = begin[-1]
    assert begin[:4] == ("begin", 3, 9, str(tmp_path)) and settings["learning_rate"] == 0.25 and "zo_eps" in settings
    assert logs == [
        ("log", 4, {"loss": 0.5, "train_seconds": 1}),
        ("log", 4, {"eval_loss": 0.25, "eval_accuracy": 0.75}),
    ]
    assert end == ("end",) and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("report_to", ["none", [], ["none"]], ids=str)
def test_nobody_is_told_by_default(known, tmp_path, report_to):
    assert track(tmp_path, report_to) == [] and MezoConfig().report_to == "none"


@pytest.mark.parametrize(
    ("report_to", "said"),
    [
        ("tensorbord", "some of none, all, "),
        (["told", "x"], "some of none"),
        ("absent", "absent where it is installed"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_named(known, tmp_path, report_to, said):
    with pytest.raises(ConfigError, match=f"report_to=.*{said}"):
        track(tmp_path, report_to)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["all"], ["all"]),
        (["none"], ["none"]),
        (["wandb", "mlflow"], ["wandb", "mlflow"]),
        (["wandb,mlflow"], ["wandb", "mlflow"]),
    ],
    ids=str,
)
def test_a_command_line_has_one_name_or_several(words, value):
    (config,) = build((MezoConfig,), read(["--report_to", *words], (MezoConfig,)))
    assert config.report_to == value


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(tmp_path, "tensorboard")
    [folder] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "eval/accuracy"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(4, 0.5)]
