"""Cases that once went wrong: stale questions, lost results, endless loops, wrapped exceptions."""

from __future__ import annotations

from operator import add
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.errors import InvalidInputError, RunFailedError, UnsupportedUrlError
from agentflow.types import RunStatus

AT_ONCE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=3)


class State(TypedDict):
    """What the graphs here pass on."""

    log: Annotated[NotRequired[list[str]], add]


async def test_answered_question_of_a_subgraph_is_not_asked_again(database_url: str) -> None:
    """The parent still lists it while a later node of the subgraph fails and is tried again."""
    failures = iter([ConnectionError("once")])

    def ask(state: State) -> dict[str, Any]:
        return {"log": [request_approval({"amount": 5}).type]}

    def pay(state: State) -> dict[str, Any]:
        for failure in failures:
            raise failure
        return {"log": ["paid"]}

    child = StateGraph(State)
    child.add_node("ask", ask)
    child.add_node("pay", pay)
    child.add_edge(START, "ask")
    child.add_edge("ask", "pay")
    parent = StateGraph(State)
    parent.add_node("child", child.compile())
    parent.add_edge(START, "child")
    parent.add_edge("child", END)
    async with AgentFlow(database_url) as app:
        app.register(parent, name="g", retry=AT_ONCE)
        handle = await app.submit("g", {"log": []})
        await app.drive(handle.id)
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval.id, "approve", by="ann")
        run = await app.drive(handle.id)
        assert run.status is RunStatus.SUCCEEDED
        assert run.output["log"][-2:] == ["approve", "paid"]
        assert len((await app.approvals.list(status=None)).items) == 1


async def test_result_of_the_functional_api_is_the_output(sqlite_url: str) -> None:
    """A function's result is the run's output, whatever it is."""

    @entrypoint()
    async def double(value: int) -> dict[str, int]:
        return {"doubled": 2 * value}

    async with AgentFlow(sqlite_url) as app:
        app.register(double, name="double")
        handle = await app.submit("double", 21)
        await app.drive(handle.id)
        assert await handle.result() == {"doubled": 42}


async def test_graph_that_never_takes_its_answer_ends_in_the_dead_letter(sqlite_url: str) -> None:
    """`NodeInterrupt` asks again whatever it is answered; the run does not go round for ever."""
    from langgraph.errors import NodeInterrupt

    def stubborn(state: State) -> dict[str, Any]:
        with pytest.warns(DeprecationWarning, match="NodeInterrupt"):
            question = NodeInterrupt("again?")
        raise question

    graph = StateGraph(State)
    graph.add_node("stubborn", stubborn)
    graph.add_edge(START, "stubborn")
    async with AgentFlow(sqlite_url) as app:
        app.register(graph, name="g", retry=AT_ONCE)
        handle = await app.submit("g", {"log": []})
        await app.drive(handle.id)
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval.id, "approve", by="ann")
        run = await app.drive(handle.id)
        assert run.status is RunStatus.FAILED
        assert run.error is not None
        assert "asks again" in run.error.message


async def test_exceptions_of_a_workers_body_pass_on_unwrapped(sqlite_url: str) -> None:
    """The body of `async with app.worker()` may raise as if it stood alone."""

    def fails(state: State) -> dict[str, Any]:
        raise TypeError("always")

    graph = StateGraph(State)
    graph.add_node("fails", fails)
    graph.add_edge(START, "fails")
    async with AgentFlow(sqlite_url) as app:
        app.register(graph, name="g")
        with pytest.raises(RunFailedError):
            async with app.worker():
                await (await app.submit("g", {"log": []})).result(timeout=20)


@pytest.mark.parametrize(
    "options",
    [
        {"start_at": "x"},
        {"config": [1]},
        {"config": {"tags": 5}},
        {"priority": 2**70},
        {"priority": "x"},
        {"run_id": 5},
        {"run_id": "a\x00b"},
        {"thread_id": ""},
    ],
    ids=str,
)
async def test_malformed_option_writes_nothing(database_url: str, options: dict[str, Any]) -> None:
    """It is named before anything is stored, the same on every database."""
    graph = StateGraph(State)
    graph.add_node("a", lambda state: {"log": [*state["log"], "a"]})
    graph.add_edge(START, "a")
    async with AgentFlow(database_url) as app:
        app.register(graph, name="g")
        with pytest.raises(InvalidInputError):
            await app.submit("g", {"log": []}, **options)
        assert (await app.list_runs()).items == ()


def test_malformed_url_is_named() -> None:
    """A port that is no number is no reason for a bare `ValueError`."""
    with pytest.raises(UnsupportedUrlError):
        AgentFlow("postgresql://u:p@h:notaport/db")
