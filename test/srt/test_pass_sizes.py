"""passes.jsonl: which sizes the passes of each step had."""

import pytest

from sglang.srt.mezo.core.errors import DamagedError
from sglang.srt.mezo.training.pass_sizes import PassSizes, read_pass_sizes

SIZES = {3: [[512, 2], [64, 2]], 4: [[64, 3]]}


@pytest.fixture
def path(tmp_path):
    """Of a run whose passes were all of the usual size for three steps."""
    path = tmp_path / "passes.jsonl"
    sizes = PassSizes(path, 4096, resumes=False)
    for step in range(3):
        sizes.record(step, [4096, 4096])
    assert not path.exists()
    sizes.record(3, [512, 512, 64, 64])
    for step in (4, 5):
        sizes.record(step, [64, 64, 64])
    return path


def test_a_line_is_written_where_sizes_change(path):
    assert read_pass_sizes(path) == SIZES
    assert read_pass_sizes(path.with_name("none.jsonl")) == {}


@pytest.mark.parametrize("kept", [1, 10, 30])
def test_a_run_goes_on_after_a_line_that_was_cut_short(path, kept):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:kept])
    sizes = PassSizes(path, 4096, resumes=True)
    for step in (4, 5):
        sizes.record(step, [64, 64, 64])
    assert read_pass_sizes(path) == SIZES


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_line_is_named_and_not_passed_over(path, damage):
    path.write_bytes(damage + b"\n" + path.read_bytes())
    with pytest.raises(DamagedError, match="passes.jsonl is damaged"):
        read_pass_sizes(path)
