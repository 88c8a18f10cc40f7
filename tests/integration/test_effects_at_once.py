"""Several callers of one key at a time: one calls, and the others get what came of it.

The calls are counted by the ledger, a process of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import Send

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.types import Run, RunStatus
from tests.fault.ledger import Ledger, arecord, record
from tests.integration.graphs import State, chain

CALLERS = 4
AGAIN = RetryPolicy(initial_interval=0, jitter=False, max_attempts=3)


class DeclinedError(Exception):
    """What a bank says."""


class Meeting:
    """Where callers say that they are about to call, and the call waits for all of them."""

    def __init__(self, callers: int = CALLERS) -> None:
        self._lock = threading.Lock()
        self._missing = callers
        self._complete = threading.Event()

    def arrive(self) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing <= 0:
                self._complete.set()

    def wait_complete(self) -> None:
        assert self._complete.wait(20), f"{self._missing} callers have not come"


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


async def drive(app: AgentFlow, graph: Any) -> Run:
    app.register(graph, name="g", retry=AGAIN)
    await app.submit("g", {"log": []}, run_id="r")
    return await app.drive("r")


def gathering(ask: Any) -> Any:
    async def node(state: State) -> State:
        return {"log": list(await asyncio.gather(*(ask() for _ in range(CALLERS))))}

    return chain(("n", node))


def in_threads(ask: Any) -> Any:
    def node(state: State) -> State:
        with ThreadPoolExecutor(CALLERS) as pool:
            asked = [pool.submit(contextvars.copy_context().run, ask) for _ in range(CALLERS)]
        return {"log": [each.result() for each in asked]}

    return chain(("n", node))


def sending(branch: Any) -> Any:
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    graph.add_node("branch", branch)
    graph.add_conditional_edges(START, lambda _: [Send("branch", {})] * CALLERS, ["branch"])
    return graph


@pytest.mark.parametrize("declines", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("kind", ["gather", "branches", "threads", "branches in threads"])
async def test_one_of_many_callers_calls_and_all_get_what_came_of_it(
    app: AgentFlow, ledger: Ledger, kind: str, declines: bool
) -> None:
    meeting = Meeting()

    def outcome(entry: int) -> int:
        if declines:
            raise DeclinedError(entry)
        return entry

    @effect(key="order-7")
    async def pay(amount: int) -> int:
        await asyncio.to_thread(meeting.wait_complete)
        return outcome(await arecord(ledger.address, key="pay"))

    @effect(key="order-7")
    def pay_now(amount: int) -> int:
        meeting.wait_complete()
        return outcome(record(ledger.address, key="pay"))

    async def ask() -> tuple[str, int]:
        meeting.arrive()
        try:
            return "paid", await pay(7)
        except DeclinedError as error:
            return "declined", *error.args

    def ask_now() -> tuple[str, int]:
        meeting.arrive()
        try:
            return "paid", pay_now(7)
        except DeclinedError as error:
            return "declined", *error.args

    async def branch(state: State) -> State:
        return {"log": [await ask()]}

    graphs = {
        "gather": lambda: gathering(ask),
        "branches": lambda: sending(branch),
        "threads": lambda: in_threads(ask_now),
        "branches in threads": lambda: sending(lambda _: {"log": [ask_now()]}),
    }
    run = await drive(app, graphs[kind]())
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert len(run.output["log"]) == CALLERS
    assert {tuple(each) for each in run.output["log"]} == {("declined" if declines else "paid", 1)}
    assert len(ledger.entries(key="pay")) == 1


async def test_one_of_two_runs_calls_and_the_other_gets_its_outcome(
    database_url: str, ledger: Ledger
) -> None:
    meeting = Meeting(2)

    @effect(key="order-7", scope="global")
    async def pay() -> int:
        await asyncio.to_thread(meeting.wait_complete)
        return await arecord(ledger.address, key="pay")

    async def node(state: State) -> State:
        meeting.arrive()
        return {"log": [await pay()]}

    async def drive_one(run_id: str) -> Any:
        async with AgentFlow(database_url) as app:
            app.register(chain(("n", node)), name="g", retry=AGAIN)
            await app.submit("g", {"log": []}, run_id=run_id)
            return (await app.drive(run_id)).output

    made = list(await asyncio.gather(drive_one("a"), drive_one("b")))
    assert made == [{"log": [1]}] * 2
    assert len(ledger.entries(key="pay")) == 1


@pytest.mark.parametrize(
    "options", [{"retry": AGAIN}, {"on_in_doubt": "retry"}], ids=["retry", "idempotent"]
)
async def test_failure_that_is_worth_another_call_is_followed_by_one_for_all(
    app: AgentFlow, ledger: Ledger, options: dict[str, Any]
) -> None:
    meeting = Meeting()

    @effect(key="order-7", **options)
    async def pay() -> int:
        await asyncio.to_thread(meeting.wait_complete)
        entry = await arecord(ledger.address, key="pay")
        if entry == 1:
            raise OSError("busy")
        return entry

    async def ask() -> int:
        meeting.arrive()
        return int(await pay())

    run = await drive(app, gathering(ask))
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert run.output["log"] == [2] * CALLERS
    assert len(ledger.entries(key="pay")) == 2


async def test_call_in_doubt_is_one_question_and_its_answer_is_for_all(
    app: AgentFlow, ledger: Ledger
) -> None:
    meeting = Meeting()

    @effect(key="order-7")
    async def pay() -> int:
        await asyncio.to_thread(meeting.wait_complete)
        await arecord(ledger.address, key="pay")
        raise TimeoutError

    async def branch(state: State) -> State:
        meeting.arrive()
        return {"log": [await pay()]}

    run = await drive(app, sending(branch))
    assert run.status is RunStatus.WAITING, run.error
    (asked,) = (await app.approvals.list(run_id="r")).items
    said = {"happened": True, "outcome": 9}
    await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="ada")
    run = await app.drive("r")
    assert run.output == {"log": [9] * CALLERS}, run.error
    assert len(ledger.entries(key="pay")) == 1


async def test_caller_cancelled_before_it_calls_leaves_the_call_to_the_others(
    app: AgentFlow, ledger: Ledger
) -> None:
    @effect(key="order-7")
    async def pay() -> int:
        return await arecord(ledger.address, key="pay")

    async def node(state: State) -> State:
        # Each begins, and waits for its intent or for the first one; then the first one goes.
        first, *others = [asyncio.create_task(pay()) for _ in range(CALLERS)]
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return {"log": list(await asyncio.gather(*others))}

    run = await drive(app, chain(("n", node)))
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert run.output["log"] == [1] * (CALLERS - 1)
    assert len(ledger.entries(key="pay")) == 1
