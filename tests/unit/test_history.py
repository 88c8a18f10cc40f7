"""Conversations as providers accept them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    HumanMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
)

from agentflow.nodes.history import ABANDONED, repaired


def calls(*ids: str) -> AIMessage:
    return AIMessage("", tool_calls=[ToolCall(name="t", args={}, id=each) for each in ids])


def result(call_id: str) -> ToolMessage:
    return ToolMessage(f"result of {call_id}", tool_call_id=call_id)


def shown(messages: list[AnyMessage]) -> tuple[list[str], tuple[str, ...]]:
    made, odd = repaired(messages)
    return [f"{each.type}:{each.text}" for each in made], odd


def test_conversation_that_fits_is_left_alone() -> None:
    messages = [SystemMessage("s"), HumanMessage("h"), calls("a", "b"), result("a"), result("b")]
    made, odd = repaired(messages)
    assert (made, odd) == (messages, ())
    assert [id(each) for each in made] == [id(each) for each in messages]


def test_call_without_result_is_told_as_abandoned() -> None:
    made, odd = shown([calls("a", "b"), result("b"), HumanMessage("go on")])
    assert made == ["ai:", f"tool:{ABANDONED}", "tool:result of b", "human:go on"]
    assert odd == ("a",)


def test_result_that_came_late_is_moved_behind_its_call() -> None:
    made, odd = shown([calls("a"), HumanMessage("well?"), result("a")])
    assert made == ["ai:", "tool:result of a", "human:well?"]
    assert odd == ()


def test_result_whose_call_was_trimmed_away_is_left_out() -> None:
    made, odd = shown([result("a"), HumanMessage("go on")])
    assert made == ["human:go on"]
    assert odd == ("a",)


MESSAGES = st.lists(
    st.builds(HumanMessage, st.just("h"))
    | st.lists(st.sampled_from("abc"), max_size=2, unique=True).map(lambda ids: calls(*ids))
    | st.sampled_from("abcd").map(result),
    max_size=7,
)


@settings(max_examples=50)
@given(MESSAGES)
def test_each_call_has_exactly_its_results_behind_it(messages: list[AnyMessage]) -> None:
    made, _ = repaired(messages)
    waiting: list[str] = []
    for message in made:
        if isinstance(message, ToolMessage):
            assert message.tool_call_id == waiting.pop(0)
            continue
        assert not waiting
        if isinstance(message, AIMessage):
            waiting = [str(call["id"]) for call in message.tool_calls]
    assert not waiting
    assert repaired(made)[0] == made
