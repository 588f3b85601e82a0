"""How many tokens a piece of training may have, on machines whose passes take a known time."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sglang.srt.mezo.service import describe

ROOM = SimpleNamespace(free_rows=10_000, free_kv_tokens=100_000)


@pytest.fixture
def machine(monkeypatch):
    """A machine: seconds of a pass, by its tokens and by how often that many have run; gives the passes it is asked for."""

    def start(seconds) -> Counter:
        passes = Counter()

        def run(handle, tokens: int) -> float:
            passes[tokens] += 1
            return seconds(tokens, passes[tokens])

        monkeypatch.setattr(describe, "_seconds", run)
        return passes

    return start


def test_the_longest_pass_within_the_time(machine):
    passes = machine(lambda tokens, time: 0.001 * tokens)
    assert describe.tokens_within(ROOM, 0.1) == 64
    assert passes == {8: 3, 16: 1, 32: 1, 64: 1, 128: 3}, "one pass is enough to see that a size fits"


def test_where_the_shortest_pass_is_long_twice_its_time_is_allowed(machine):
    machine(lambda tokens, time: 0.5 + 0.01 * tokens)
    assert describe.tokens_within(ROOM, 0.1) == 64  # 1.14 s, and twice the shortest is 1.16


def test_one_pass_that_something_else_held_up_decides_nothing(machine):
    machine(lambda tokens, time: 0.001 * tokens + (5 if time < 3 else 0))
    assert describe.tokens_within(ROOM, 0.1) == 64


@pytest.mark.parametrize("room", [{"free_rows": 8, "free_kv_tokens": 10_000}, {"free_rows": 1000, "free_kv_tokens": 40}])
def test_no_more_than_there_is_room_for(machine, room):
    machine(lambda tokens, time: 1e-6 * tokens)
    assert describe.tokens_within(SimpleNamespace(**room), 0.1) == 32
