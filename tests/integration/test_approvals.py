"""Questions to people from real graphs: several at once, in subgraphs, edited, and recovered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.types import interrupt

from agentflow import AgentFlow, request_approval
from agentflow.errors import (
    AlreadyResolvedError,
    InvalidDecisionError,
    SupersededError,
    VersionChangedError,
)
from agentflow.nodes import approval_node
from agentflow.testing import ScriptedChatModel
from agentflow.types import Approval
from tests.integration.graphs import State, asks, chain, fan, logs


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


async def park(app: AgentFlow, graph: Any, value: Any = None, **options: Any) -> list[Approval]:
    """Register and run a graph as `r` until it asks; return the questions."""
    app.register(graph, name="g")
    handle = await app.submit("g", value or {}, run_id="r", **options)
    assert (await app.drive("r")).status == "waiting"
    return list(await handle.approvals())


async def test_parallel_questions_are_answered_one_by_one(app: AgentFlow) -> None:
    counted: list[str] = []

    def done(state: State) -> State:
        counted.append("done")
        return {"log": ["done"]}

    graph = fan(("a", asks("A")), ("b", asks("B")), ("c", done), then=logs("end"))
    asked = {each.request.proposal: each for each in await park(app, graph)}
    assert set(asked) == {"A", "B"}
    await app.approvals.decide(asked["B"].id, {"type": "respond", "value": 2}, by="ada")
    assert (await app.drive("r")).status == "waiting"
    (left,) = await app.handle("r").approvals()
    assert left == asked["A"], "the other question keeps its id"
    await app.approvals.decide(left.id, {"type": "respond", "value": 1}, by="bob")
    run = await app.drive("r")
    assert run.output["log"] == [("A", 1), ("B", 2), "done", "end"]
    assert counted == ["done"]


async def test_parallel_questions_are_answered_together(app: AgentFlow) -> None:
    graph = fan(("a", asks("A")), ("b", asks("B")), then=logs("end"))
    for each in await park(app, graph):
        value = each.request.proposal * 2
        await app.approvals.decide(each.id, {"type": "respond", "value": value}, by="ada")
    run = await app.drive("r")
    assert run.output["log"] == [("A", "AA"), ("B", "BB"), "end"]
    assert run.claims == 2, "both answers are delivered by one drive"


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_question_of_a_subgraph_belongs_to_its_namespace(
    app: AgentFlow, checkpointer: Any
) -> None:
    counted: list[str] = []

    def before(state: State) -> State:
        counted.append("before")
        return {"log": ["before"]}

    child = chain(("before", before), ("ask", asks("child?")), ("after", logs("after")))
    graph = chain(("child", child.compile(checkpointer=checkpointer)), ("end", logs("end")))
    (asked,) = await park(app, graph)
    assert asked.ns.partition(":")[0] == "child"
    await app.approvals.decide(asked.id, "approve", by="ada")
    run = await app.drive("r")
    assert run.output["log"] == ["before", ("child?", {"type": "approve"}), "after", "end"]
    assert counted == ["before"]


async def test_nested_subgraphs_ask_in_parallel(app: AgentFlow) -> None:
    inner = chain(("ask", asks("inner?")))
    middle = chain(("inner", inner.compile()))
    graph = fan(("left", middle.compile()), ("right", asks("right?")), then=logs("end"))
    asked = {each.request.proposal: each for each in await park(app, graph)}
    assert "|" in asked["inner?"].ns
    assert asked["right?"].ns == ""
    for each in asked.values():
        await app.approvals.decide(each.id, "approve", by="ada")
        run = await app.drive("r")
    assert len(run.output["log"]) == 3


async def test_new_run_queues_behind_one_that_waits(app: AgentFlow) -> None:
    (asked,) = await park(app, chain(("ask", asks("ok?"))), thread_id="t")
    async with app.worker():
        later = await app.submit("g", {"log": ["later"]}, thread_id="t")
        with pytest.raises(TimeoutError):
            await later.wait(until="parked", timeout=0.3)
        assert await later.status() == "queued"
        await app.approvals.decide(asked.id, "approve", by="ada")
        assert await app.handle("r").result(timeout=30) == {"log": [("ok?", {"type": "approve"})]}
        assert (await later.wait(until="parked", timeout=30)).status == "waiting"


async def test_approved_proposal_is_what_the_node_gets(app: AgentFlow) -> None:
    computed = iter(range(10, 100))

    def pay(state: State) -> State:
        result = request_approval({"amount": next(computed)}, title="Pay")
        return {"log": [result.type, result.proposal, result.by]}

    (asked,) = await park(app, chain(("pay", pay)))
    assert (asked.request.title, asked.request.proposal) == ("Pay", {"amount": 10})
    await app.approvals.decide(asked.id, "approve", by="ada")
    assert (await app.drive("r")).output["log"] == ["approve", {"amount": 10}, "ada"]


async def test_approval_node_writes_the_edited_proposal(app: AgentFlow) -> None:
    graph = chain(("ask", approval_node("value", into="value")))
    (asked,) = await park(app, graph, {"value": {"amount": 10}})
    decision = {"type": "edit", "value": {"amount": 4}, "message": "less"}
    await app.approvals.decide(asked.id, decision, by="ada")
    written = (await app.drive("r")).output["value"]
    assert (written["type"], written["proposal"], written["by"]) == ("edit", {"amount": 4}, "ada")


async def test_decision_of_a_kind_that_is_not_allowed_is_refused(app: AgentFlow) -> None:
    graph = chain(("ask", approval_node("value", into="value", allowed=["approve"])))
    (asked,) = await park(app, graph, {"value": 1})
    for decision in ("reject", {"type": "edit", "value": 2}, {"type": "respond", "value": 2}):
        with pytest.raises(InvalidDecisionError, match="nothing was recorded"):
            await app.approvals.decide(asked.id, decision, by="ada")
    assert (await app.approvals.get(asked.id)) == asked


async def test_decision_about_what_was_shown_is_refused_when_it_has_changed(
    app: AgentFlow,
) -> None:
    """The request itself is given, and not its id: it is not read again."""
    (shown,) = await park(app, chain(("ask", asks("refund $10?"))))
    with pytest.raises(InvalidDecisionError):
        await app.approvals.decide(shown, "edit", by="ann")
    decided = await app.approvals.decide(shown, {"type": "respond", "value": "yes"}, by="ann")
    with pytest.raises(AlreadyResolvedError):
        await app.approvals.decide(shown, {"type": "respond", "value": "no"}, by="bob")
    again = await app.approvals.reopen(shown.id, by="bob")
    with pytest.raises(VersionChangedError):
        await app.approvals.decide(shown, {"type": "respond", "value": "no"}, by="bob")
    # As it was when it had been decided: so it is read, and was asked again since.
    await app.approvals.decide(decided, {"type": "respond", "value": "no"}, by="bob")
    assert again.version == shown.version + 1
    assert (await app.drive("r")).output == {"log": [("refund $10?", "no")]}


async def test_cancelled_run_withdraws_its_question(app: AgentFlow) -> None:
    (asked,) = await park(app, chain(("ask", asks("ok?"))))
    await app.cancel("r", by="ada")
    assert (await app.approvals.get(asked.id)).status == "withdrawn"
    with pytest.raises(SupersededError):
        await app.approvals.decide(asked.id, "approve", by="ada")


async def test_question_in_a_loop_is_a_new_one_each_time(app: AgentFlow) -> None:
    graph = chain(("ask", lambda state: {"log": [interrupt(len(state["log"]))["type"]]}))
    graph.add_conditional_edges("ask", lambda state: "ask" if len(state["log"]) < 3 else "__end__")
    (asked,) = await park(app, graph, {"log": []})
    ids = set()
    for _ in range(3):
        ids.add(asked.interrupt_id)
        await app.approvals.decide(asked.id, "approve", by="ada")
        run = await app.drive("r")
        asked, *_ = [*await app.handle("r").approvals(), asked]
    assert (run.output["log"], len(ids)) == (["approve"] * 3, 3)


async def test_many_deciders_and_workers_still_make_one_answer(
    app: AgentFlow, database_url: str
) -> None:
    calls: list[str] = []

    def act(state: State) -> State:
        calls.append(state["log"][0][1]["type"])
        return {}

    graph = chain(("ask", asks("ok?")), ("act", act))
    (asked,) = await park(app, graph)
    async with AgentFlow(database_url) as other:
        other.register(graph, name="g")
        async with app.worker(), other.worker():
            outcomes = await asyncio.gather(
                *(
                    each.approvals.decide(asked.id, kind, by=kind)
                    for each in (app, other)
                    for kind in ("approve", "reject") * 5
                ),
                return_exceptions=True,
            )
            await app.wait("r", timeout=30)
    won = [each for each in outcomes if isinstance(each, Approval)]
    assert len(won) == 1
    assert sum(isinstance(each, AlreadyResolvedError) for each in outcomes) == 19
    assert calls == [won[0].decided_by]


@tool
def pay(amount: int) -> str:
    """Pay an amount."""
    return f"paid {amount}"


def agent(**policy: Any) -> Any:
    """Build LangChain's prebuilt agent, with a person in the loop of its one tool."""
    calls = [{"name": "pay", "args": {"amount": n}, "id": f"call-{n}"} for n in (10, 20)]
    script = [AIMessage("", tool_calls=calls), AIMessage("done")]
    return create_agent(
        ScriptedChatModel(script=script),
        tools=[pay],
        middleware=[HumanInTheLoopMiddleware({"pay": True}, **policy)],
    )


async def test_prebuilt_agent_runs_its_tools_as_decided(app: AgentFlow) -> None:
    (asked,) = await park(app, agent(), {"messages": [("user", "pay both")]})
    assert [action.args for action in asked.request.actions] == [{"amount": 10}, {"amount": 20}]
    short = {"decisions": [{"type": "approve"}]}
    with pytest.raises(InvalidDecisionError):
        await app.approvals.decide(asked.id, short, by="ada")
    edit = {"type": "edit", "edited_action": {"name": "pay", "args": {"amount": 4}}}
    both = {"decisions": [edit, {"type": "reject", "message": "no"}]}
    await app.approvals.decide(asked.id, both, by="ada")
    run = await app.drive("r")
    said = [m.content for m in run.output["messages"] if isinstance(m, ToolMessage)]
    assert len(said) == 2
    # The middleware puts notes to the model around both.
    assert any(text.endswith("paid 4") for text in map(str, said))
    assert not any("paid 10" in text or "paid 20" in text for text in map(str, said))
    assert run.output["messages"][-1].content == "done"
