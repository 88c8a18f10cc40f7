"""An attempt that begins with its claim reads and prepares while that is being committed.

Nothing of its graph is called before, and nothing is left of it if the claim is not stored.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from agentflow import AgentFlow, request_approval
from agentflow.checkpoint import Saver
from agentflow.drive.attempt import Attempt
from agentflow.errors import NotFoundError, StoreUnavailableError
from agentflow.failpoints import arm, disarm
from agentflow.storage import beginning
from agentflow.types import RunStatus
from agentflow.worker import Worker
from tests.integration.graphs import State, chain

LIMIT = 20.0
"""Seconds that something may take that happens at once."""


@pytest.fixture(autouse=True)
def _nothing_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attempts that are traced begin by themselves, and other tests leave a tracer behind."""
    monkeypatch.setattr(beginning, "is_traced", lambda: False)
    yield
    disarm()


@pytest.fixture
def called() -> list[str]:
    """The nodes that were called."""
    return []


@pytest.fixture
async def app(database_url: str, called: list[str]) -> AsyncIterator[AgentFlow]:
    """An app with a worker that is idle."""

    async def begin(state: State) -> State:
        called.append("begin")
        return {"log": ["begun"]}

    async def ask(state: State) -> State:
        called.append("ask")
        return {"log": [request_approval({"who": "ada"}).type]}

    async with AgentFlow(database_url) as opened:
        opened.register(chain(("begin", begin), ("ask", ask)), name="g")
        async with opened.worker():
            await (await opened.submit("g", {})).wait(until="parked")
            (worker,) = opened._offers._takers
            assert isinstance(worker, Worker)
            while worker._has_more or worker._active:  # noqa: ASYNC110 -- it tells nobody
                await asyncio.sleep(0)
            called.clear()
            yield opened


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an attempt has done all that it may before its claim is durable."""
    waits = threading.Event()
    until_stored = Attempt._until_stored

    async def noted(attempt: Attempt) -> None:
        waits.set()
        await until_stored(attempt)

    monkeypatch.setattr(Attempt, "_until_stored", noted)
    return waits


def at_next_commit(action: Callable[[], None]) -> None:
    """Run `action` once, before the next transaction is committed."""

    def once() -> None:
        arm("database.before_commit", lambda: None)
        action()

    arm("database.before_commit", once)


async def test_submission_is_prepared_but_not_begun_before_it_is_durable(
    app: AgentFlow,
    called: list[str],
    waiting: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = Saver._accept_writes
    loop = asyncio.get_running_loop()
    before: list[str] = []

    def noted(saver: Saver, *args: Any, **named: Any) -> Any:
        called.append("put")
        return accept(saver, *args, **named)

    def look() -> None:
        assert waiting.wait(LIMIT), "the attempt has not begun to read"
        for _ in range(10):  # whatever it can still do, it does now
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(LIMIT)
        before.extend(called)

    monkeypatch.setattr(Saver, "_accept_writes", noted)
    at_next_commit(look)
    handle = await app.submit("g", {})
    await handle.wait(until="parked")
    assert before == []
    assert called[:2] == ["put", "begin"], "what the input writes comes first"


async def test_decision_is_prepared_but_not_handed_on_before_it_is_durable(
    app: AgentFlow, called: list[str], waiting: threading.Event
) -> None:
    handle = await app.submit("g", {})
    await handle.wait(until="parked")
    (approval,) = await handle.approvals()
    called.clear()
    waiting.clear()
    before: list[str] = []

    def look() -> None:
        assert waiting.wait(LIMIT), "the attempt has not begun to read"
        before.extend(called)

    at_next_commit(look)
    await app.approvals.decide(approval, "approve", by="ada")
    assert await handle.result() == {"log": ["begun", "approve"]}
    assert before == []
    assert called == ["ask"]


async def test_claim_that_is_stored_at_the_second_attempt_is_driven_once(
    app: AgentFlow, called: list[str], waiting: threading.Event
) -> None:
    def fail() -> None:
        assert waiting.wait(LIMIT)
        raise StoreUnavailableError("the database", "it was restarted", "unreachable")

    at_next_commit(fail)
    handle = await app.submit("g", {})
    await handle.wait(until="parked")
    assert called == ["begin", "ask"]
    assert (await app.get_run(handle.id)).claims == 1
    kinds = [event.type for event in await app.list_events(handle.id)]
    assert kinds.count("run.claimed") == kinds.count("run.started") == 1


async def test_claim_that_is_not_stored_leaves_nothing(
    app: AgentFlow, called: list[str], waiting: threading.Event
) -> None:
    def fail() -> None:
        assert waiting.wait(LIMIT)
        raise RuntimeError("no commit")

    at_next_commit(fail)
    with pytest.raises(RuntimeError, match="no commit"):
        await app.submit("g", {}, run_id="r")
    (worker,) = app._offers._takers
    assert isinstance(worker, Worker)
    assert not worker._active
    with pytest.raises(NotFoundError):
        await app.get_run("r")
    assert called == []
    # Neither the thread nor the worker is the worse for it.
    handle = await app.submit("g", {}, run_id="r")
    await handle.wait(until="parked")
    assert called == ["begin", "ask"]


async def test_attempt_that_fails_before_its_claim_is_refused_ends(
    app: AgentFlow, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    async def fail_to_read(attempt: Attempt, waits: object) -> None:
        failed.set()
        raise OSError("cannot read what was used")

    def refuse() -> None:
        assert failed.wait(LIMIT)
        raise RuntimeError("no commit")

    monkeypatch.setattr(Attempt, "_begin_metering", fail_to_read)
    at_next_commit(refuse)
    async with asyncio.timeout(LIMIT):
        with pytest.raises(RuntimeError, match="no commit"):
            await app.submit("g", {}, run_id="r")
    monkeypatch.undo()
    (worker,) = app._offers._takers
    assert isinstance(worker, Worker)
    assert not worker._active
    handle = await app.submit("g", {}, run_id="r")
    await handle.wait(until="parked")
    assert called == ["begin", "ask"]


async def test_run_that_has_asked_much_is_claimed_once_for_each_decision(
    database_url: str, waiting: threading.Event
) -> None:
    """What it has asked is not handed on, and not read before the decision is there."""
    many = 24

    async def ask_often(state: State) -> State:
        for number in range(many):
            request_approval({"number": number})
        return {"log": ["answered"]}

    async with AgentFlow(database_url) as app:
        app.register(chain(("ask", ask_often)), name="g")
        async with app.worker():
            handle = await app.submit("g", {})
            for _ in range(many):
                await handle.wait(until="parked")
                (approval,) = (each for each in await handle.approvals() if not each.decided_at)
                await app.approvals.decide(approval, "approve", by="ada")
            assert await handle.result() == {"log": ["answered"]}
        assert (await app.get_run(handle.id)).claims == 1 + many


async def test_worker_that_is_told_to_go_during_the_commit_gives_the_run_back(
    app: AgentFlow, called: list[str], waiting: threading.Event
) -> None:
    (worker,) = app._offers._takers
    assert isinstance(worker, Worker)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        assert waiting.wait(LIMIT)
        loop.call_soon_threadsafe(worker.stop)

    at_next_commit(stop)
    handle = await app.submit("g", {})
    while worker._active:  # noqa: ASYNC110 -- it tells nobody
        await asyncio.sleep(0)
    run = await app.get_run(handle.id)
    assert (run.status, run.attempt) == (RunStatus.QUEUED, 0)
    async with app.worker():
        await handle.wait(until="parked")
    assert called == ["begin", "ask"]
