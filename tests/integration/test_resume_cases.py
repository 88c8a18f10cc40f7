"""Where a bare resume goes wrong: LangGraph's behaviour, pinned, and what agentflow does instead.

A change in the first half means that LangGraph was upgraded and its rules have to be read again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

from agentflow import AgentFlow, RetryPolicy
from agentflow.checkpoint import open_checkpointer
from agentflow.errors import AlreadyResolvedError, InvalidDecisionError, NotFoundError
from agentflow.types import Approval, Run
from tests.conformance.runs import EXPIRED, open_store
from tests.integration.graphs import State, ask_twice, chain, logs

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}
MADE_UP = "0123456789abcdef" * 2


def bare(node: Any) -> tuple[Any, str]:
    """Run a graph of one node to its question, on LangGraph alone."""
    graph = chain(("ask", node)).compile(checkpointer=InMemorySaver())
    return graph, graph.invoke({}, CONFIG)["__interrupt__"][0].id


def test_langgraph_answers_the_next_question_with_a_repeated_answer() -> None:
    graph, first = bare(ask_twice)
    second = graph.invoke(Command(resume={first: "yes"}), CONFIG)["__interrupt__"][0]
    assert (second.value, second.id != first) == ("wire $1M?", True)
    assert graph.invoke(Command(resume={first: "yes"}), CONFIG)["log"] == ["yes", "yes"]


def test_langgraph_answers_the_next_question_on_recovery_from_a_bare_answer() -> None:
    graph, _ = bare(ask_twice)
    assert "__interrupt__" in graph.invoke(Command(resume="yes"), CONFIG)
    assert graph.invoke(None, CONFIG)["log"] == ["yes", "yes"]
    by_id, first = bare(ask_twice)
    by_id.invoke(Command(resume={first: "yes"}), CONFIG)
    assert by_id.invoke(None, CONFIG)["__interrupt__"][0].value == "wire $1M?"


def test_langgraph_ignores_an_unknown_id_without_an_error() -> None:
    graph, first = bare(ask_twice)
    assert graph.invoke(Command(resume={MADE_UP: "yes"}), CONFIG)["__interrupt__"][0].id == first


def strict(state: State) -> State:
    """Ask, and refuse all answers but one."""
    answer = interrupt("go?")
    if answer != {"type": "approve"}:
        raise ValueError("wrong answer")
    return {"log": [answer]}


def test_langgraph_keeps_a_bad_answer_for_ever() -> None:
    graph, first = bare(strict)
    for answer in ("bad", {"type": "approve"}):
        with pytest.raises(ValueError, match="wrong answer"):
            graph.invoke(Command(resume={first: answer}), CONFIG)
    assert graph.get_state(CONFIG).interrupts[0].id == first


class FailsOnceBetween:
    """Asks twice, and fails the first time that it has the first answer."""

    def __init__(self) -> None:
        self.failures = 0

    def __call__(self, state: State) -> State:
        first = interrupt("refund $10?")
        if not self.failures:
            self.failures += 1
            raise ConnectionError("try again")
        return {"log": [first, interrupt("wire $1M?")]}


def test_langgraph_answers_the_next_question_when_an_answer_is_sent_again_after_a_failure() -> None:
    graph, first = bare(FailsOnceBetween())
    with pytest.raises(ConnectionError):
        graph.invoke(Command(resume={first: "yes"}), CONFIG)
    assert graph.get_state(CONFIG).interrupts[0].id == first, "it lists as pending still"
    assert graph.invoke(Command(resume={first: "yes"}), CONFIG)["log"] == ["yes", "yes"]


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app whose retries do not wait."""
    async with AgentFlow(database_url) as opened:
        yield opened


async def parked(app: AgentFlow, *nodes: Any) -> tuple[str, Approval]:
    """Run a graph to its first question."""
    graph = chain(*((f"n{i}", node) for i, node in enumerate(nodes)))
    app.register(graph, name="g", retry=RetryPolicy(initial_interval=0, jitter=False))
    handle = await app.submit("g", {"log": []}, run_id="r")
    assert (await app.drive("r")).status == "waiting"
    (approval,) = await handle.approvals()
    return "r", approval


async def answer(app: AgentFlow, approval: Approval, kind: str = "approve") -> Run:
    """Decide, and drive the run on."""
    await app.approvals.decide(approval.id, kind, by="ada")
    return await app.drive(approval.run_id)


async def test_repeated_decision_is_refused_and_the_next_question_stays_open(
    app: AgentFlow,
) -> None:
    run_id, first = await parked(app, ask_twice)
    assert (await answer(app, first)).status == "waiting"
    with pytest.raises(AlreadyResolvedError, match="'approve' by 'ada'"):
        await app.approvals.decide(first.id, "approve", by="eve")
    assert (await app.drive(run_id)).status == "waiting"
    (second,) = await app.handle(run_id).approvals()
    assert second.request.proposal == "wire $1M?"
    run = await answer(app, second, "reject")
    assert run.output["log"] == [{"type": "approve"}, {"type": "reject"}]


async def test_recovery_after_a_delivered_answer_asks_the_next_question(
    app: AgentFlow, database_url: str
) -> None:
    run_id, first = await parked(app, ask_twice)
    await app.approvals.decide(first.id, "approve", by="ada")
    # A worker that dies after the graph took the answer, before it could park the run.
    other = open_store(database_url)
    claimed = await other.claim_run("", run_id, worker="dies", lease=EXPIRED)
    assert claimed is not None
    async with open_checkpointer(database_url) as saver:
        assert await saver.acquire(claimed.lease) == claimed.lease.token
        graph = chain(("n0", ask_twice)).compile(checkpointer=saver.with_lease(claimed.lease))
        config: RunnableConfig = {
            "configurable": {"thread_id": run_id},
            "metadata": {"run_id": run_id},
        }
        resumed = await graph.ainvoke(
            Command(resume={first.interrupt_id: {"type": "approve"}}), config, durability="sync"
        )
        assert resumed["__interrupt__"][0].value == "wire $1M?"
    await other.close()
    run = await app.drive(run_id)
    assert run.status == "waiting"
    (second,) = await app.handle(run_id).approvals()
    assert second.request.proposal == "wire $1M?"
    run = await answer(app, second, "reject")
    assert run.output["log"] == [{"type": "approve"}, {"type": "reject"}]
    assert run.claims == 4
    reasons = [
        event.data["reason"]
        for event in await app.list_events(run_id)
        if event.type == "run.resumed"
    ]
    assert reasons == ["recovery", "approval"]


async def test_unknown_approval_is_refused_before_the_graph_is_called(app: AgentFlow) -> None:
    run_id, first = await parked(app, ask_twice)
    log = await app.list_events(run_id)
    for unknown in (MADE_UP, first.interrupt_id, run_id):
        with pytest.raises(NotFoundError):
            await app.approvals.decide(unknown, "approve", by="ada")
    assert await app.list_events(run_id) == log


async def test_answer_to_a_question_that_the_thread_has_left_is_not_delivered(
    app: AgentFlow, database_url: str
) -> None:
    run_id, first = await parked(app, strict, logs("second"))
    async with open_checkpointer(database_url) as saver:
        graph = chain(("n0", strict), ("n1", logs("second"))).compile(checkpointer=saver)
        await graph.aupdate_state(
            {"configurable": {"thread_id": run_id}}, {"log": ["by hand"]}, as_node="n0"
        )
    assert (await answer(app, first)).output["log"] == ["by hand", "second"]


@pytest.mark.parametrize(
    "bad", ["maybe", {"type": "approve", "extra": 1}, {}, {"decisions": []}, None, 7]
)
async def test_bad_decision_poisons_nothing(app: AgentFlow, bad: Any) -> None:
    run_id, first = await parked(app, strict)
    log = await app.list_events(run_id)
    with pytest.raises(InvalidDecisionError, match=first.id):
        await app.approvals.decide(first.id, bad, by="ada")
    assert await app.list_events(run_id) == log
    assert (await answer(app, first)).output["log"] == [{"type": "approve"}]


async def test_recorded_answer_is_not_sent_again_after_a_failure(app: AgentFlow) -> None:
    node = FailsOnceBetween()
    run_id, first = await parked(app, node)
    run = await answer(app, first)
    assert (run.status, node.failures) == ("waiting", 1)
    (second,) = await app.handle(run_id).approvals()
    assert second.request.proposal == "wire $1M?"
    run = await answer(app, second, "reject")
    assert run.output["log"] == [{"type": "approve"}, {"type": "reject"}]
    assert timedelta(0) <= run.ended_at - run.created_at  # type: ignore[operator]  # it has ended
