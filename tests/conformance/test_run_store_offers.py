"""The run store: runs that are claimed in the transaction that makes them due, on each database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentflow.errors import AlreadyResolvedError, IdempotencyConflictError, LeaseLostError
from agentflow.storage import Claimant, Created, Resolved, RunStore
from agentflow.types import Decision, RunStatus
from tests.conformance.runs import (
    FAILURE,
    GRAPHS,
    LEASE,
    REQUEST,
    claim,
    claim_all,
    create,
    finish,
    open_store,
    park,
    question,
    running,
    spec,
    types_of_events,
)

TAKER = Claimant(
    worker="w", instance="w-1", lease=LEASE, queues=["default"], graphs=frozenset(GRAPHS)
)


async def offer(store: RunStore, run_id: str = "r", **changes: Any) -> Created:
    """Submit a run for somebody who takes it."""
    return await store.create_run("", spec(run_id, **changes), on_existing="return", claimant=TAKER)


async def decide(store: RunStore, wait_id: str) -> Resolved:
    """Answer a question for somebody who goes on with the run."""
    return await store.resolve_wait(
        "",
        wait_id,
        Decision(type="approve"),
        by="ada",
        comment=None,
        version=None,
        idempotency_key=None,
        request=REQUEST,
        claimant=TAKER,
    )


async def test_submission_is_claimed_in_its_own_transaction(store: RunStore) -> None:
    created = await offer(store)
    assert created.is_new
    assert created.claimed is not None
    assert created.run == created.claimed.run
    assert created.run.status is RunStatus.RUNNING
    assert (created.run.attempt, created.run.claims) == (1, 1)
    assert (created.claimed.reason, created.claimed.started) == ("start", None)
    assert await store.get_run("", "r") == created.run
    log = await store.list_events("", "r", after=0, limit=10)
    assert [event.type for event in log] == ["run.submitted", "run.claimed"]
    assert len({event.at for event in log}) == 1
    assert await claim_all(store) == []
    await finish(store, created.claimed.lease)
    assert (await store.get_run("", "r")).status is RunStatus.SUCCEEDED


async def test_decision_hands_its_run_on_with_all_that_it_has_asked(store: RunStore) -> None:
    asked = question()
    held = await running(store, "r")
    await park(store, held, asked)
    resolved = await decide(store, asked.wait_id)
    assert resolved.claimed is not None
    assert resolved.claimed.reason == "approval"
    assert resolved.claimed.lease.token > held.token
    assert resolved.claimed.waits == (resolved.approval,)
    assert resolved.approval == await store.get_wait("", asked.wait_id)
    assert (await store.get_run("", "r")).status is RunStatus.RUNNING
    assert (await types_of_events(store, "r"))[-2:] == ["approval.resolved", "run.claimed"]
    with pytest.raises(LeaseLostError):
        await finish(store, held)
    await finish(store, resolved.claimed.lease)


async def test_run_that_has_asked_much_is_handed_on_without_it(store: RunStore) -> None:
    asked = [question(position) for position in range(30)]
    await park(store, await running(store, "r"), *asked)
    resolved = await decide(store, asked[25].wait_id)
    assert resolved.approval.id == asked[25].wait_id
    assert resolved.claimed is not None
    assert resolved.claimed.waits is None


async def nothing(store: RunStore) -> None:
    del store


async def pause_queue(store: RunStore) -> None:
    await store.pause("", "queue", "default", reason=None, by=None)


async def pause_graph(store: RunStore) -> None:
    await store.pause("", "graph", "g", reason=None, by=None)


async def pause_all(store: RunStore) -> None:
    await store.pause("", "all", "", reason=None, by=None)


async def occupy(store: RunStore) -> None:
    await create(store, "before", thread_id="r")


async def wait_before(store: RunStore) -> None:
    await park(store, await running(store, "before", thread_id="r"), question())


IN_THE_WAY: dict[str, tuple[Callable[[RunStore], Awaitable[None]], dict[str, Any]]] = {
    "later": (nothing, {"start_at": datetime.now(UTC) + timedelta(hours=1)}),
    "another queue": (nothing, {"queue": "slow"}),
    "another graph": (nothing, {"graph": "h"}),
    "another version": (nothing, {"version": "2"}),
    "queue paused": (pause_queue, {}),
    "graph paused": (pause_graph, {}),
    "all paused": (pause_all, {}),
    "thread busy": (occupy, {}),
    "thread waits": (wait_before, {}),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
async def test_what_is_not_due_for_the_claimant_is_queued(store: RunStore, what: str) -> None:
    prepare, changes = IN_THE_WAY[what]
    await prepare(store)
    created = await offer(store, **changes)
    assert created.claimed is None
    assert created.is_new
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED
    assert await types_of_events(store, "r") == ["run.submitted"]


@pytest.mark.parametrize("pause", [pause_queue, pause_graph, pause_all])
async def test_decision_about_what_is_paused_only_queues_it(
    store: RunStore, pause: Callable[[RunStore], Awaitable[None]]
) -> None:
    asked = question()
    await park(store, await running(store, "r"), asked)
    await pause(store)
    assert (await decide(store, asked.wait_id)).claimed is None
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED


async def test_run_that_is_paused_itself_is_only_queued_by_a_decision(store: RunStore) -> None:
    asked = question()
    await park(store, await running(store, "r"), asked)
    await store.pause_run("", "r", reason=None, by=None)
    assert (await decide(store, asked.wait_id)).claimed is None
    await store.resume_run("", "r", by=None)
    assert [each.run.id for each in await claim_all(store)] == ["r"]


async def test_run_behind_an_older_one_is_only_queued_by_a_decision(store: RunStore) -> None:
    """The older one was in the dead letter when this one began, and was queued again since."""
    old = await running(store, "old", thread_id="t")
    await store.fail_run(old, FAILURE, reason="exhausted", checkpoint_id="c", step=1)
    asked = question()
    await park(store, await running(store, "r", thread_id="t"), asked)
    await store.requeue_dead_letter("", "old", checkpoint_id=None, by=None)
    assert (await decide(store, asked.wait_id)).claimed is None
    assert [each.run.id for each in await claim_all(store)] == ["old"]


async def test_offer_of_a_run_that_is_known_changes_nothing(store: RunStore) -> None:
    first = await offer(store)
    again = await offer(store)
    assert (again.is_new, again.claimed) == (False, None)
    assert first.claimed is not None
    await finish(store, first.claimed.lease)
    ended = await offer(store)
    assert (ended.is_new, ended.claimed, ended.run.status) == (False, None, RunStatus.SUCCEEDED)
    with pytest.raises(IdempotencyConflictError):
        await offer(store, thread_id="another")
    assert await types_of_events(store, "r") == ["run.submitted", "run.claimed", "run.succeeded"]


async def test_of_two_runs_offered_for_one_thread_at_once_one_is_claimed(
    store: RunStore, database_url: str
) -> None:
    """By stores that each have a writer of their own, as two processes have."""
    other = open_store(database_url)
    for i in range(20):
        both = [
            offer(each, f"{i}{name}", thread_id=f"t{i}")
            for each, name in zip([store, other], "ab", strict=True)
        ]
        created = await asyncio.gather(*both)
        assert sorted(each.claimed is not None for each in created) == [False, True]
    await other.close()


async def test_one_run_offered_by_two_at_once_is_stored_and_claimed_once(
    store: RunStore, database_url: str
) -> None:
    other = open_store(database_url)
    for i in range(20):
        created = await asyncio.gather(offer(store, f"r{i}"), offer(other, f"r{i}"))
        assert sorted(each.is_new for each in created) == [False, True]
        assert all(each.is_new == (each.claimed is not None) for each in created)
    await other.close()


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback", "reject"])
async def test_who_stops_others_is_queued_behind_them(store: RunStore, on_busy: Any) -> None:
    created = await store.create_run(
        "", spec("r"), on_existing="return", on_busy=on_busy, claimant=TAKER
    )
    assert created.claimed is None
    assert [each.run.id for each in await claim_all(store)] == ["r"]


async def test_second_decision_claims_nothing(store: RunStore) -> None:
    asked = question()
    await park(store, await running(store, "r"), asked)
    await decide(store, asked.wait_id)
    with pytest.raises(AlreadyResolvedError):
        await decide(store, asked.wait_id)
    claimed = await store.get_run("", "r")
    assert claimed.claims == 2


async def test_tokens_go_on_from_those_of_offers(store: RunStore) -> None:
    created = await offer(store)
    assert created.claimed is not None
    given = created.claimed.lease
    await store.release_run(given, reason="drain", counts=True, delay=timedelta())
    assert (await claim(store, "r")).token > given.token
