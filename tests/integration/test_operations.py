"""What people do to runs from outside: pause, requeue, interrupt, restore, and look for faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver

from agentflow import AgentFlow, RetryPolicy
from agentflow.checkpoint import open_checkpointer
from agentflow.database.engine import parse_url
from agentflow.database.tables import runs
from agentflow.errors import (
    FencedError,
    InvalidInputError,
    NotDeadLetterError,
    NotFoundError,
    PausedError,
    ThreadBusyError,
)
from agentflow.types import FencingToken, Lease, RunStatus
from tests.integration.graphs import State, asks, chain, logs

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
async def app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AgentFlow]:
    """An app on an empty database, whose workers are told soon to stop."""
    monkeypatch.setenv("AGENTFLOW_LEASE", "2")
    async with AgentFlow(database_url) as opened:
        yield opened


class Fails:
    """A node that fails until it is mended."""

    def __init__(self) -> None:
        self.is_broken = True

    def __call__(self, state: State) -> State:
        if self.is_broken:
            raise ValueError("no")
        return {"log": ["mended"]}


class Gate:
    """A node that waits until it is let through."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, state: State) -> State:
        self.entered.set()
        await self.open.wait()
        return {"log": ["gate"]}


async def failed(app: AgentFlow, node: Fails) -> str:
    """Let a run of `a`, `b` and a failing node fail."""
    app.register(chain(("a", logs("a")), ("b", logs("b")), ("c", node)), name="g", retry=ONCE)
    handle = await app.submit("g", {})
    assert (await app.drive(handle.id)).status is RunStatus.FAILED
    return handle.id


async def test_dead_letter_is_requeued_from_the_node_that_failed(app: AgentFlow) -> None:
    node = Fails()
    run_id = await failed(app, node)
    letter = await app.dead_letters.get(run_id)
    assert letter.cause.traceback is not None
    assert (letter.cause.type, letter.cause.node) == ("builtins.ValueError", "c")
    assert [each.run_id for each in (await app.dead_letters.list()).items] == [run_id]
    node.is_broken = False
    await app.dead_letters.requeue(run_id, by="ada")
    run = await app.drive(run_id)
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"log": ["a", "b", "mended"]})
    for call in (app.dead_letters.requeue(run_id), app.dead_letters.discard(run_id)):
        with pytest.raises(NotDeadLetterError):
            await call


async def test_dead_letter_is_requeued_from_a_chosen_checkpoint(app: AgentFlow) -> None:
    node = Fails()
    run_id = await failed(app, node)
    node.is_broken = False
    place: RunnableConfig = {"configurable": {"thread_id": run_id, "checkpoint_ns": ""}}
    states = [state async for state in app._saver.alist(place)]
    after_a = next(s for s in states if s.checkpoint["channel_values"].get("log") == ["a"])
    chosen = after_a.config["configurable"]["checkpoint_id"]
    with pytest.raises(NotFoundError, match="checkpoint 'none'"):
        await app.dead_letters.requeue(run_id, checkpoint_id="none")
    await app.dead_letters.requeue(run_id, checkpoint_id=chosen)
    run = await app.drive(run_id)
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"log": ["a", "b", "mended"]})
    resumed = [e for e in await app.list_events(run_id) if e.type == "run.resumed"]
    assert [e.data["reason"] for e in resumed] == ["requeue"]


async def test_discarded_dead_letter_is_gone(app: AgentFlow) -> None:
    run_id = await failed(app, Fails())
    run = await app.dead_letters.discard(run_id, reason="a test", by="ada")
    assert (run.status, run.dead_letter) == (RunStatus.FAILED, False)
    assert (await app.dead_letters.list()).items == ()
    with pytest.raises(NotDeadLetterError, match="it is failed"):
        await app.dead_letters.get(run_id)
    with pytest.raises(NotFoundError):
        await app.dead_letters.get("none")


async def test_output_that_is_too_large_ends_in_the_dead_letter_with_its_state(
    app: AgentFlow,
) -> None:
    """Whatever the policy says about errors: the same output would only be refused again."""
    huge = "x" * (50 * 1024 * 1024)
    app.register(chain(("a", logs("a")), ("b", lambda _: {"log": [huge]})), name="g")
    handle = await app.submit("g", {})
    run = await app.drive(handle.id)
    assert (run.status, run.attempt) == (RunStatus.FAILED, 1)
    assert run.error is not None
    assert run.error.type == "agentflow.errors.PayloadTooLargeError"
    assert "runs.output" in run.error.message
    assert len(run.error.message) < 1000
    letter = await app.dead_letters.get(handle.id)
    assert letter.reason == "not_retryable"
    state = await handle.state()
    assert [len(entry) for entry in state.values["log"]] == [1, len(huge)]


async def test_paused_run_stops_at_its_next_superstep_and_goes_on_later(app: AgentFlow) -> None:
    gate = Gate()
    app.register(chain(("gate", gate), ("b", logs("b"))), name="g")
    async with app.worker():
        handle = await app.submit("g", {})
        await gate.entered.wait()
        await handle.pause(reason="look", by="ada")
        # A heartbeat tells the attempt, which has heard of it before it sends the next one.
        for _ in range(2):
            await _until(partial(_is_extended, app, handle.id, await _expiry(app, handle.id)))
        gate.open.set()
        await _until(partial(_is, app, handle.id, RunStatus.QUEUED))
        assert (await handle.state()).values["log"] == ["gate"]
        with pytest.raises(PausedError):
            await app.drive(handle.id)
        await handle.resume(by="ada")
        assert await handle.result(timeout=30) == {"log": ["gate", "b"]}


async def _expiry(app: AgentFlow, run_id: str) -> Any:
    query = sa.select(runs.c.lease_expires_at).where(runs.c.run_id == run_id)
    store: Any = app._store
    return await store._database.read(lambda connection: connection.execute(query).scalar_one())


async def _is_extended(app: AgentFlow, run_id: str, before: Any) -> bool:
    return bool(await _expiry(app, run_id) > before)


async def _is(app: AgentFlow, run_id: str, status: RunStatus) -> bool:
    return (await app.get_run(run_id)).status is status


async def _until(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await look():  # noqa: ASYNC110 -- it is for the database to say
            await asyncio.sleep(0.02)


async def test_everything_or_a_graph_or_a_queue_is_paused(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a"))), name="g")
    handle = await app.submit("g", {})
    for scope in ({"graph": "g"}, {"queue": "default"}, {}):
        pause = await app.pause(**scope, reason="incident", by="ada")
        assert await app.list_pauses() == (pause,)
        with pytest.raises(PausedError):
            await app.drive(handle.id)
        assert await app.resume(**scope, by="ada")
        assert not await app.resume(**scope)
    assert [e.type for e in await app.list_events()] == [
        f"{scope}.{what}" for scope in ("graph", "queue", "all") for what in ("paused", "unpaused")
    ]
    for bad in ({"graph": "g", "queue": "q"}, {"graph": ""}):
        with pytest.raises(InvalidInputError, match="invalid pause"):
            await app.pause(**bad)
    assert (await app.drive(handle.id)).status is RunStatus.SUCCEEDED


async def test_interrupted_run_leaves_its_state_and_a_rolled_back_one_does_not(
    app: AgentFlow,
) -> None:
    app.register(chain(("a", logs("a")), ("ask", asks("ok?"))), name="ask")
    app.register(chain(("b", logs("b"))), name="g")
    outputs = {}
    for on_busy in ("interrupt", "rollback"):
        first = await app.submit("ask", {}, thread_id=on_busy)
        assert (await app.drive(first.id)).status is RunStatus.WAITING
        with pytest.raises(ThreadBusyError, match=first.id):
            await app.submit("g", {}, thread_id=on_busy, on_busy="reject")
        second = await app.submit("g", {}, thread_id=on_busy, on_busy=on_busy, by="ada")
        outputs[on_busy] = (await app.drive(second.id)).output
        stopped = await app.get_run(first.id)
        assert (stopped.status, stopped.cancel_reason) == (
            RunStatus.CANCELLED,
            f"{on_busy} by run {second.id}",
        )
    assert outputs == {"interrupt": {"log": ["a", "b"]}, "rollback": {"log": ["b"]}}


async def test_running_run_is_rolled_back_after_its_worker_has_let_go(app: AgentFlow) -> None:
    gate = Gate()
    app.register(chain(("a", logs("a")), ("gate", gate)), name="g")
    app.register(chain(("b", logs("b"))), name="next")
    async with app.worker():
        first = await app.submit("g", {}, thread_id="t")
        await gate.entered.wait()
        second = await app.submit("next", {}, thread_id="t", on_busy="rollback")
        assert await second.result(timeout=30) == {"log": ["b"]}
    assert await first.status() is RunStatus.CANCELLED
    assert "run.rolled_back" in [e.type for e in await app.list_events(first.id)]


async def test_rollback_needs_a_checkpointer_that_can(database_url: str) -> None:
    async with AgentFlow(database_url, checkpoints=InMemorySaver()) as app:
        app.register(chain(("a", logs("a"))), name="g")
        with pytest.raises(InvalidInputError, match="on_busy"):
            await app.submit("g", {}, on_busy="rollback")
        with pytest.raises(InvalidInputError, match="checkpoints"):
            await app.restore()


@pytest.mark.parametrize(
    "options",
    [
        {"on_busy": "wait"},
        {"timeout": 0},
        {"timeout": "1h"},
        {"timeout": float("nan")},
        {"timeout": True},
        {"start_timeout": -1},
        {"start_timeout": 1e30},
    ],
)
async def test_bad_options_leave_no_row(app: AgentFlow, options: dict[str, Any]) -> None:
    app.register(chain(("a", logs("a"))), name="g")
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        await app.submit("g", {}, **options)
    assert (await app.list_runs()).items == ()


async def test_worker_ends_what_is_past_its_deadline(app: AgentFlow) -> None:
    gate = Gate()
    app.register(chain(("ask", asks("ok?"))), name="ask")
    app.register(chain(("gate", gate)), name="gate")
    async with app.worker():
        waits = await app.submit("ask", {}, timeout=timedelta(seconds=0.5))
        busy = await app.submit("gate", {}, timeout=0.5)
        for handle in (waits, busy):
            assert (await handle.wait(timeout=30)).status is RunStatus.FAILED
            letter = await app.dead_letters.get(handle.id)
            assert letter.reason == "deadline"
            assert letter.cause.type == "agentflow.errors.DeadlineExceededError"


async def test_run_driven_too_late_is_cancelled_instead(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a"))), name="g")
    handle = await app.submit("g", {}, start_timeout=1e-6)
    run = await app.drive(handle.id)
    assert (run.status, run.cancel_reason) == (RunStatus.CANCELLED, "start_deadline")


@pytest.mark.parametrize("is_apart", [False, True], ids=["one database", "two databases"])
async def test_restored_backup_starts_paused_and_locks_out_who_is_left(
    database_url: str, tmp_path: Path, is_apart: bool
) -> None:
    url = f"sqlite:///{tmp_path / 'checkpoints.db'}" if is_apart else database_url
    async with (
        AgentFlow(database_url, checkpoints=url if is_apart else None) as app,
        open_checkpointer(url) as saver,
    ):
        app.register(chain(("a", logs("a")), ("ask", asks("ok?"))), name="g")
        handle = await app.submit("g", {}, thread_id="t")
        assert (await app.drive(handle.id)).status is RunStatus.WAITING
        stranger = Lease(tenant="", run_id="x", thread_id="t", worker="left", token=FencingToken(7))
        assert await saver.acquire(stranger) == 7
        restored = await app.restore(reason="disk lost", by="ada")
        assert (restored.epoch, restored.unfinished) == (1, 1)
        left = saver.with_lease(stranger)
        place: dict[str, Any] = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        with pytest.raises(FencedError):
            await left.aput_writes(
                {"configurable": {**place["configurable"], "checkpoint_id": "c"}},
                [("log", ["late"])],
                "task",
            )
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval.id, "approve", by="ada")
        with pytest.raises(PausedError, match="the store was restored"):
            await app.drive(handle.id)
        assert await app.resume_restored(by="ada")
        assert (await app.drive(handle.id)).status is RunStatus.SUCCEEDED


async def test_doctor_finds_what_is_wrong(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a"))), name="g")
    report = await app.doctor()
    assert (report.level, {check.level for check in report.checks}) == ("ok", {"ok"})
    await failed_and_forgotten(app)
    report = await app.doctor()
    levels = {check.name: check.level for check in report.checks}
    assert report.level == "problem"
    assert {name for name, level in levels.items() if level != "ok"} == {
        "leases",
        "dead_letters",
        "pauses",
        "versions",
    }
    (versions,) = [check for check in report.checks if check.name == "versions"]
    assert "1 queued of g@1 in queue 'default'" in versions.message
    await app.resume()
    async with app.worker(queues=("default", "mail")):
        await _until(partial(_is_well, app))


async def failed_and_forgotten(app: AgentFlow) -> None:
    app.register(chain(("f", Fails())), name="fails", retry=ONCE)
    await app.drive((await app.submit("fails", {})).id)
    lost = await app.submit("g", {}, queue="mail")
    await app._store.claim_run("", lost.id, worker="w", lease=timedelta(seconds=-1))
    await app.submit("g", {})
    await app.pause()


async def _is_well(app: AgentFlow) -> bool:
    levels = {check.name: check.level for check in (await app.doctor()).checks}
    return {name for name, level in levels.items() if level != "ok"} == {"dead_letters"}


async def test_doctor_tells_of_a_database_out_of_reach_and_of_one_that_is_behind(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "2")
    async with AgentFlow("postgresql://nobody@127.0.0.1:1/none") as app:
        report = await app.doctor()
        assert [(check.name, check.level) for check in report.checks] == [("database", "problem")]
    engine = sa.create_engine(parse_url(postgres_url))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE agentflow_schema SET version_num = '0002'"))
    engine.dispose()
    async with AgentFlow(postgres_url) as app:
        report = await app.doctor()
    assert report.level == "problem"
    assert "agentflow migrate up" in report.checks[0].message
