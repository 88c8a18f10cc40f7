"""LangChain's own middleware takes our answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from agentflow.errors import InvalidDecisionError
from agentflow.interrupts import to_request
from agentflow.testing import ScriptedChatModel
from tests.unit.questions import ALL, answer

CONFIG: Any = {"configurable": {"thread_id": "t", "__pregel_strict_resume": True}}


@tool
def refund(amount: int) -> str:
    """Pay money back."""
    return f"refunded {amount}"


@tool
def mail(to: str) -> str:
    """Send a mail."""
    return f"mailed {to}"


Mode = Literal["batched", "per_call"]


def agent(mode: Mode, **gates: Any) -> Any:
    calls = [
        {"name": "refund", "args": {"amount": 5}, "id": "c1"},
        {"name": "mail", "args": {"to": "ann"}, "id": "c2"},
    ]
    model = ScriptedChatModel(script=[AIMessage("", tool_calls=calls), "done"])
    return create_agent(
        model,
        [refund, mail],
        middleware=[HumanInTheLoopMiddleware(gates, interrupt_mode=mode)],
        checkpointer=InMemorySaver(),
    )


def results(graph: Any) -> dict[str, Any]:
    messages = graph.get_state(CONFIG).values["messages"]
    return {m.tool_call_id: m.content for m in messages if isinstance(m, ToolMessage)}


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        (["approve", "approve"], {"c1": "refunded 5", "c2": "mailed ann"}),
        (
            [
                {"type": "edit", "edited_action": {"args": {"amount": 3}}},
                {"type": "respond", "message": "told her"},
            ],
            {"c1": "refunded 3", "c2": "told her"},
        ),
        ([{"type": "reject", "message": "too much"}, "approve"], {"c2": "mailed ann"}),
    ],
)
def test_the_batched_middleware_takes_our_answer_for_two_calls(
    decisions: list[Any], expected: Mapping[str, str]
) -> None:
    graph = agent("batched", refund=True, mail=True)
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    request = to_request(asked.value, asked.response_schema)
    assert request.shape == "hitl"
    assert [action.name for action in request.actions] == ["refund", "mail"]

    resume = answer(asked.value, {"decisions": decisions}, asked.response_schema)
    graph.invoke(Command(resume={asked.id: resume}), CONFIG)

    got = results(graph)
    for call, text in expected.items():
        assert text in got[call]
    if "c1" not in expected:
        assert "too much" in got["c1"]


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        ("approve", "refunded 5"),
        ({"type": "edit", "edited_action": {"args": {"amount": 3}}}, "refunded 3"),
        ({"type": "reject", "message": "too much"}, "too much"),
        ({"type": "respond", "message": "by hand"}, "by hand"),
    ],
)
def test_the_per_call_middleware_takes_our_answer(decision: Any, expected: str) -> None:
    graph = agent("per_call", refund=True)
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    request = to_request(asked.value, asked.response_schema)
    assert (request.shape, request.allowed) == ("tool_approval", tuple(ALL))
    schema = request.actions[0].args_schema
    assert schema is not None
    assert schema["properties"]["amount"]["type"] == "integer"
    bad = {"type": "edit", "edited_action": {"name": "refund", "args": {"amount": "hunter2"}}}
    with pytest.raises(InvalidDecisionError, match=r"edited_action\.args\.amount: must be of type"):
        answer(asked.value, bad, asked.response_schema)

    resume = answer(asked.value, decision, asked.response_schema)
    graph.invoke(Command(resume={asked.id: resume}), CONFIG)
    assert expected in results(graph)["c1"]


def test_the_per_call_schema_limits_what_is_allowed() -> None:
    graph = agent("per_call", refund={"allowed_decisions": ["reject"]})
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    assert to_request(asked.value, asked.response_schema).allowed == ("reject",)
