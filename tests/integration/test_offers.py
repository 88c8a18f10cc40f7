"""What is submitted or decided beside an idle worker begins in the transaction that stores it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from agentflow import AgentFlow, request_approval
from agentflow.checkpoint import Saver
from agentflow.control import AttemptControl, current_attempt
from agentflow.errors import FencedError, NotFoundError
from agentflow.storage import beginning
from agentflow.types import AuditEvent, ClaimedRun, FencingToken, Lease, RunStatus
from agentflow.worker import Worker
from tests.integration.graphs import State, chain

BEGUN = ["run.submitted", "run.claimed", "run.started"]
GONE_ON = ["approval.resolved", "run.claimed", "run.resumed"]


@pytest.fixture(autouse=True)
def _nothing_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that are traced begin by themselves, and other tests leave a tracer behind."""
    monkeypatch.setattr(beginning, "is_traced", lambda: False)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


def together(log: Sequence[AuditEvent], kinds: Sequence[str]) -> bool:
    """Whether the last event of the first kind begins a transaction with just these."""
    first = max(i for i, event in enumerate(log) if event.type == kinds[0])
    same = [event.type for event in log if event.at == log[first].at]
    return same == list(kinds)


async def ask(state: State) -> State:
    return {"log": [request_approval({"who": "ada"}).type]}


async def test_submission_and_decision_begin_in_one_transaction_each(app: AgentFlow) -> None:
    seen: list[list[AuditEvent]] = []

    async def look(state: State) -> State:
        with suppress(NotFoundError):  # before there is a run of that name
            seen.append(list(await app.list_events("r")))
        return {"log": ["looked"]}

    app.register(chain(("look", look), ("ask", ask), ("last", look)), name="g")
    async with app.worker():
        await idle(app)
        handle = await app.submit("g", {}, run_id="r")
        await handle.wait(until="parked")
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval, "approve", by="ada")
        assert await handle.result() == {"log": ["looked", "approve", "looked"]}
    # Whatever is said of an attempt was durable before its first node.
    assert [event.type for event in seen[0]] == BEGUN
    assert together(seen[0], BEGUN)
    assert together(seen[1], GONE_ON)
    (resumed,) = (event for event in seen[1] if event.type == "run.resumed")
    (parked,) = (event for event in seen[1] if event.type == "run.parked")
    assert resumed.data["checkpoint"] == parked.data["checkpoint"]
    assert resumed.data["reason"] == "approval"


def the_worker(app: AgentFlow) -> Worker:
    """Return the only worker."""
    (worker,) = app._offers._takers
    assert isinstance(worker, Worker)
    return worker


async def idle(app: AgentFlow) -> None:
    """Wait until the worker has looked for work, and found none."""
    handle = await app.submit("g", {})
    await handle.wait(until="parked")
    while the_worker(app)._has_more or the_worker(app)._active:  # noqa: ASYNC110 -- it tells nobody
        await asyncio.sleep(0)


async def test_decision_about_a_thread_that_was_changed_says_where_it_goes_on(
    app: AgentFlow,
) -> None:
    """By `update_state`, while nobody held it: the run goes on from there, and says so."""
    app.register(chain(("ask", ask)), name="g")
    async with app.worker():
        await idle(app)
        handle = await app.submit("g", {}, run_id="r")
        await handle.wait(until="parked")
        (approval,) = await handle.approvals()
        graph = app.graphs["g", "1"].graph.copy(update={"checkpointer": app.checkpointer})
        moved = await graph.aupdate_state(
            {"configurable": {"thread_id": "r"}}, {"log": ["by hand"]}, as_node="__start__"
        )
        await app.approvals.decide(approval, "approve", by="ada")
        await handle.wait(until="parked")
        log = await app.list_events("r")
    resumed = [event for event in log if event.type == "run.resumed"]
    assert [event.data["checkpoint"] for event in resumed] == [
        moved["configurable"]["checkpoint_id"]
    ]
    assert not together(log, GONE_ON)


async def test_thread_that_the_checkpointer_knows_under_a_higher_token_is_taken_above_it(
    app: AgentFlow,
) -> None:
    """As after a restore of the runs alone."""
    saver = app.checkpointer
    assert isinstance(saver, Saver)
    app.register(chain(("ask", ask)), name="g")
    held = Lease(tenant="", run_id="x", thread_id="r", worker="x", token=FencingToken(50))
    assert await saver.acquire(held) == 50
    async with app.worker():
        await idle(app)
        handle = await app.submit("g", {}, run_id="r")
        await handle.wait(until="parked")
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval, "approve", by="ada")
        await handle.result()
        log = await app.list_events("r")
    tokens = [event.data["token"] for event in log if event.type == "run.claimed"]
    assert tokens == [51, 52]
    with pytest.raises(FencedError):
        await saver.with_lease(held).aput_writes(
            {"configurable": {"thread_id": "r", "checkpoint_ns": "", "checkpoint_id": "c"}},
            [("log", 1)],
            "task",
        )


async def test_large_state_is_read_whole_after_a_decision(app: AgentFlow) -> None:
    """Of it only the row of the checkpoint is read with the claim."""
    text = [str(number) * 50 for number in range(5_000)]

    async def fill(state: State) -> State:
        return {"log": text}

    app.register(chain(("fill", fill), ("ask", ask)), name="g")
    async with app.worker():
        await idle(app)
        handle = await app.submit("g", {})
        await handle.wait(until="parked")
        (approval,) = await handle.approvals()
        await app.approvals.decide(approval, "approve", by="ada")
        assert await handle.result() == {"log": [*text, "approve"]}
        assert together(await app.list_events(handle.id), GONE_ON)


async def test_full_worker_leaves_a_submission_in_the_queue(app: AgentFlow) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def stay(state: State) -> State:
        entered.set()
        await leave.wait()
        return {"log": ["stayed"]}

    app.register(chain(("stay", stay)), name="g")
    async with app.worker(concurrency=1):
        first = await app.submit("g", {})
        await entered.wait()
        second = await app.submit("g", {})
        assert (await app.get_run(second.id)).status is RunStatus.QUEUED
        leave.set()
        await first.result()
        assert await second.result() == {"log": ["stayed"]}


async def test_worker_that_drains_takes_nothing_more(app: AgentFlow) -> None:
    app.register(chain(("ask", ask)), name="g")
    worker = app.worker()
    async with worker:
        await idle(app)
        worker.stop()
        handle = await app.submit("g", {})
    assert (await app.get_run(handle.id)).status is RunStatus.QUEUED


async def test_submission_during_which_the_worker_is_told_to_go_is_given_back(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.db"
    async with AgentFlow(f"sqlite:///{path}") as app:
        app.register(chain(("ask", ask)), name="g")
        worker = app.worker()
        async with worker:
            await idle(app)
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                submitting = asyncio.create_task(_submit(app))
                while not worker._offered:  # noqa: ASYNC110 -- it tells nobody
                    await asyncio.sleep(0)
                worker.stop()
                while worker._here is not None:  # noqa: ASYNC110 -- nor of that
                    await asyncio.sleep(0)
                other.execute("ROLLBACK")
                await submitting
        run = await app.get_run("r")
        assert (run.status, run.attempt) == (RunStatus.QUEUED, 0)
        kinds = [event.type for event in await app.list_events("r")]
        assert kinds == [*BEGUN, "run.released"]
        async with app.worker():
            await app.wait("r", until="parked")


async def test_worker_goes_in_time_although_what_it_was_offered_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_GRACE", "0.5")
    path = tmp_path / "runs.db"
    async with AgentFlow(f"sqlite:///{path}") as app:
        app.register(chain(("ask", ask)), name="g")
        worker = app.worker()
        async with worker:
            await idle(app)
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            submitting = asyncio.create_task(_submit(app))
            while not worker._offered:  # noqa: ASYNC110 -- it tells nobody
                await asyncio.sleep(0)
            worker.stop()
            async with asyncio.timeout(10):
                await worker._settle()
            assert worker._offered, "it has not waited for that"
            other.execute("ROLLBACK")
            other.close()
            await submitting


async def test_decision_at_the_moment_of_the_park_leaves_the_worker_alive(app: AgentFlow) -> None:
    """The next attempt begins while the last one is still ending."""

    async def ask_again(state: State) -> State:
        return {"log": [request_approval({"number": number}).type for number in range(8)]}

    app.register(chain(("ask", ask_again)), name="g")
    async with app.worker() as worker:
        handles = [await app.submit("g", {}) for _ in range(4)]

        async def approve(run_id: str) -> None:
            for _ in range(8):
                await app.wait(run_id, until="parked")
                (approval,) = (await app.approvals.list(run_id=run_id)).items
                await app.approvals.decide(approval, "approve", by="ada")
                while (await app.approvals.get(approval.id)).status == "pending":
                    pytest.fail("it was decided")

        await asyncio.gather(*(approve(handle.id) for handle in handles))
        for handle in handles:
            assert await handle.result() == {"log": ["approve"] * 8}
        assert worker.stats().health == "ok"


async def test_claim_under_way_leaves_no_room_for_offers(
    app: AgentFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is going to find may fill the worker."""
    claiming, go_on = asyncio.Event(), asyncio.Event()
    claim_runs = app._store.claim_runs

    async def slowly(*args: Any, **named: Any) -> list[ClaimedRun]:
        claiming.set()
        await go_on.wait()
        return await claim_runs(*args, **named)

    app.register(chain(("ask", ask)), name="g")
    async with app.worker() as worker:
        await idle(app)
        monkeypatch.setattr(app._store, "claim_runs", slowly)
        assert worker._listener is not None
        worker._listener.wake()
        await claiming.wait()
        handle = await app.submit("g", {})
        status = (await app.get_run(handle.id)).status
        go_on.set()
        await handle.wait(until="parked")
    assert status is RunStatus.QUEUED


async def test_damaged_count_of_failures_keeps_no_other_run_from_being_claimed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.db"
    async with AgentFlow(f"sqlite:///{path}") as app:
        app.register(chain(("ask", ask)), name="g")
        await app.submit("g", {}, run_id="bad")
        await app.drive("bad")
        with closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE agentflow_runs SET failures = x'00' WHERE run_id = 'bad'")
            other.commit()
        async with app.worker():
            await idle(app)
            (approval,) = (await app.approvals.list(run_id="bad")).items
            await app.approvals.decide(approval, "approve", by="ada")
            good = await app.submit("g", {})
            await good.wait(until="parked")


async def test_submission_whose_caller_is_gone_is_driven_all_the_same(app: AgentFlow) -> None:
    entered = asyncio.Event()

    async def enter(state: State) -> State:
        entered.set()
        return {"log": ["entered"]}

    app.register(chain(("enter", enter)), name="g")
    async with app.worker():
        await idle(app)
        entered.clear()
        submitting = asyncio.create_task(_submit(app))
        while not the_worker(app)._offered:  # noqa: ASYNC110 -- it tells nobody
            await asyncio.sleep(0)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await entered.wait()
        assert (await app.wait("r")).status is RunStatus.SUCCEEDED
    assert together(await app.list_events("r"), BEGUN)


async def _submit(app: AgentFlow) -> None:
    await app.submit("g", {}, run_id="r")


async def test_submission_of_another_thread_is_left_to_claims(app: AgentFlow) -> None:
    """A worker drives in its own event loop."""
    app.register(chain(("ask", ask)), name="g")

    def elsewhere() -> str:
        return asyncio.run(_id_of_submission(app))

    async with app.worker():
        await idle(app)
        run_id = await asyncio.to_thread(elsewhere)
        await app.wait(run_id, until="parked")
    assert not together(await app.list_events(run_id), BEGUN)


async def _id_of_submission(app: AgentFlow) -> str:
    return (await app.submit("g", {})).id


_CALLER: ContextVar[str] = ContextVar("caller", default="nobody")


async def test_run_does_not_begin_in_the_context_of_who_submits_it(app: AgentFlow) -> None:
    seen: list[tuple[str, AttemptControl | None]] = []

    async def outer(state: State) -> State:
        _CALLER.set("outer")
        await (await app.submit("g", {})).result()
        return {"log": ["outer"]}

    async def inner(state: State) -> State:
        seen.append((_CALLER.get(), current_attempt()))
        return {"log": ["inner"]}

    app.register(chain(("inner", inner)), name="g")
    app.register(chain(("outer", outer)), name="outer")
    async with app.worker():
        await idle(app)
        handle = await app.submit("outer", {})
        await handle.result()
    (_, first), (caller, second) = seen
    assert caller == "nobody"
    assert first is not second
