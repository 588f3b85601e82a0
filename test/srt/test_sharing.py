"""What rows borrow from each other, against the rows themselves and against the fewest tokens that could be run."""

import random

from sglang.srt.mezo.core.tokens import distinct_tokens
from sglang.srt.mezo.scoring.sharing import SharedPrefix, plan_shared_prefixes, tokens_run


def words(source: random.Random, length: int, vocabulary: int = 10_000) -> tuple[int, ...]:
    return tuple(source.randrange(vocabulary) for _ in range(length))


def nested_rows(source: random.Random) -> list[tuple[int, ...]]:
    """Rows over few words that begin with one of a few random beginnings of a few random beginnings."""
    beginnings = [words(source, source.randrange(9), 3) for _ in range(3)]
    beginnings += [source.choice(beginnings) + words(source, source.randrange(9), 3) for _ in range(5)]
    return [
        source.choice(beginnings) + words(source, source.randrange(1, 6), 3) for _ in range(source.randrange(1, 40))
    ]


def test_borrowed_tokens_are_those_of_an_earlier_row_of_the_group():
    source = random.Random(0)
    shared = 0
    for _ in range(500):
        rows = nested_rows(source)
        groups = [source.randrange(3) for _ in rows]
        borrowed = plan_shared_prefixes(rows, groups)
        assert sorted(borrowed) == list(range(len(rows)))
        assert [groups[row] for row in borrowed] == sorted(groups)
        earlier = set()
        for row, one in borrowed.items():
            assert (one.row is None) == (one.length == 0) and one.length < len(rows[row])
            if one.row is not None:
                assert one.row in earlier and groups[one.row] == groups[row]
                assert rows[one.row][: one.length] == rows[row][: one.length]
            earlier.add(row)
            shared += one.length
    assert shared > 5000


def test_no_token_runs_twice_but_the_last_of_equal_rows():
    source = random.Random(5)
    for _ in range(200):
        rows = nested_rows(source)
        beginnings = {row[: i + 1] for row in rows for i in range(len(row))}
        assert distinct_tokens(rows) == len(beginnings)
        assert tokens_run(rows) == len(beginnings) + len(rows) - len(set(rows))


def test_a_template_a_passage_a_question_and_options_run_once_each():
    source = random.Random(1)
    template = words(source, 100)
    passages = [(*template, i, *words(source, 79)) for i in range(2)]
    questions = [(*passage, i, *words(source, 29)) for passage in passages for i in range(3)]
    rows = [(*question, i, *words(source, 3)) for question in questions for i in range(2)]
    source.shuffle(rows)
    assert tokens_run(rows) == 100 + 2 * 80 + 6 * 30 + 12 * 4


def test_equal_rows_run_one_token_each():
    rows = [tuple(range(100))] * 4
    assert tokens_run(rows) == 100 + 3
    assert list(plan_shared_prefixes(rows, [0] * 4).values()) == [
        SharedPrefix(None, 0),
        *(SharedPrefix(row, 99) for row in range(3)),
    ]


def test_a_row_of_another_group_lends_nothing():
    assert plan_shared_prefixes([(1, 2, 3), (1, 2, 4)], [0, 1]) == {0: SharedPrefix(None, 0), 1: SharedPrefix(None, 0)}


def test_a_long_chain_of_beginnings_is_no_problem():
    rows = [tuple(range(5 * length)) for length in range(1, 1000)]
    assert tokens_run(rows) == len(rows[-1])
