"""The run store: decisions that are taken back, on each database."""

from __future__ import annotations

import pytest

from agentflow.errors import ConflictError, LeaseLostError, NotFoundError, ThreadBusyError
from agentflow.storage import RunStore
from agentflow.types import Approval, ClaimedRun, RunStatus
from tests.conformance.runs import (
    FAILURE,
    LEASE,
    claim,
    finish,
    park,
    parked,
    question,
    resolve,
    running,
    types_of_events,
)


async def take(store: RunStore, wait_id: str) -> ClaimedRun:
    """Claim a run in order to take a decision back."""
    return await store.claim_reopening("", wait_id, worker="m", lease=LEASE, by="bob")


async def test_reopened_wait_is_pending_again_and_its_run_queued(store: RunStore) -> None:
    (first,) = await parked(store, "r")
    await resolve(store, first, idempotency_key="k")
    lease = await claim(store, "r")
    later = question(0, interrupt_id="e" * 32, answers_recorded=1)
    other = question(1)
    await park(store, lease, later, other)
    held = await take(store, first)
    assert (await store.get_run("", "r")).paused_at is not None, "nobody goes on meanwhile"
    opened = await store.reopen_wait(held.lease, first, by="bob", comment="oops")
    assert (opened.status, opened.version, opened.decision) == ("pending", 2, None)
    assert opened.decided_by is None
    run = await store.get_run("", "r")
    assert (run.status, run.paused_at) == (RunStatus.QUEUED, None)
    assert (await store.get_wait("", later.wait_id)).status == "superseded"
    assert (await store.get_wait("", other.wait_id)).status == "pending", "of another task"
    assert (await types_of_events(store, "r"))[-2:] == ["approval.reopened", "approval.superseded"]
    # The same question has the same place, and takes another answer.
    again = await claim(store, "r")
    await park(store, again, question(0, wait_id="x"), other)
    assert {each.id for each in (await waits(store)) if each.status == "pending"} == {
        first,
        other.wait_id,
    }
    await resolve(store, first, "reject", idempotency_key="k")


async def waits(store: RunStore) -> list[Approval]:
    page = await store.list_waits("", status=None, run_id="r", graph=None, limit=10, cursor=None)
    return list(page.items)


async def test_run_in_the_dead_letter_leaves_it(store: RunStore) -> None:
    (first,) = await parked(store, "r")
    await resolve(store, first)
    await store.fail_run(
        await claim(store, "r"), FAILURE, reason="exhausted", checkpoint_id=None, step=None
    )
    held = await take(store, first)
    await store.reopen_wait(held.lease, first, by="bob", comment=None)
    assert await store.find_dead_letter("", "r") is None
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED
    assert "run.requeued" in await types_of_events(store, "r")


async def test_run_that_was_paused_before_stays_so(store: RunStore) -> None:
    (first,) = await parked(store, "r")
    await resolve(store, first)
    await store.pause_run("", "r", reason=None, by="ada")
    held = await take(store, first)
    await store.reopen_wait(held.lease, first, by="bob", comment=None)
    assert (await store.get_run("", "r")).paused_at is not None


async def test_what_cannot_be_reopened_is_refused(store: RunStore) -> None:
    with pytest.raises(NotFoundError):
        await take(store, "nope")
    (pending,) = await parked(store, "r")
    with pytest.raises(ConflictError, match="nothing to reopen"):
        await take(store, pending)
    await resolve(store, pending)
    lease = await claim(store, "r")
    with pytest.raises(ThreadBusyError):
        await take(store, pending)
    await finish(store, lease)
    with pytest.raises(ConflictError, match="fork it"):
        await take(store, pending)
    (budget,) = await parked(store, "b", question(kind="budget"))
    await resolve(store, budget)
    with pytest.raises(ConflictError, match="on record"):
        await take(store, budget)
    stale = await running(store, "s")
    await finish(store, stale)
    with pytest.raises(LeaseLostError):
        await store.reopen_wait(stale, pending, by="bob", comment=None)
