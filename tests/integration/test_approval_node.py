"""`approval_node`: what is written and where it leads."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from agentflow import AgentFlow
from agentflow.errors import InvalidInputError
from agentflow.nodes import approval_node
from agentflow.types import RunStatus

EDGES = {"approve": "pay", "reject": "stop"}


class State(TypedDict):
    refund: dict[str, int]
    approval: NotRequired[dict[str, Any]]
    log: NotRequired[list[Any]]


def pay(state: State) -> dict[str, Any]:
    return {"log": ["pay", state["refund"]]}


def stop(state: State) -> dict[str, Any]:
    return {"log": ["stop", state["refund"]]}


def graph_of(node: Any) -> StateGraph[State, None, State, State]:
    graph = StateGraph(State)
    graph.add_node("ask", node)
    graph.add_node("pay", pay)
    graph.add_node("stop", stop)
    graph.add_edge(START, "ask")
    return graph


@pytest.mark.parametrize(
    ("decision", "log"),
    [
        ({"type": "approve"}, ["pay", {"amount": 40}]),
        ({"type": "edit", "value": {"amount": 30}}, ["pay", {"amount": 30}]),
        ({"type": "reject", "message": "no"}, ["stop", {"amount": 40}]),
    ],
)
async def test_decision_says_where_to_go_and_what_was_approved_is_written_back(
    decision: dict[str, Any], log: list[Any]
) -> None:
    node = approval_node(
        "refund", edges=EDGES, write_to="refund", title=lambda s: f"{s['refund']['amount']} euros"
    )
    async with AgentFlow("memory://") as app:
        app.register(graph_of(node), name="g")
        handle = await app.submit("g", {"refund": {"amount": 40}})
        await app.drive(handle.id)
        (asked,) = await handle.approvals()
        assert asked.request.title == "40 euros"
        await app.approvals.decide(asked.id, decision, by="alice")
        run = await app.drive(handle.id)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert run.output["log"] == log
    assert (run.output["approval"]["type"], run.output["approval"]["by"]) == (
        decision["type"],
        "alice",
    )


async def test_nobody_is_asked_where_nobody_has_to_agree() -> None:
    node = approval_node("refund", edges=EDGES, when=lambda state: state["refund"]["amount"] > 50)
    async with AgentFlow("memory://") as app:
        app.register(graph_of(node), name="g")
        run = await app.drive((await app.submit("g", {"refund": {"amount": 40}})).id)
    assert run.output["log"] == ["pay", {"amount": 40}]
    assert run.output["approval"] == {"type": "not_required", "proposal": {"amount": 40}}


@pytest.mark.parametrize("edges", [{"approve": "pay"}, {**EDGES, "respond": "pay"}, {}])
def test_edges_that_do_not_cover_what_may_be_decided_are_refused(edges: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError):
        approval_node("refund", edges=edges)
