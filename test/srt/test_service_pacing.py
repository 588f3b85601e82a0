"""How much training runs beside serving, on a clock that the test turns."""

import pytest

from sglang.srt.mezo.service.scheduler.pacing import Pacer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def beside_requests(
    pacer: Pacer, clock: Clock, seconds: float, piece: float, step: float, waiting: int = 0, running: int = 1
) -> float:
    """Seconds that training gets in ``seconds`` of batches that take ``step`` each."""
    trained, end = 0.0, clock.now + seconds
    while clock.now < end:
        if pacer.allows(running=running, waiting=waiting):
            clock.now += piece
            pacer.ran(piece, running=running)
            trained += piece
        clock.now += step
    return trained


def test_an_idle_engine_trains_all_the_time(clock):
    pacer = Pacer(0.0, clock)
    for _ in range(10):
        assert pacer.allows(running=0, waiting=0)
        pacer.ran(0.05, running=0)
        clock.now += 0.05


def test_the_engine_is_quiet_until_a_request_comes_and_some_time_after_the_last(clock):
    pacer = Pacer(0.1, clock)
    assert pacer.quiet
    pacer.saw_requests()
    for _ in range(10):
        assert not pacer.quiet
        clock.now += 1
    clock.now += 1
    assert pacer.quiet
    pacer.saw_requests()
    assert not pacer.quiet


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(("piece", "step"), [(0.02, 0.03), (0.05, 0.002)])
def test_beside_requests_training_takes_its_share(clock, share, piece, step):
    pacer = Pacer(share, clock)
    pacer.ran(piece, running=0)
    assert beside_requests(pacer, clock, 60, piece, step) == pytest.approx(60 * share, rel=0.1)


def test_a_share_of_nothing_leaves_requests_alone(clock):
    pacer = Pacer(0.0, clock)
    pacer.ran(0.01, running=0)
    assert beside_requests(pacer, clock, 10, 0.01, 0.02) == 0


def test_a_burst_has_the_engine_to_itself(clock):
    pacer = Pacer(0.1, clock)
    pacer.ran(0.01, running=0)
    beside_requests(pacer, clock, 60, 0.01, 0.02, running=4)
    assert beside_requests(pacer, clock, 2, 0.01, 0.02, running=8) == 0
    assert beside_requests(pacer, clock, 10, 0.01, 0.02, running=3) == pytest.approx(1.0, rel=0.1)


def test_a_level_that_lasts_becomes_the_usual_one(clock):
    pacer = Pacer(0.1, clock)
    pacer.ran(0.01, running=0)
    beside_requests(pacer, clock, 40, 0.01, 0.02, running=32)
    assert beside_requests(pacer, clock, 10, 0.01, 0.02, running=32) == pytest.approx(1.0, rel=0.1)


def test_idle_time_is_not_saved_up_for_later(clock):
    pacer = Pacer(0.1, clock)
    pacer.ran(0.05, running=0)
    clock.now += 1000
    assert pacer.allows(running=0, waiting=0)
    assert not pacer.allows(running=1, waiting=0)


def test_nothing_runs_while_a_request_waits(clock):
    pacer = Pacer(0.5, clock)
    assert not pacer.allows(running=0, waiting=1)
    assert beside_requests(pacer, clock, 5, 0.01, 0.02, waiting=1) == 0


def test_a_queue_that_lasts_halves_the_share_and_it_grows_back(clock):
    pacer = Pacer(0.4, clock)
    pacer.ran(0.01, running=0)
    beside_requests(pacer, clock, 2.4, 0.01, 0.02, waiting=3)
    assert pacer.backoffs == 2 and pacer.current_share == pytest.approx(0.1)
    pressed = beside_requests(pacer, clock, 1, 0.01, 0.02)
    assert pressed < 0.2 * 0.4 + 0.4 * 0.5
    beside_requests(pacer, clock, 11, 0.01, 0.02)
    assert pacer.current_share == pytest.approx(0.4)


def test_arrivals_that_are_admitted_at_once_do_not_count_as_a_queue(clock):
    pacer = Pacer(0.2, clock)
    for _ in range(200):
        assert not pacer.allows(running=2, waiting=1)
        clock.now += 0.05
        pacer.allows(running=3, waiting=0)
        clock.now += 0.05
    assert pacer.backoffs == 0 and pacer.current_share == 0.2
