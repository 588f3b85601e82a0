"""Plans against a plain reading of the sequences that they stand for, and against PEFT's aLoRA semantics."""

import random
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.invocation import invocation_start
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner, PrefixScope, needs_normaliser

INVOCATION = (7, 8)
PLANNERS = {"lora": Planner("lora"), "alora": Planner("alora", INVOCATION)}

SINGLE = Example((2, 5, 7, 8, 6, 7, 8), ((11,), (12,), (13,)), 1)
MIXED = Example((2, 5, 7, 8, 6, 7, 8), ((11,), (12, 14, 15), (13, 13)), 1)
COMPLETION = Example((2, 5, 7, 8), ((11, 12, 13),), 0)


def random_example(rng: random.Random) -> Example:
    prompt = (
        2,
        *(rng.randrange(10) for _ in range(rng.randrange(8))),
        *INVOCATION,
        *(9 for _ in range(rng.randrange(3))),
    )
    options = tuple(
        tuple(rng.randrange(10, 20) for _ in range(rng.choice((1, 1, 2, 5)))) for _ in range(rng.randrange(1, 5))
    )
    return Example(prompt, options, rng.randrange(len(options)))


def what_is_read(plan: ExamplePlan) -> list[tuple[tuple[int, ...], int]]:
    """(tokens that the model sees, token that is scored) for every read."""
    return [(row.prefix + row.suffix[: position + 1], token) for row in plan.rows for position, token in row.reads]


@pytest.mark.parametrize("tuning", PLANNERS)
def test_every_option_token_is_scored_after_all_that_precedes_it(tuning):
    rng = random.Random(0)
    for _ in range(200):
        example = random_example(rng)
        plan = PLANNERS[tuning].plan(example)
        expected = [
            (example.prompt + option[:i], token) for option in example.options for i, token in enumerate(option)
        ]
        assert what_is_read(plan) == expected
        assert plan.option_of_read == tuple(o for o, option in enumerate(example.options) for _ in option)
        assert plan.option_lengths == tuple(len(option) for option in example.options)
        assert plan.label == example.label


@pytest.mark.parametrize("tuning", PLANNERS)
def test_a_row_runs_no_token_beyond_the_last_that_is_read(tuning):
    rng = random.Random(1)
    for _ in range(200):
        for row in PLANNERS[tuning].plan(random_example(rng)).rows:
            assert max(position for position, _ in row.reads) == len(row.suffix) - 1
            assert min(position for position, _ in row.reads) >= 0


@pytest.mark.parametrize("tuning", PLANNERS)
def test_single_token_options_share_one_row(tuning):
    plan = PLANNERS[tuning].plan(SINGLE)
    assert len(plan.rows) == 1 and plan.single_token_options
    assert [token for _, token in plan.rows[0].reads] == [11, 12, 13]


@pytest.mark.parametrize("tuning", PLANNERS)
def test_longer_options_get_a_row_each_with_one_prefix(tuning):
    plan = PLANNERS[tuning].plan(MIXED)
    assert len(plan.rows) == 3 and not plan.single_token_options
    assert len({row.prefix for row in plan.rows}) == 1


def test_alora_prefix_is_all_before_the_last_invocation():
    for example in (SINGLE, MIXED):
        for row in PLANNERS["alora"].plan(example).rows:
            assert row.prefix == (2, 5, 7, 8, 6)
            assert row.suffix[:2] == INVOCATION
    assert PLANNERS["alora"].scope is PrefixScope.BASE


def test_lora_runs_every_token_in_its_slot():
    for example in (SINGLE, MIXED, COMPLETION):
        assert all(
            row.prefix == () and row.suffix[: len(example.prompt)] == example.prompt
            for row in PLANNERS["lora"].plan(example).rows
        )
    assert PLANNERS["lora"].scope is PrefixScope.SLOT


def test_tokens_of_a_slot_count_a_shared_prompt_once():
    long = Example(tuple(range(2, 102)), ((11, 12), (13, 14, 15)), 0)
    assert PLANNERS["lora"].plan(long).slot_tokens == 100 + 1 + 2
    assert PLANNERS["lora"].plan(SINGLE).slot_tokens == len(SINGLE.prompt)
    assert PLANNERS["alora"].plan(SINGLE).slot_tokens == len(INVOCATION)


def test_an_invocation_at_the_start_leaves_an_empty_prefix():
    plan = PLANNERS["alora"].plan(Example(INVOCATION, ((11,), (12,)), 0))
    assert (plan.rows[0].prefix, plan.rows[0].suffix) == ((), INVOCATION)


def test_alora_without_the_invocation_in_the_prompt_is_refused():
    with pytest.raises(DataError, match=r"does not hold the invocation tokens \[7, 8\]"):
        PLANNERS["alora"].plan(Example((2, 3, 4), ((7, 8),), 0))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_invocation_start_agrees_with_peft(width):
    """Two different tokens only, so that invocations are often absent, repeated or overlap themselves."""
    rng = random.Random(width)
    found = 0
    for _ in range(300):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 13))]
        invocation = [rng.randrange(2) for _ in range(width)]
        config = {"default": SimpleNamespace(alora_invocation_tokens=invocation)}
        [offset] = calculate_alora_offsets(config, "default", torch.tensor([prompt]))
        if offset is None:
            with pytest.raises(DataError):
                invocation_start(prompt, invocation)
        else:
            found += 1
            assert len(prompt) - invocation_start(prompt, invocation) == offset
    assert 20 < found < 300


def test_normaliser_is_needed_for_all_but_choices_between_single_tokens():
    single, mixed = (PLANNERS["lora"].plan(example) for example in (SINGLE, MIXED))
    assert not needs_normaliser([single, single], "classification")
    assert needs_normaliser([single, mixed], "classification")
    assert needs_normaliser([single], "completion")
