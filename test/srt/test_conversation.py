"""Which messages of a row are learned, and the fields that a row may have."""

import pytest

from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.conversation import turns

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"id": "c", "type": "function", "function": {"name": "rate", "arguments": "{}"}}


def row(*weights: object, **fields: object) -> dict:
    """A question and an answer for each weight; "absent" for none."""
    messages = []
    for weight in weights:
        messages += [USER, ANSWER if weight == "absent" else {**ANSWER, "weight": weight}]
    return {"messages": messages, **fields}


def learned(fields: dict) -> list[int]:
    return [len(turn.asked["messages"]) for turn in turns(fields)]


@pytest.mark.parametrize(
    ("weights", "places"),
    [
        (["absent", "absent"], [3]),
        ([None, None], [3]),
        ([1, 1], [1, 3]),
        ([1, 0], [1]),
        ([0, 1], [3]),
        (["absent", 0], [1]),
        ([0, "absent"], [3]),
        (["absent", 1], [1, 3]),
        ([0.0, 1.0], [3]),
    ],
)
def test_without_weights_the_last_answer_is_learned_and_with_them_those_that_are_not_0(weights, places):
    assert learned(row(*weights)) == places


def test_a_turn_asks_with_the_messages_before_it_and_the_rows_tools():
    fields = row(1, 1, tools=[{"type": "function", "function": {"name": "rate"}}], parallel_tool_calls=False)
    first, second = turns(fields)
    assert first.asked == {"messages": [USER], "tools": fields["tools"], "parallel_tool_calls": False}
    assert second.asked["messages"] == [USER, ANSWER, USER] and second.answer == ANSWER and second.name == "messages[3]"


def test_an_answer_may_be_a_tool_call_alone():
    for content in ({"content": None}, {"content": ""}, {}):
        [turn] = turns({"messages": [USER, {"role": "assistant", **content, "tool_calls": [CALL]}]})
        assert turn.answer["tool_calls"] == [CALL]


def test_what_says_nothing_may_be_there():
    messages = [
        {**USER, "refusal": None},
        {**ANSWER, "refusal": None, "audio": None, "function_call": None, "annotations": []},
    ]
    assert learned({"messages": messages, "functions": None, "tools": None, "score": None}) == [1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (row(0), "no message is left to train on"),
        (row(0, 0), "no message is left to train on"),
        (row(2), "messages[1].weight=2 must be 0 or 1"),
        (row(0.5), "messages[1].weight=0.5 must be 0 or 1"),
        (row(True), "messages[1].weight=True must be 0 or 1"),
        (row("1"), "messages[1].weight='1' must be 0 or 1"),
        (row([1]), "messages[1].weight=[1] must be 0 or 1"),
        (
            {"messages": [{**USER, "weight": 1}, ANSWER]},
            "messages[0].weight=1 is not allowed: only assistant messages have a weight",
        ),
        (
            {"messages": [ANSWER, USER, {**ANSWER, "weight": 1}]},
            "messages[0] is an assistant message that nothing asks for",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": ""}, USER, {**ANSWER, "weight": 1}]},
            "messages[1].content='' must be a non-empty string",
        ),
        (
            row(1, functions=[{"name": "rate"}]),
            "functions=[{'name': 'rate'}] is not supported in a row of messages: use tools",
        ),
        (
            row(1, weight=1),
            "weight=1 is not supported in a row of messages: there are messages, tools, parallel_tool_calls",
        ),
        (row(1, temperature=0), "temperature=0 is not supported"),
        (
            {"messages": [USER, {**ANSWER, "function_call": {"name": "rate", "arguments": "{}"}}]},
            "messages[1].function_call=",
        ),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, "messages[1].refusal='no' is not supported"),
        (
            {"messages": [{**USER, "weigth": 0}, ANSWER]},
            "messages[0].weigth=0 is not supported in a row of messages: there are role, content,",
        ),
    ],
)
def test_every_other_field_and_value_is_refused_by_name(fields, reason):
    with pytest.raises(DataError) as caught:
        turns(fields)
    assert reason in str(caught.value)
