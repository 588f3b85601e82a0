"""Shared beginnings against the rows that they stand for, and against the fewest tokens that could be run."""

import random

from sglang.srt.mezo.sharing import Sharing, share, tokens_run


def path(sharing: Sharing, node: int | None) -> tuple[int, ...]:
    """All tokens up to the end of a node."""
    return () if node is None else path(sharing, sharing.nodes[node].parent) + sharing.nodes[node].tokens


def level_of(sharing: Sharing, node: int) -> int:
    parent = sharing.nodes[node].parent
    return 0 if parent is None else level_of(sharing, parent) + 1


def words(source: random.Random, length: int, vocabulary: int = 10_000) -> tuple[int, ...]:
    return tuple(source.randrange(vocabulary) for _ in range(length))


def nested_rows(source: random.Random) -> list[tuple[int, ...]]:
    """Rows over few words that begin with one of a few random beginnings of a few random beginnings."""
    beginnings = [words(source, source.randrange(9), 3) for _ in range(3)]
    beginnings += [source.choice(beginnings) + words(source, source.randrange(9), 3) for _ in range(5)]
    return [source.choice(beginnings) + words(source, source.randrange(1, 6), 3) for _ in range(source.randrange(1, 40))]


def test_nodes_and_rests_give_the_rows_and_levels_run_in_order():
    source = random.Random(0)
    shared = 0
    for _ in range(500):
        rows = nested_rows(source)
        limits = [source.randrange(len(row)) for row in rows]
        groups = [source.randrange(3) for _ in rows]
        sharing = share(rows, limits, groups)
        for row, limit, group, (node, start) in zip(rows, limits, groups, sharing.rows, strict=True):
            assert path(sharing, node) == row[:start] and start <= limit
            assert node is None or sharing.nodes[node].group == group
        assert sorted(node for level in sharing.levels for node in level) == list(range(len(sharing.nodes)))
        assert all(level_of(sharing, node) == number for number, level in enumerate(sharing.levels) for node in level)
        for number, node in enumerate(sharing.nodes):
            assert node.parent is None or (node.parent < number and sharing.nodes[node.parent].group == node.group)
        shared += len(sharing.nodes)
    assert shared > 50


def test_every_level_saves_more_than_its_pass_costs():
    source = random.Random(5)
    for _ in range(200):
        rows = nested_rows(source)
        sharing = share(rows, [len(row) - 1 for row in rows], [0] * len(rows))
        paths = [path(sharing, node) for node, _ in sharing.rows]
        for level in sharing.levels:
            saved = 0
            for node in level:
                start = path(sharing, node)
                count = sum(of_row[: len(start)] == start for of_row in paths)
                saved += (count - 1) * len(sharing.nodes[node].tokens)
            assert saved >= 64


def test_options_of_an_example_share_its_prompt():
    source = random.Random(0)
    prompts = [words(source, 40) for _ in range(4)]
    rows = [prompt + words(source, 5) for prompt in prompts for _ in range(3)]
    assert share(rows, [39] * len(rows), [0] * len(rows)).levels == ((0, 1, 2, 3),)
    assert tokens_run(rows, [39] * len(rows)) == 4 * 39 + 12 * 6


def test_a_template_a_passage_and_a_question_run_once_each():
    source = random.Random(1)
    template = words(source, 100)
    passages = [template + words(source, 80) for _ in range(2)]
    questions = [passage + words(source, 30) for passage in passages for _ in range(3)]
    rows = [question + words(source, 4) for question in questions for _ in range(2)]
    limits = [len(row) - 4 for row in rows]
    assert [len(level) for level in share(rows, limits, [0] * len(rows)).levels] == [1, 2, 6]
    assert tokens_run(rows, limits) == 100 + 2 * 80 + 6 * 30 + 12 * 4


def test_a_common_first_word_and_a_single_row_are_not_worth_a_pass():
    source = random.Random(2)
    rows = [(2, *words(source, 20)) for _ in range(64)]
    for few in (rows, rows[:1]):
        assert share(few, [len(row) - 1 for row in few], [0] * len(few)).nodes == ()


def test_small_savings_of_many_groups_are_worth_a_pass():
    def nodes(groups: int) -> int:
        rows = [(1, 2, 3, 4, 5, 6, i) for _ in range(groups) for i in range(3)]
        return len(share(rows, [6] * len(rows), [i // 3 for i in range(len(rows))]).nodes)

    assert (nodes(5), nodes(6)) == (0, 6)


def test_equal_rows_share_all_that_may_be_shared():
    rows = [tuple(range(100))] * 4
    assert tokens_run(rows, [99] * 4) == 99 + 4
    assert [start for _, start in share(rows, [99, 50, 99, 99], [0] * 4).rows] == [99, 50, 99, 99]


def test_a_long_chain_of_beginnings_is_no_problem():
    rows = [tuple(range(5 * length)) for length in range(1, 1000)]
    assert tokens_run(rows, [len(row) - 1 for row in rows]) < 3 * len(rows[-1])
