"""Runs from submission to end: through workers, retries, drains and cancellations."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

import pytest
from langgraph.runtime import Runtime
from langgraph.types import Send, interrupt

from agentflow import AgentFlow, RetryPolicy
from agentflow.errors import (
    IdempotencyConflictError,
    IllegalTransitionError,
    InvalidInputError,
    NotFoundError,
    RunCancelledError,
    RunFailedError,
    SerializationError,
    ThreadBusyError,
    UnknownGraphError,
)
from agentflow.types import RunStatus
from tests.conformance.runs import open_store
from tests.integration.graphs import State, asks, chain, fan, logs

AT_ONCE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=3)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


class Context(TypedDict):
    """What cannot be stored."""

    lock: Any


class Fails:
    """A node that fails a number of times before it logs."""

    def __init__(self, times: int, error: Exception | None = None) -> None:
        self.calls = 0
        self._times = times
        self._error = error or ConnectionError("unreachable")

    def __call__(self, state: State) -> State:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return {"log": ["done"]}


class Holds:
    """A node that waits until it is told to go on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.was_cancelled = False

    async def __call__(self, state: State) -> State:
        self.entered.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return {"log": ["held"]}


def fan_out(state: State) -> list[Send]:
    """Send one task for each item."""
    return [Send("work", {"value": item}) for item in state["value"]]


async def test_output_is_that_of_plain_ainvoke(app: AgentFlow) -> None:
    def work(state: State) -> State:
        return {"log": [state["value"] * 2]}

    graph = chain(("a", lambda _: {"value": [1, 2, 3]}))
    graph.add_node("work", work)
    graph.add_conditional_edges("a", fan_out, ["work"])
    app.register(graph, name="g")
    plain = await graph.compile().ainvoke({"log": ["start"]})
    async with app.worker():
        handle = await app.submit("g", {"log": ["start"]})
        assert (
            await handle.result(timeout=30)
            == plain
            == {"log": ["start", 2, 4, 6], "value": [1, 2, 3]}
        )
    run = await handle.run()
    assert (run.status, run.attempt, run.claims) == ("succeeded", 1, 1)
    assert run.checkpoint_id is not None
    state = await handle.state()
    assert (state.values, state.next) == (plain, ())


async def test_result_is_there_for_another_process(app: AgentFlow, database_url: str) -> None:
    app.register(chain(("a", logs(("tuple", 1)))), name="g")
    await app.submit("g", {}, run_id="r")
    assert (await app.drive("r")).output == {"log": [("tuple", 1)]}
    async with AgentFlow(database_url) as other:
        assert await other.handle("r").result() == {"log": [("tuple", 1)]}


async def test_worker_drives_many_runs_and_each_node_once(app: AgentFlow) -> None:
    counted: list[str] = []

    def count(state: State) -> State:
        counted.append(state["value"])
        return {"log": [state["value"]]}

    app.register(chain(("a", count), ("b", logs("b"))), name="g")
    async with app.worker(concurrency=8):
        handles = [await app.submit("g", {"value": str(i)}) for i in range(25)]
        results = await asyncio.gather(*(handle.result(timeout=60) for handle in handles))
    assert [result["log"] for result in results] == [[str(i), "b"] for i in range(25)]
    assert sorted(counted) == sorted(str(i) for i in range(25))


async def test_failed_attempt_is_retried_and_finished_nodes_are_not_run_again(
    app: AgentFlow,
) -> None:
    before, fails = Fails(0), Fails(2)
    app.register(chain(("a", before), ("b", fails)), name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    run = await app.drive("r")
    assert (run.status, run.output) == ("succeeded", {"log": ["done", "done"]})
    assert (before.calls, fails.calls, run.claims) == (1, 3, 3)
    log = await app.list_events("r")
    assert [event.type for event in log].count("run.retried") == 2
    assert [e.data["reason"] for e in log if e.type == "run.resumed"] == ["retry", "retry"]


async def test_exhausted_run_is_a_dead_letter_with_its_cause(
    app: AgentFlow, database_url: str
) -> None:
    fails = Fails(99)
    app.register(chain(("a", logs("a")), ("b", fails)), name="g", retry=AT_ONCE)
    handle = await app.submit("g", {}, run_id="r")
    run = await app.drive("r")
    assert (run.status, run.dead_letter, fails.calls) == ("failed", True, 3)
    assert run.error is not None
    assert (run.error.type, run.error.message) == ("builtins.ConnectionError", "unreachable")
    assert (run.error.node, run.error.attempt) == ("b", 3)
    assert "in __call__" in (run.error.traceback or "")
    with pytest.raises(RunFailedError, match=r"builtins.ConnectionError in node 'b' \(attempt 3\)"):
        await handle.result()
    store = open_store(database_url)
    letter = await store.find_dead_letter("", "r")
    await store.close()
    assert letter is not None
    head = (await handle.state()).config["configurable"]["checkpoint_id"]
    assert (letter.cause, letter.checkpoint_id) == (run.error, head)
    assert (run.checkpoint_id, run.step) == (head, 1)
    assert (await app.list_events("r"))[-1].data["reason"] == "exhausted"
    fails.calls = 99
    again = await app.submit("g", {}, run_id="r", on_existing="restart_if_failed")
    await app.drive("r")
    assert await again.result() == {"log": ["a", "done"]}


async def test_hopeless_error_is_not_tried_again(app: AgentFlow) -> None:
    fails = Fails(99, TypeError("a defect"))
    app.register(chain(("a", fails)), name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    assert ((await app.drive("r")).status, fails.calls) == ("failed", 1)
    assert (await app.list_events("r"))[-1].data["reason"] == "not_retryable"


async def test_backoff_is_a_time_in_the_row(app: AgentFlow) -> None:
    fails = Fails(1)
    policy = RetryPolicy(initial_interval=40, jitter=False)
    app.register(chain(("a", fails)), name="g", retry=policy)
    async with app.worker():
        handle = await app.submit("g", {})
        async for event in app.events(handle.id):
            if event.type == "run.retried":
                break
    run = await handle.run()
    assert run.status == "queued"
    assert timedelta(seconds=30) < run.available_at - datetime.now(UTC) <= timedelta(seconds=40)
    assert fails.calls == 1


async def test_sibling_that_failed_is_retried_although_another_asks(app: AgentFlow) -> None:
    fails = Fails(1)
    app.register(
        fan(("asks", asks("ok?")), ("fails", fails), then=logs("end")), name="g", retry=AT_ONCE
    )
    handle = await app.submit("g", {}, run_id="r")
    assert (await app.drive("r")).status == "waiting"
    assert fails.calls == 2
    (approval,) = await handle.approvals()
    await app.approvals.decide(approval.id, "approve", by="ada")
    run = await app.drive("r")
    assert sorted(run.output["log"], key=str) == [("ok?", {"type": "approve"}), "done", "end"]
    assert fails.calls == 2


async def test_drained_run_is_queued_and_continues_where_it_stopped(app: AgentFlow) -> None:
    holds, after = Holds(), Fails(0)
    app.register(chain(("a", holds), ("b", after)), name="g")
    async with app.worker() as worker:
        handle = await app.submit("g", {})
        await holds.entered.wait()
        worker.stop()
        holds.go_on.set()
    run = await handle.run()
    assert (run.status, after.calls, run.attempt) == ("queued", 0, 0)
    released = (await app.list_events(handle.id))[-1]
    assert (released.type, released.data["reason"]) == ("run.released", "drain")
    holds.entered.clear()
    async with app.worker():
        assert await handle.result(timeout=30) == {"log": ["held", "done"]}
    assert not holds.entered.is_set()
    resumed = [e for e in await app.list_events(handle.id) if e.type == "run.resumed"]
    assert [event.data["reason"] for event in resumed] == ["drain"]


async def test_cancelling_the_drive_gives_the_run_back(app: AgentFlow) -> None:
    holds = Holds()
    app.register(chain(("a", holds)), name="g")
    handle = await app.submit("g", {})
    drive = asyncio.create_task(app.drive(handle.id))
    await holds.entered.wait()
    with pytest.raises(ThreadBusyError):
        await app.drive(handle.id)
    drive.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drive
    assert await handle.status() is RunStatus.QUEUED
    holds.go_on.set()
    assert (await app.drive(handle.id)).status == "succeeded"


@pytest.mark.slow
async def test_running_run_is_cancelled_in_its_node(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker hears of it with its next heartbeat.
    monkeypatch.setenv("AGENTFLOW_LEASE", "1")
    holds, after = Holds(), Fails(0)
    async with AgentFlow(database_url) as app:
        app.register(chain(("a", holds), ("b", after)), name="g")
        async with app.worker():
            handle = await app.submit("g", {})
            await holds.entered.wait()
            asked = await handle.cancel(reason="enough", by="ada")
            assert asked.status == "running"
            with pytest.raises(RunCancelledError):
                await handle.result(timeout=30)
        assert (holds.was_cancelled, after.calls) == (True, 0)
        log = await app.list_events(handle.id)
        assert [event.type for event in log][-2:] == ["run.cancel_requested", "run.cancelled"]
        assert (log[-2].data["reason"], log[-2].data["by"]) == ("enough", "ada")
        assert (await handle.cancel()).status == "cancelled"


async def test_ended_run_cannot_be_cancelled(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a"))), name="g")
    handle = await app.submit("g", {})
    await app.drive(handle.id)
    with pytest.raises(IllegalTransitionError, match="is succeeded"):
        await handle.cancel()


async def test_waiting_ends_in_a_timeout_and_leaves_the_run_alone(app: AgentFlow) -> None:
    app.register(chain(("a", asks("ok?"))), name="g")
    handle = await app.submit("g", {})
    for call in (handle.wait(timeout=0.05), handle.result(timeout=timedelta(milliseconds=50))):
        with pytest.raises(TimeoutError):
            await call
    assert await handle.status() is RunStatus.QUEUED
    async with app.worker():
        assert (await handle.wait(until="parked", timeout=30)).status == "waiting"
        with pytest.raises(TimeoutError):
            await handle.wait(timeout=0.05)


async def test_events_are_followed_to_the_end_and_resumed_by_number(app: AgentFlow) -> None:
    app.register(chain(("a", asks("ok?"))), name="g")
    handle = await app.submit("g", {})
    seen = []
    async with app.worker():
        async for event in app.events(handle.id):
            seen.append(event)
            if event.type == "run.parked":
                (approval,) = await handle.approvals()
                await app.approvals.decide(approval.id, "approve", by="ada")
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert [event.type for event in seen] == [
        "run.submitted",
        "run.claimed",
        "run.started",
        "approval.requested",
        "run.parked",
        "approval.resolved",
        "run.claimed",
        "run.resumed",
        "run.succeeded",
    ]
    again = [event async for event in app.events(handle.id, after=6)]
    assert again == seen[6:]
    with pytest.raises(NotFoundError):
        await anext(app.events("none"))


async def test_second_run_of_a_thread_gets_its_own_input_and_the_first_ones_state(
    app: AgentFlow,
) -> None:
    app.register(chain(("a", lambda state: {"log": [state["value"]]})), name="g")
    for i in range(2):
        await app.submit("g", {"value": i}, run_id=f"r{i}", thread_id="t")
    with pytest.raises(ThreadBusyError):
        await app.drive("r1")
    await app.drive("r0")
    assert (await app.drive("r1")).output == {"log": [0, 1], "value": 1}
    assert (await app.get_run("r0")).output == {"log": [0], "value": 0}


async def test_ended_run_is_not_driven_again(app: AgentFlow) -> None:
    node = Fails(0)
    app.register(chain(("a", node)), name="g")
    await app.submit("g", {}, run_id="r")
    first = await app.drive("r")
    assert await app.drive("r") == first
    again = await app.submit("g", {}, run_id="r")
    assert (await again.result(), node.calls) == ({"log": ["done"]}, 1)


async def test_context_is_made_for_each_attempt(app: AgentFlow) -> None:
    made: list[str] = []

    async def context(run: Any) -> dict[str, Any]:
        made.append(run.id)
        return {"lock": threading.Lock()}

    def use(state: State, runtime: Runtime[Context]) -> State:
        return {"log": [type(runtime.context["lock"]).__name__]}

    app.register(chain(("a", use), ("b", asks("ok?"))), name="g", context=context)
    handle = await app.submit("g", {}, run_id="r")
    await app.drive("r")
    (approval,) = await handle.approvals()
    await app.approvals.decide(approval.id, "reject", by="ada")
    assert (await app.drive("r")).output["log"][0] == "lock"
    assert made == ["r", "r"]


async def test_bad_submissions_leave_no_row(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a"))), name="g", version="2")
    for error, call in (
        (UnknownGraphError, app.submit("h", {})),
        (UnknownGraphError, app.submit("g", {}, version="1")),
        (InvalidInputError, app.submit("g", {"typo": 1})),
        (InvalidInputError, app.submit("g", {}, start_at=datetime(2026, 1, 1))),  # noqa: DTZ001 -- the point
        (SerializationError, app.submit("g", {"value": threading.Lock()})),
    ):
        with pytest.raises(error):
            await call
    assert (await app.list_runs()).items == ()
    await app.submit("g", {"value": 1}, run_id="r")
    with pytest.raises(IdempotencyConflictError):
        await app.submit("g", {"value": 2}, run_id="r")
    assert (await app.get_run("r")).input == {"value": 1}


async def test_unstorable_state_fails_the_run_naming_channel_path_and_type(app: AgentFlow) -> None:
    after = Fails(0)
    bad = lambda _: {"value": {"open": [threading.Lock()]}}  # noqa: E731 -- a node
    app.register(chain(("a", bad), ("b", after)), name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    run = await app.drive("r")
    assert (run.status, after.calls) == ("failed", 0)
    assert run.error is not None
    assert run.error.type == "agentflow.errors.SerializationError"
    for fact in ("'value'", ".open[0]", "_thread.lock"):
        assert fact in run.error.message


async def test_node_that_asks_again_and_again_never_exhausts_its_attempts(app: AgentFlow) -> None:
    def ask_many(state: State) -> State:
        return {"log": [interrupt(i)["type"] for i in range(7)]}

    app.register(chain(("a", ask_many)), name="g", retry=AT_ONCE)
    handle = await app.submit("g", {}, run_id="r")
    for _ in range(7):
        assert (await app.drive("r")).status == "waiting"
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval.id, "approve", by="ada")
    assert (await app.drive("r")).output == {"log": ["approve"] * 7}
