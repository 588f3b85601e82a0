"""The seed log against numpy's reading of its bytes, and a training run against its replay."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import file_size_limit

from sglang.srt.mezo.errors import LogError
from sglang.srt.mezo.noise import step_seed
from sglang.srt.mezo.optimizer import Optimizer, UpdateRule
from sglang.srt.mezo.seed_log import LogHeader, LogRecord, SeedLog

NUMEL = 1000
RULE = UpdateRule(weight_decay=0.01)
HEADER = LogHeader(((10, 60), (40, 10)), 2, RULE)
RECORD_BYTES = 8 + 8 + 2 * 4


def float32(value: float) -> float:
    return float(np.float32(value))


def records(count: int) -> list[LogRecord]:
    return [LogRecord(step_seed(2**63, i), 0.1 / (i + 1), (float32(0.3 * i), float32(-1.7))) for i in range(count)]


@pytest.fixture
def log(tmp_path) -> SeedLog:
    return SeedLog.create(tmp_path / "seed_log", HEADER)


def fill(log: SeedLog, count: int) -> list[LogRecord]:
    written = records(count)
    for record in written:
        log.append(record)
    return written


def test_what_is_appended_is_read_back_exactly(log):
    written = fill(log, 5)
    assert len(log) == 5
    assert log.records() == written
    reopened = SeedLog.open(log.path)
    assert (reopened.header, reopened.records()) == (HEADER, written)


def test_file_is_a_json_line_and_little_endian_records(log):
    written = fill(log, 3)
    line, _, body = log.path.read_bytes().partition(b"\n")
    header = json.loads(line)
    assert (header["shapes"], header["num_perturbations"]) == ([[10, 60], [40, 10]], 2)
    assert header["rule"] == {
        "distribution": "gaussian", "perturbation_rank": None, "weight_decay": 0.01, "optim": "sgd", "momentum": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    }  # fmt: skip
    table = np.frombuffer(body, dtype=[("seed", "<u8"), ("rate", "<f8"), ("grads", "<f4", 2)])
    assert table.itemsize == RECORD_BYTES
    assert [LogRecord(int(row["seed"]), float(row["rate"]), tuple(row["grads"].tolist())) for row in table] == written


def test_a_record_is_on_disk_before_append_returns(log):
    record = records(1)[0]
    log.append(record)
    assert SeedLog.open(log.path).records() == [record]


@pytest.mark.parametrize(
    "rule",
    [RULE, UpdateRule(momentum=0.9), UpdateRule("rademacher", optim="adamw", weight_decay=0.1), UpdateRule(perturbation_rank=2)],
    ids=["sgd", "momentum", "adamw", "low rank"],
)
def test_replay_gives_the_trained_weights_bit_for_bit(tmp_path, rule):
    log = SeedLog.create(tmp_path / "seed_log", replace(HEADER, rule=rule))
    initial = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    theta, history = initial.clone(), []
    optimizer = Optimizer(theta, HEADER.shapes, rule)
    for record in fill(log, 6):
        z = [optimizer.direction(record.seed, k) for k in range(2)]
        optimizer.step(z, record.projected_grads, record.learning_rate)
        history.append(theta.clone())
    for steps, expected in ((None, history[-1]), (6, history[-1]), (4, history[3]), (0, initial)):
        rebuilt = initial.clone()
        SeedLog.open(log.path).replay(rebuilt, steps)
        assert rebuilt.equal(expected), steps


@pytest.mark.parametrize("left", [1, RECORD_BYTES - 1])
def test_a_record_that_a_crash_cut_short_is_dropped_and_overwritten(log, left):
    written = fill(log, 4)
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(data[: -RECORD_BYTES + left])
    reopened = SeedLog.open(log.path)
    assert reopened.records() == written[:3]
    reopened.append(written[3])
    assert log.path.read_bytes() == data


def test_a_full_disk_is_an_error_and_leaves_whole_records(log):
    written = fill(log, 2)
    log.append(written[0])
    with file_size_limit(log.path.stat().st_size + RECORD_BYTES // 2), pytest.raises(OSError):
        log.append(written[1])
    assert log.records() == [*written, written[0]]
    log.append(written[1])  # there is room again
    assert log.records() == [*written, *written]
    assert SeedLog.open(log.path).records() == [*written, *written]


def test_truncate_keeps_the_first_records_and_never_invents_any(log):
    written = fill(log, 5)
    log.truncate(9)
    assert log.records() == written
    log.truncate(2)
    assert log.records() == written[:2]
    log.append(written[4])
    assert log.records() == [*written[:2], written[4]]


def test_create_does_not_overwrite_a_log(log):
    fill(log, 2)
    with pytest.raises(FileExistsError):
        SeedLog.create(log.path, HEADER)
    assert len(log) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not json\n", b"[1]\n", b"{}\n", b'{"format": "something else"}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [[1, 2]]}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [3], "num_perturbations": 1, "rule": {}}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [[1, 2]], "num_perturbations": 1, "rule": {"optim": "sgd", "speed": 1}}\n',
        b'{"format": "sglang-mezo seed log 1", "numel": 3, "num_perturbations": 1, "distribution": "gaussian", "weight_decay": 0}\n',
    ],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "seed_log").write_bytes(content)
    with pytest.raises(LogError, match="seed_log is not a seed log"):
        SeedLog.open(tmp_path / "seed_log")


def test_replay_on_an_adapter_of_another_size_is_refused_and_changes_nothing(log):
    fill(log, 2)
    theta = torch.ones(NUMEL + 1)
    with pytest.raises(LogError, match="1000 parameters, not 1001"):
        log.replay(theta)
    assert theta.equal(torch.ones(NUMEL + 1))


def test_a_log_has_one_writer_at_a_time(log):
    log.append(LogRecord(1, 0.5, (0.25, 0.5)))
    other = SeedLog.open(log.path)
    with pytest.raises(LogError, match="is being written by another run"):
        other.append(LogRecord(2, 0.5, (0.25, 0.5)))
    assert len(other) == 1
    log.close()
    other.append(LogRecord(2, 0.5, (0.25, 0.5)))
    assert [record.seed for record in other.records()] == [1, 2]
