"""How many tokens a piece of training may have, on machines whose passes take a known time."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sglang.srt.mezo.service.scheduler import calibrate

ROOM = SimpleNamespace(free_rows=10_000, free_kv_tokens=100_000, kv_capacity=100_000, most_prefill_tokens=8192)


@pytest.fixture
def machine(monkeypatch):
    """A machine: seconds of a pass, by its tokens and by how often that many have run; gives the passes it is asked
    for."""

    def start(seconds) -> Counter:
        passes = Counter()

        def run(handle, tokens: int) -> float:
            passes[tokens] += 1
            return seconds(tokens, passes[tokens])

        monkeypatch.setattr(calibrate, "_seconds", run)
        return passes

    return start


def test_the_longest_pass_within_the_time(machine):
    passes = machine(lambda tokens, time: 0.001 * tokens)
    assert calibrate.pass_sizes(ROOM, 0.1, 0.5) == (64, 500)
    assert passes == {8: 3, 16: 1, 32: 1, 64: 1, 128: 3, 512: 2}, "one pass is enough to see that a size fits"


@pytest.mark.parametrize(
    ("cost", "room", "tokens"),
    [
        (1e-6, {}, 4096),
        (1e-6, {"most_prefill_tokens": 2048}, 2048),
        (1e-6, {"kv_capacity": 1000}, 1000),
        (0.0, {}, 4096),
    ],
)
def test_a_long_pass_is_never_longer_than_the_engine_has_room_for(machine, cost, room, tokens):
    machine(lambda size, time: cost * size)
    assert calibrate.pass_sizes(SimpleNamespace(**{**vars(ROOM), **room}), 1e-5, 0.5)[1] == tokens


@pytest.mark.parametrize("idle", [0.0, 0.05, 0.1])
def test_pieces_never_grow_where_the_bound_is_that_of_the_short_ones_or_less(machine, idle):
    machine(lambda tokens, time: 0.001 * tokens)
    short, long = calibrate.pass_sizes(ROOM, 0.1, idle)
    assert short == 64 <= long <= 100


def test_the_pass_that_compiles_does_not_count(machine):
    machine(lambda tokens, time: 0.001 * tokens + (20 if time == 1 else 0))
    assert calibrate.pass_sizes(ROOM, 0.1, 0.5) == (64, 500)


def test_where_the_shortest_pass_is_long_twice_its_time_is_allowed(machine):
    machine(lambda tokens, time: 0.5 + 0.01 * tokens)
    assert calibrate.pass_sizes(ROOM, 0.1, 0.0)[0] == 64  # 1.14 s, and twice the shortest is 1.16


def test_one_pass_that_something_else_held_up_decides_nothing(machine):
    machine(lambda tokens, time: 0.001 * tokens + (5 if time < 3 else 0))
    assert calibrate.pass_sizes(ROOM, 0.1, 0.0)[0] == 64


@pytest.mark.parametrize(
    "room", [{"free_rows": 8, "free_kv_tokens": 10_000}, {"free_rows": 1000, "free_kv_tokens": 40}]
)
def test_no_more_than_there_is_room_for(machine, room):
    machine(lambda tokens, time: 1e-6 * tokens)
    assert calibrate.pass_sizes(SimpleNamespace(**{**vars(ROOM), **room}), 0.1, 1.0)[0] == 32
