"""The order of the examples: complete, shuffled, and a function of the step alone."""

from collections import Counter

import pytest

from sglang.srt.mezo.data.batches import BatchStream


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 5)])
def test_every_example_comes_once_an_epoch(num_examples, batch_size):
    stream = BatchStream(num_examples, batch_size, seed=3)
    places = [index for step in range(6 * num_examples) for index in stream.batch(step)]
    for start in range(0, len(places) - num_examples, num_examples):
        assert sorted(places[start : start + num_examples]) == list(range(num_examples))
    assert max(Counter(places).values()) - min(Counter(places).values()) <= 1


def test_a_batch_depends_on_the_step_and_the_seed_alone():
    whole = BatchStream(50, 8, seed=3)
    batches = [whole.batch(step) for step in range(40)]
    backwards = BatchStream(50, 8, seed=3)
    assert [backwards.batch(step) for step in reversed(range(40))] == batches[::-1]
    assert BatchStream(50, 8, seed=3).batch(33) == batches[33]
    assert BatchStream(50, 8, seed=4).batch(0) != batches[0]


def test_epochs_are_ordered_differently():
    stream = BatchStream(50, 50, seed=3)
    orders = {tuple(stream.batch(epoch)) for epoch in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 11, 17, 40])
def test_draws_are_those_of_the_batches(step):
    stream = BatchStream(7, 3, seed=3)
    stream.extend(9, 4)
    stream.extend(11, 2)
    seen = [index for earlier in range(step) for index in stream.batch(earlier)]
    assert stream.draws(step) == [seen.count(index) for index in range(13)]


@pytest.mark.parametrize("step", [0, 2, 9, 10, 12, 40])
def test_in_the_first_epochs_every_example_comes_that_came_before(step):
    stream = BatchStream(7, 3, seed=3)
    stream.extend(9, 4)
    stream.extend(11, 2)
    steps = stream.first_epochs(step)
    assert steps == [earlier for earlier in (0, 1, 2, 9, 10, 11, 12, 13, 14, 15) if earlier < step]
    seen = {index for earlier in steps for index in stream.batch(earlier)}
    assert seen == {index for earlier in range(step) for index in stream.batch(earlier)}


def test_epoch_counts_the_examples_seen():
    assert [BatchStream(32, 8, seed=0).epoch(step) for step in (0, 2, 4, 6)] == [0.0, 0.5, 1.0, 1.5]


def test_examples_that_are_added_count_from_their_step_on_and_change_nothing_before():
    plain, extended = BatchStream(20, 4, seed=3), BatchStream(20, 4, seed=3)
    extended.extend(7, 12)
    assert [extended.batch(step) for step in range(7)] == [plain.batch(step) for step in range(7)]
    later = [index for step in range(7, 15) for index in extended.batch(step)]
    assert sorted(later) == list(range(32)), "the first pass over all of them takes each once"
    assert extended.epoch(7) == plain.epoch(7) and extended.epoch(15) == plain.epoch(7) + 1
    assert extended.portions == [(0, 20), (7, 12)]


def test_a_stream_with_additions_is_a_pure_function_of_the_step():
    stream, other = BatchStream(20, 4, seed=3), BatchStream(20, 4, seed=3)
    for target in (stream, other):
        target.extend(5, 3)
        target.extend(5, 2)
        target.extend(9, 7)
    assert stream.portions == [(0, 20), (5, 5), (9, 7)]
    forwards = [stream.batch(step) for step in range(30)]
    assert [other.batch(step) for step in reversed(range(30))] == forwards[::-1]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "window", "echoes"), [(20, 4, 5, 3), (23, 4, 5, 3), (10, 3, 9, 2), (7, 5, 1, 4)]
)
def test_a_window_is_echoed_before_the_next(num_examples, batch_size, window, echoes):
    stream = BatchStream(num_examples, batch_size, seed=3, window=window, echoes=echoes)
    cycle = num_examples * echoes
    places = [index for step in range(3 * cycle) for index in stream.batch(step)]
    reordered = 0
    for start in range(0, len(places) - cycle, cycle):
        assert Counter(places[start : start + cycle]) == dict.fromkeys(range(num_examples), echoes)
        for first in range(0, num_examples, window):
            size = min(window, num_examples - first)
            at = start + first * echoes
            passes = [places[at + i * size : at + (i + 1) * size] for i in range(echoes)]
            assert all(len(set(one)) == size and set(one) == set(passes[0]) for one in passes)
            reordered += len(set(map(tuple, passes))) > 1
    assert reordered > 1 or window == 1


def test_windows_of_cycles_differ():
    stream = BatchStream(40, 10, seed=3, window=10, echoes=2)
    windows = [frozenset(stream.batch(step)) for step in range(0, 32, 2)]
    assert len(set(windows)) == len(windows)


@pytest.mark.parametrize("step", [0, 1, 5, 8, 9, 10, 11, 17, 40, 90])
def test_draws_from_windows_are_those_of_the_batches(step):
    stream = BatchStream(17, 3, seed=3, window=5, echoes=4)
    stream.extend(9, 4)
    seen = [index for earlier in range(step) for index in stream.batch(earlier)]
    assert stream.draws(step) == [seen.count(index) for index in range(21)]


def test_a_step_names_the_window_that_it_begins_in():
    stream = BatchStream(20, 4, seed=3, window=8, echoes=2)
    assert [stream.window_of(step) for step in range(11)] == [(0, 0, 0)] * 4 + [(0, 0, 1)] * 4 + [(0, 0, 2)] * 2 + [
        (0, 1, 0)
    ]
    assert BatchStream(20, 4, seed=3).window_of(3) is None


@pytest.mark.parametrize("window", [20, 21, None])
def test_a_window_of_all_examples_changes_nothing(window):
    stream, plain = BatchStream(20, 4, seed=3, window=window, echoes=7), BatchStream(20, 4, seed=3)
    assert [stream.batch(step) for step in range(30)] == [plain.batch(step) for step in range(30)]


def test_added_examples_open_windows_anew():
    stream = BatchStream(8, 4, seed=3, window=8, echoes=5)
    assert stream.window_of(1) is None
    stream.extend(4, 8)
    assert stream.window_of(4) == (1, 0, 0) and stream.window_of(14) == (1, 0, 1)
