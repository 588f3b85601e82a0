"""The seed log against numpy's reading of its bytes, a training run against its replay, and what becomes of damage."""

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from drawn import whole
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.errors import LogError
from sglang.srt.mezo.core.noise import step_seed
from sglang.srt.mezo.core.optimizer import Optimizer, UpdateRule
from sglang.srt.mezo.core.seed_log import LogHeader, LogRecord, SeedLog
from tiny import file_size_limit

NUMEL = 1000
RULE = UpdateRule(weight_decay=0.01)
INITIAL = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
HEADER = LogHeader(((10, 60), (40, 10)), 2, RULE, hashlib.sha256(INITIAL.numpy().tobytes()).hexdigest())
RECORD_BYTES = 8 + 8 + 2 * 4 + 4
RECORD = [("seed", "<u8"), ("rate", "<f8"), ("grads", "<f4", 2)]


def float32(value: float) -> float:
    return float(np.float32(value))


RECORDS = [LogRecord(step_seed(2**63, i), 0.1 / (i + 1), (float32(0.3 * i), float32(-1.7))) for i in range(51)]


def records(count: int) -> list[LogRecord]:
    return RECORDS[:count]


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


def test_file_is_a_json_line_and_little_endian_records_with_chained_checksums(log):
    written = fill(log, 3)
    line, newline, body = log.path.read_bytes().partition(b"\n")
    header = json.loads(line)
    assert header["initial_adapter"] == HEADER.initial_adapter
    assert (header["shapes"], header["num_perturbations"]) == ([[10, 60], [40, 10]], 2)
    assert header["rule"] == {
        "distribution": "gaussian",
        "perturbation_rank": None,
        "weight_decay": 0.01,
        "optim": "sgd",
        "momentum": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
    }
    of_line, count, of_count = struct.unpack_from("<III", body)
    assert (of_line, count) == (zlib.crc32(line + newline), 3)
    assert of_count == zlib.crc32(struct.pack("<I", 3), of_line)
    table = np.frombuffer(body, dtype=[*RECORD, ("check", "<u4")], offset=12)
    assert table.itemsize == RECORD_BYTES
    assert [LogRecord(int(row["seed"]), float(row["rate"]), tuple(row["grads"].tolist())) for row in table] == written
    covered = line + newline
    for row in table:
        covered += row.tobytes()[:-4]
        assert row["check"] == zlib.crc32(covered)


def test_twenty_thousand_steps_of_one_direction_are_less_than_a_megabyte(tmp_path):
    log = SeedLog.create(tmp_path / "seed_log", replace(HEADER, num_perturbations=1))
    for step in range(20_000):
        log.append(LogRecord(step_seed(0, step), 1e-3, (0.5,)))
    assert len(log) == len(SeedLog.open(log.path)) == 20_000
    assert log.path.stat().st_size < 1_000_000


def test_a_record_is_on_disk_before_append_returns(log):
    record = records(1)[0]
    log.append(record)
    assert SeedLog.open(log.path).records() == [record]


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        UpdateRule(momentum=0.9),
        UpdateRule("rademacher", optim="adamw", weight_decay=0.1),
        UpdateRule(perturbation_rank=2),
    ],
    ids=["sgd", "momentum", "adamw", "low rank"],
)
def test_replay_gives_the_trained_weights_bit_for_bit(tmp_path, rule):
    log = SeedLog.create(tmp_path / "seed_log", replace(HEADER, rule=rule))
    theta, history = INITIAL.clone(), []
    optimizer = Optimizer(theta, HEADER.shapes, rule)
    for record in fill(log, 6):
        directions = optimizer.directions(record.seed, 2)
        z = [whole(directions, k, theta.numel()) for k in range(2)]
        optimizer.step(KeptDirections(z), record.projected_grads, record.learning_rate)
        history.append(theta.clone())
    for steps, expected in ((None, history[-1]), (6, history[-1]), (4, history[3]), (0, INITIAL)):
        rebuilt = INITIAL.clone()
        SeedLog.open(log.path).replay(rebuilt, steps)
        assert rebuilt.equal(expected), steps


@pytest.mark.parametrize("left", [1, RECORD_BYTES - 1])
def test_a_record_that_a_crash_cut_short_is_dropped_and_overwritten(log, left):
    written = fill(log, 3)
    before = log.path.read_bytes()
    log.append(records(4)[3])
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(before + data[len(before) :][:left])  # the record comes before the number of records
    reopened = SeedLog.open(log.path)
    assert (reopened.records(), reopened.damage) == (written, None)
    assert reopened.recover() is None
    reopened.append(records(4)[3])
    assert log.path.read_bytes() == data


def test_a_record_whose_append_was_stopped_before_it_was_counted_counts(log):
    written = fill(log, 3)
    before = log.path.read_bytes()
    log.append(records(4)[3])
    log.close()
    log.path.write_bytes(before + log.path.read_bytes()[len(before) :])
    reopened = SeedLog.open(log.path)
    assert (reopened.records(), reopened.damage) == ([*written, records(4)[3]], None)


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
        b"",
        b"not json\n",
        b"[1]\n",
        b"{}\n",
        b'{"format": "something else"}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [[1, 2]]}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [3], "num_perturbations": 1, "rule": {}}\n',
        b'{"format": "sglang-mezo seed log 3", "shapes": [[1, 2]], "num_perturbations": 1, "rule": {}, '
        b'"initial_adapter": null}\n',
        b'{"format": "sglang-mezo seed log 2", "shapes": [[1, 2]], "num_perturbations": 1, "rule": {"optim": "sgd", '
        b'"speed": 1}}\n',
        b'{"format": "sglang-mezo seed log 1", "numel": 3, "num_perturbations": 1, "distribution": "gaussian", '
        b'"weight_decay": 0}\n',
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "seed_log").write_bytes(content)
    with pytest.raises(LogError, match="seed_log is not a seed log"):
        SeedLog.open(tmp_path / "seed_log")


def test_a_log_of_a_later_version_is_left_as_it_is(log):
    line, rest = log.path.read_bytes().split(b"\n", 1)
    later = line.replace(b"seed log 3", b"seed log 9") + b"\n"
    log.path.write_bytes(later + zlib.crc32(later).to_bytes(4, "little") + rest[4:])
    before = log.path.read_bytes()
    with pytest.raises(LogError, match="its format is 'sglang-mezo seed log 9', which a later version"):
        SeedLog.open(log.path)
    assert log.path.read_bytes() == before


def test_replay_on_an_adapter_of_another_size_is_refused_and_changes_nothing(log):
    fill(log, 2)
    theta = torch.ones(NUMEL + 1)
    with pytest.raises(LogError, match="1000 parameters, not 1001"):
        log.replay(theta)
    assert theta.equal(torch.ones(NUMEL + 1))


def test_replay_on_another_initial_adapter_is_refused_and_changes_nothing(log):
    fill(log, 2)
    other = INITIAL.clone()
    other[500] = torch.nextafter(other[500], torch.tensor(9.0))
    theta = other.clone()
    with pytest.raises(LogError, match="starts from other weights"):
        log.replay(theta)
    assert theta.equal(other)


def test_more_steps_than_there_are_is_an_error(log):
    fill(log, 2)
    with pytest.raises(LogError, match="has 2 records, not 3"):
        log.replay(INITIAL.clone(), 3)


def test_a_log_of_an_earlier_version_is_read_and_goes_on(tmp_path):
    header = {name: value for name, value in asdict(HEADER).items() if name != "initial_adapter"}
    line = json.dumps({"format": "sglang-mezo seed log 2", **header}).encode() + b"\n"
    table = np.array(
        [(record.seed, record.learning_rate, record.projected_grads) for record in records(3)], dtype=RECORD
    )
    path = tmp_path / "seed_log"
    path.write_bytes(line + table.tobytes() + b"half a record")
    log = SeedLog.open(path)
    assert (log.header, log.records(), log.damage) == (replace(HEADER, initial_adapter=None), records(3), None)
    log.append(records(4)[3])
    log.truncate(9)
    log.close()
    assert path.read_bytes()[: len(line) + table.nbytes] == line + table.tobytes()
    theta, expected = INITIAL.clone(), INITIAL.clone()
    SeedLog.open(path).replay(theta)
    optimizer = Optimizer(expected, HEADER.shapes, RULE)
    for record in records(4):
        optimizer.replay(record.seed, record.projected_grads, record.learning_rate)
    assert theta.equal(expected)


def test_a_log_has_one_writer_at_a_time(log):
    log.append(LogRecord(1, 0.5, (0.25, 0.5)))
    other = SeedLog.open(log.path)
    with pytest.raises(LogError, match="is being written by another run"):
        other.append(LogRecord(2, 0.5, (0.25, 0.5)))
    assert len(other) == 1
    log.close()
    other.append(LogRecord(2, 0.5, (0.25, 0.5)))
    assert [record.seed for record in other.records()] == [1, 2]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fifty(log) -> bytes:
    """A log of 50 records."""
    fill(log, 50)
    log.close()
    return log.path.read_bytes()


def header_bytes(data: bytes) -> int:
    """Without the number of records, whose loss loses none."""
    return data.index(b"\n") + 1 + 4


def require_told(log: SeedLog, data: bytes, whole: int) -> None:
    """The first ``whole`` records can be had, no more are, and the file is the same as before."""
    assert log.damage is not None and str(whole) in log.damage
    assert len(log) == whole
    assert log.records(whole) == records(whole)
    for read in (log.records, lambda: log.records(whole + 1), lambda: log.replay(INITIAL.clone())):
        with pytest.raises(LogError, match=f"seed_log.*{whole}"):
            read()
    assert log.path.read_bytes() == data


def require_recovered(log: SeedLog, data: bytes, whole: int) -> None:
    """The damaged file is kept; what is whole goes on as if there had never been more."""
    for change in (lambda: log.append(records(51)[50]), lambda: log.truncate(1)):
        with pytest.raises(LogError, match="seed_log is damaged"):
            change()
    told = log.recover()
    copy = log.path.with_name(told.rpartition(" ")[2])
    assert str(log.path) in told and str(whole) in told and copy.read_bytes() == data
    assert log.recover() is None and log.records() == records(whole)
    log.append(records(51)[whole])
    log.close()
    reopened = SeedLog.open(log.path)
    assert (reopened.records(), reopened.damage) == (records(whole + 1), None)
    copy.unlink()


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_that_changes_is_told_and_the_records_before_it_are_kept(log, fifty, flip):
    first = header_bytes(fifty) + 8
    for place in range(len(fifty)):
        data = fifty[:place] + bytes([fifty[place] ^ flip]) + fifty[place + 1 :]
        log.path.write_bytes(data)
        if place < header_bytes(fifty):
            with pytest.raises(LogError, match="seed_log.*header is damaged"):
                SeedLog.open(log.path)
            continue
        whole = 50 if place < first else (place - first) // RECORD_BYTES
        damaged = SeedLog.open(log.path)
        require_told(damaged, data, whole)
        if flip == 0xFF:
            require_recovered(damaged, data, whole)


def test_every_truncation_is_told_and_the_records_before_it_are_kept(log, fifty):
    first = header_bytes(fifty) + 8
    for length in range(len(fifty)):
        data = fifty[:length]
        log.path.write_bytes(data)
        if length < header_bytes(fifty):
            with pytest.raises(LogError, match="seed_log.*header is damaged"):
                SeedLog.open(log.path)
            continue
        damaged = SeedLog.open(log.path)
        whole = max(0, length - first) // RECORD_BYTES
        require_told(damaged, data, whole)
        require_recovered(damaged, data, whole)


@pytest.mark.parametrize(
    ("order", "whole"),
    [
        ([0, 2, 1, 3, 4], 1),
        ([0, 1, 1, 2, 3], 2),
        ([0, 1, 1, 2, 3, 4], 2),
        ([0, 1, 3, 4], 2),
        ([1, 2, 3, 4], 0),
        ([0, 1, 2, 3, 4, 4], 5),
    ],
    ids=["swapped", "one over another", "twice", "left out", "the first left out", "the last twice"],
)
def test_records_that_change_places_are_told(log, order, whole):
    fill(log, 5)
    log.close()
    data = log.path.read_bytes()
    start = len(data) - 5 * RECORD_BYTES
    parts = [data[start + i * RECORD_BYTES :][:RECORD_BYTES] for i in range(5)]
    moved = data[:start] + b"".join(parts[i] for i in order)
    log.path.write_bytes(moved)
    damaged = SeedLog.open(log.path)
    assert damaged.records(whole) == records(whole)
    with pytest.raises(LogError, match=f"record {whole + 1}"):
        damaged.records()


def test_a_record_of_another_log_is_told(log, tmp_path):
    fill(log, 2)
    other = SeedLog.create(tmp_path / "other", replace(HEADER, rule=replace(RULE, weight_decay=0.02)))
    fill(other, 2)
    log.path.write_bytes(log.path.read_bytes()[:-RECORD_BYTES] + other.path.read_bytes()[-RECORD_BYTES:])
    assert SeedLog.open(log.path).damage == "record 2 of 2 does not agree with its checksum; the 1 before it are whole"


def test_what_is_damaged_twice_is_kept_twice(log):
    for place in (-1, -2):
        fill(log, 3)
        log.close()
        data = bytearray(log.path.read_bytes())
        data[place] ^= 1
        log.path.write_bytes(data)
        log = SeedLog.open(log.path)
        log.recover()
        log.truncate(0)
    assert sorted(path.name for path in log.path.parent.iterdir()) == [
        "seed_log",
        "seed_log.damaged-1",
        "seed_log.damaged-2",
    ]
