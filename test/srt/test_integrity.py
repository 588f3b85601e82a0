"""Files of a run and of an adapter, each byte of which may be damaged: told in one line, or without effect, and
nothing is deleted."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sglang.srt.mezo.adapters.adapter import Adapter
from sglang.srt.mezo.core.errors import ConfigError, DamagedError, LogError, MezoError
from sglang.srt.mezo.core.integrity import read_checked_json, require_sums, write_checked_json
from sglang.srt.mezo.training.run_directory import RunDirectory, read_portions
from test_run_directory import SITES, config, contents, initial_adapter, run

STATE = {
    "global_step": 40,
    "evaluated_at": 40,
    "best_global_step": 20,
    "best_metric": 0.6931471805599453,
    "window": None,
    "log_history": [
        {"step": step, "eval_loss": 0.7 - step / 1000, "forward_passes": 8.0 * step} for step in (0, 20, 40)
    ],
}


def damages(data: bytes, most: int = 300) -> Iterator[bytes]:
    """One byte changed, for each of the first ones and some spread over the rest, and cut off at each of these
    places."""
    rest = range(most, len(data), max(1, (len(data) - most) // 100))
    for place in [*range(min(most, len(data))), *rest]:
        for flip in (0x01, 0x80):
            yield data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
        yield data[:place]


def sweep(path: Path, read: Callable[[], object], same: Callable[[object], bool]) -> tuple[int, int]:
    """How many damages of a file are told, and how many have no effect; there is no third."""
    data, folder = path.read_bytes(), path.parent
    names = sorted(os.listdir(folder))
    told = harmless = 0
    for damaged in damages(data):
        path.write_bytes(damaged)
        try:
            assert same(read()), damaged
            harmless += 1
        except MezoError as error:
            told += 1
            assert path.name in str(error) or path.parent.name in str(error)
            assert "\n" not in str(error)
        assert sorted(os.listdir(folder)) == names and path.read_bytes() == damaged
    path.write_bytes(data)
    return told, harmless


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_fields_are_read_back_and_the_file_is_json_to_everybody(tmp_path):
    path = tmp_path / "trainer_state.json"
    write_checked_json(path, {**STATE, "pair": (1, 2), 3: "three"})
    assert read_checked_json(path) == {**STATE, "pair": [1, 2], "3": "three"}
    assert json.loads(path.read_text()).items() >= STATE.items()


@pytest.mark.parametrize("name", ["trainer_state.json", "segments.json"])
def test_each_byte_of_a_state_may_be_damaged(tmp_path, name):
    (tmp_path / "run").mkdir()
    directory = RunDirectory(config(tmp_path))
    directory.save_state(STATE)
    directory.save_portions([(0, 10), (25, 6), (31, 1)])
    read, expected = {
        "trainer_state.json": (directory.load_state, STATE),
        "segments.json": (lambda: read_portions(directory.portions), [(0, 10), (25, 6), (31, 1)]),
    }[name]

    def same(found: object) -> bool:
        """Where the checksum's own name is damaged, a field that nobody asks for is left."""
        return found == expected if name == "segments.json" else found.items() >= expected.items()

    told, harmless = sweep(tmp_path / "run" / name, read, same)
    assert told > 10 * harmless


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000], ids=["empty", "list", "null", "no text", "deep"]
)
def test_what_is_no_state_is_damaged(tmp_path, content):
    (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(DamagedError, match="trainer_state.json is damaged"):
        read_checked_json(tmp_path / "trainer_state.json")


def test_files_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    assert read_checked_json(tmp_path / "trainer_state.json") == STATE
    (tmp_path / "segments.json").write_text("[[0, 10], [5, 2]]")
    assert read_portions(tmp_path / "segments.json") == [(0, 10), (5, 2)]
    assert read_portions(tmp_path / "none.json") == []
    (tmp_path / "segments.json").write_text("[[0, 10], [5, 2")
    with pytest.raises(DamagedError, match="segments.json"):
        read_portions(tmp_path / "segments.json")


def test_each_byte_of_a_runs_configuration_may_be_damaged(tmp_path):
    run(tmp_path, steps=2)
    settings = config(tmp_path, resume_from_checkpoint=True)

    def resume() -> torch.Tensor:
        adapter = initial_adapter(seed=1)
        RunDirectory(settings).open(adapter).close()
        return adapter.theta

    told, _ = sweep(tmp_path / "run" / "config.json", resume, lambda theta: theta.equal(initial_adapter().theta))
    assert told > 300


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    initial_adapter().save_pretrained(tmp_path / "best-20")
    return tmp_path / "best-20"


def weights(folder: Path) -> torch.Tensor:
    adapter = Adapter(initial_adapter().spec, SITES)
    adapter.load_weights(folder)
    return adapter.theta


def test_sums_are_those_of_sha256sum(folder):
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "adapter_config.json: OK\nadapter_model.safetensors: OK\n"), done
    assert (
        hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        in (folder / "SHA256SUMS").read_text()
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "SHA256SUMS"])
def test_each_byte_of_an_adapter_may_be_damaged(folder, name):
    told, harmless = sweep(folder / name, lambda: weights(folder), lambda theta: theta.equal(initial_adapter().theta))
    assert told and harmless <= (4 if name == "SHA256SUMS" else 0)  # of the last line's end


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_an_adapter_that_is_gone_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DamagedError, match=f"{name} is damaged: it is gone"):
        weights(folder)


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(DamagedError, match="best-20.*No such file"):
        weights(tmp_path / "best-20")


def test_adapters_of_earlier_versions_have_no_sums(folder):
    (folder / "SHA256SUMS").unlink()
    require_sums(folder, ["adapter_config.json"])
    assert weights(folder).equal(initial_adapter().theta)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedError, match="adapter_model.safetensors is damaged"):
        weights(folder)


def test_an_initial_adapter_that_is_another_is_refused_whatever_its_sums_say(tmp_path):
    run(tmp_path, steps=2)
    other = initial_adapter()
    other.theta[7] = torch.nextafter(other.theta[7], torch.tensor(9.0))
    shutil.rmtree(tmp_path / "run" / "initial_adapter")
    other.save_pretrained(tmp_path / "run" / "initial_adapter")
    before = contents(tmp_path)
    with pytest.raises(LogError, match="starts from other weights"):
        RunDirectory(config(tmp_path, resume_from_checkpoint=True)).open(initial_adapter(seed=1))
    assert contents(tmp_path) == before


# --- folders ----------------------------------------------------------------------------------------------------------


def test_of_two_runs_that_begin_in_a_folder_at_once_one_gets_it(tmp_path, monkeypatch):
    run(tmp_path, steps=3)
    before = contents(tmp_path)
    monkeypatch.setattr(RunDirectory, "check", lambda self: None)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # as the folder was when the second looked
    with pytest.raises(ConfigError, match="no other run begins in"):
        RunDirectory(config(tmp_path)).open(initial_adapter())
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_of_best_adapters_only_the_one_that_was_is_dropped(tmp_path):
    run(tmp_path, steps=1)
    directory = RunDirectory(config(tmp_path))
    for step in (10, 20):
        initial_adapter().save_pretrained(directory.best(step))
    directory.drop_best(10)
    directory.drop_best(15)
    assert [name for name in os.listdir(directory.path) if name.startswith("best")] == ["best-20"]
