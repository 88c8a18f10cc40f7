"""Thirty days of waiting in milliseconds: deadlines, start times and backoff by a virtual clock.

The clock is the app's. Leases stay with the database's clock: none of this lets one run out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.testing import VirtualClock
from agentflow.types import RunStatus, WaitStatus

MONTH = timedelta(days=30)
MOMENT = timedelta(seconds=1)


class State(TypedDict, total=False):
    """What was decided."""

    answer: str


@pytest.fixture
def clock() -> VirtualClock:
    """The clock of `app`; not the machine's time, so that neither passes for the other."""
    return VirtualClock(datetime(2031, 5, 6, tzinfo=UTC))


@pytest.fixture
async def app(database_url: str, clock: VirtualClock) -> AsyncIterator[AgentFlow]:
    """An app with a graph that asks, one that only works, and one that fails at first."""
    failures: set[str] = set()

    def ask(_: State) -> State:
        return {"answer": request_approval({"pay": 1}).type}

    def work(_: State) -> State:
        return {"answer": "done"}

    def fail_once(_: State, config: RunnableConfig) -> State:
        run_id = config["metadata"]["run_id"]
        if run_id not in failures:
            failures.add(run_id)
            raise RuntimeError("the first time")
        return {"answer": "recovered"}

    nodes: tuple[Any, ...] = (ask, work, fail_once)
    async with AgentFlow(database_url, clock=clock) as opened:
        for node in nodes:
            graph: StateGraph[Any, None, Any, Any] = StateGraph(State)
            graph.add_node(node.__name__, node)
            graph.add_edge(START, node.__name__)
            graph.add_edge(node.__name__, END)
            policy = RetryPolicy(initial_interval=60, jitter=False)
            opened.register(graph, name=node.__name__, retry=policy)
        yield opened


async def test_approval_after_thirty_days_resumes_the_run(
    app: AgentFlow, clock: VirtualClock
) -> None:
    """A deadline that is a moment later has not passed."""
    await app.submit("ask", {}, run_id="patient", timeout=MONTH + MOMENT)
    assert (await app.drive("patient")).status is RunStatus.WAITING
    clock.advance(MONTH)
    async with app.worker(concurrency=1):
        (asked,) = (await app.approvals.list()).items
        await app.approvals.decide(asked.id, "approve", by="alice")
        run = await app.wait("patient", timeout=30)
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answer": "approve"})


async def test_run_that_waited_past_its_deadline_fails_and_its_question_is_gone(
    app: AgentFlow, clock: VirtualClock
) -> None:
    """A worker notices, although the database's own clock has hardly moved."""
    await app.submit("ask", {}, run_id="late", timeout=MONTH)
    assert (await app.drive("late")).status is RunStatus.WAITING
    async with app.worker(concurrency=1):
        clock.advance(MONTH)
        run = await app.wait("late", timeout=30)
    assert run.status is RunStatus.FAILED
    assert (await app.dead_letters.get("late")).reason == "deadline"
    (asked,) = (await app.approvals.list(status=None)).items
    assert asked.status is WaitStatus.EXPIRED


async def test_run_is_started_when_its_time_has_come_and_not_before(
    app: AgentFlow, clock: VirtualClock
) -> None:
    await app.submit("work", {}, run_id="later", start_at=clock.now() + MONTH)
    async with app.worker(concurrency=1):
        await app.submit("work", {}, run_id="canary")
        await app.wait("canary", timeout=30)
        assert (await app.get_run("later")).status is RunStatus.QUEUED
        clock.advance(MONTH)
        run = await app.wait("later", timeout=30)
    assert (run.status, run.claims) == (RunStatus.SUCCEEDED, 1)


async def test_run_that_nobody_started_in_time_is_cancelled(
    app: AgentFlow, clock: VirtualClock
) -> None:
    await app.submit("work", {}, run_id="missed", start_timeout=MONTH)
    clock.advance(MONTH)
    async with app.worker(concurrency=1):
        run = await app.wait("missed", timeout=30)
    assert (run.status, run.claims) == (RunStatus.CANCELLED, 0)


async def test_backoff_passes_with_the_clock(app: AgentFlow, clock: VirtualClock) -> None:
    await app.submit("fail_once", {}, run_id="again")
    async with app.worker(concurrency=1):
        while (await app.get_run("again")).claims == 0:
            await app.submit("work", {}, run_id="canary")
            await app.wait("canary", timeout=30)
        await app.submit("work", {}, run_id="second-canary")
        await app.wait("second-canary", timeout=30)
        run = await app.get_run("again")
        assert (run.status, run.claims) == (RunStatus.QUEUED, 1)
        assert run.available_at == clock.now() + timedelta(seconds=60)
        clock.advance(60)
        run = await app.wait("again", timeout=30)
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answer": "recovered"})


async def test_lease_does_not_end_with_the_virtual_clock(
    app: AgentFlow, clock: VirtualClock
) -> None:
    await app.submit("work", {}, run_id="held")
    claim: dict[str, Any] = {"worker": "w", "lease": timedelta(seconds=60)}
    claimed = await app._store.claim_run("", "held", **claim)
    assert claimed is not None
    clock.advance(MONTH)
    report = await app._store.extend_leases([claimed.lease], timedelta(seconds=60))
    assert not report["held"].lost


def test_clock_moves_only_forwards_and_knows_its_time_zone() -> None:
    clock = VirtualClock(datetime(2031, 5, 6, tzinfo=UTC))
    assert clock.advance(1.5) == clock.now() == datetime(2031, 5, 6, 0, 0, 1, 500_000, tzinfo=UTC)
    with pytest.raises(ValueError, match="must not be negative"):
        clock.advance(-1)
    with pytest.raises(ValueError, match="time zone"):
        VirtualClock(datetime(2031, 5, 6))  # noqa: DTZ001 -- that is what is refused
