"""The run store: questions, and decisions that are taken once, on each database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentflow.errors import (
    AlreadyResolvedError,
    IdempotencyConflictError,
    LeaseLostError,
    SerializationError,
    SupersededError,
    VersionChangedError,
)
from agentflow.storage import RunStore
from agentflow.types import Approval, Decision, RunStatus, WaitStatus
from tests.conformance.runs import (
    FAILURE,
    REQUEST,
    claim,
    claim_all,
    finish,
    open_store,
    park,
    parked,
    question,
    resolve,
    running,
    spec,
    types_of_events,
)


async def waits(store: RunStore, **wanted: Any) -> list[Approval]:
    """List waits."""
    options: dict[str, Any] = {"status": None, "run_id": None, "graph": None, "cursor": None}
    page = await store.list_waits("", **({"limit": 99} | options | wanted))
    return list(page.items)


async def test_parked_run_shows_its_questions_and_holds_no_lease(store: RunStore) -> None:
    (wait_id,) = await parked(store, "r")
    run, wait = await store.get_run("", "r"), await store.get_wait("", wait_id)
    assert (run.status, run.attempt, run.checkpoint_id, run.step) == ("waiting", 0, "c1", 1)
    assert (wait.run_id, wait.status, wait.version, wait.request) == ("r", "pending", 1, REQUEST)
    assert await claim_all(store) == []
    assert (await types_of_events(store, "r"))[-2:] == ["approval.requested", "run.parked"]


async def test_resolved_question_queues_its_run(store: RunStore) -> None:
    (wait_id,) = await parked(store, "r")
    decision = Decision(type="edit", value={"amount": 4}, message="less")
    stored = await resolve(store, wait_id, decision, by="ada", comment="too much")
    assert (stored.status, stored.decision, stored.decided_by) == ("resolved", decision, "ada")
    assert stored.comment == "too much"
    assert stored.decided_at is not None
    assert stored == await store.get_wait("", wait_id)
    (claimed,) = await claim_all(store)
    assert claimed.reason == "approval"
    event = next(
        e
        for e in await store.list_events("", "r", after=0, limit=99)
        if e.type == "approval.resolved"
    )
    assert (event.data["by"], event.data["decision"]) == ("ada", "edit")
    assert event.data["proposal_hash"] == stored.proposal_hash
    assert "value" not in event.data


async def test_one_of_many_concurrent_deciders_wins(store: RunStore, database_url: str) -> None:
    (wait_id,) = await parked(store, "r")
    others = [open_store(database_url) for _ in range(4)]
    outcomes = await asyncio.gather(
        *(
            resolve(others[i % 4], wait_id, "approve" if i % 2 else "reject", by=f"p{i}")
            for i in range(20)
        ),
        return_exceptions=True,
    )
    won = [each for each in outcomes if isinstance(each, Approval)]
    lost = [each for each in outcomes if isinstance(each, AlreadyResolvedError)]
    assert (len(won), len(lost)) == (1, 19)
    assert {error.by for error in lost} == {won[0].decided_by}
    assert won[0].decision is not None
    assert {error.decision for error in lost} == {won[0].decision.type}
    assert await store.get_wait("", wait_id) == won[0]
    assert (await types_of_events(store, "r")).count("approval.resolved") == 1
    for other in others:
        await other.close()


async def test_repeated_decision_under_its_key_gives_the_stored_result(store: RunStore) -> None:
    first, second = await parked(store, "r", question(0), question(1))
    stored = await resolve(store, first, "approve", idempotency_key="k")
    assert await resolve(store, first, "approve", idempotency_key="k", by="bob") == stored
    with pytest.raises(IdempotencyConflictError):
        await resolve(store, first, "reject", idempotency_key="k")
    for key in (None, "other"):
        with pytest.raises(AlreadyResolvedError, match="'approve' by 'ada'"):
            await resolve(store, first, "approve", idempotency_key=key)
    await resolve(store, second)
    with pytest.raises(AlreadyResolvedError):
        await resolve(store, second)
    assert (await types_of_events(store, "r")).count("approval.resolved") == 2


async def test_decision_on_what_was_not_shown_is_refused(store: RunStore) -> None:
    (wait_id,) = await parked(store, "r")
    shown: Any = REQUEST
    with pytest.raises(VersionChangedError):
        await resolve(store, wait_id, version=2)
    with pytest.raises(VersionChangedError):
        await resolve(store, wait_id, request=type(shown)(**{**_fields(shown), "proposal": {}}))
    assert (await store.get_wait("", wait_id)).status is WaitStatus.PENDING
    assert (await store.get_run("", "r")).status is RunStatus.WAITING
    await resolve(store, wait_id, version=1)


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


async def test_unstorable_decision_changes_nothing(store: RunStore) -> None:
    (wait_id,) = await parked(store, "r")
    with pytest.raises(SerializationError):
        await resolve(store, wait_id, Decision(type="edit", value=object()))
    assert (await store.get_wait("", wait_id)).status is WaitStatus.PENDING
    assert (await types_of_events(store, "r"))[-1] == "run.parked"


async def test_known_question_is_kept_and_one_not_asked_any_more_is_superseded(
    store: RunStore,
) -> None:
    kept, dropped, answered = await parked(store, "r", question(0), question(1), question(2))
    await resolve(store, answered)
    lease = await claim(store, "r")
    # The same questions under new ids: what counts is namespace, interrupt and checkpoint.
    await park(store, lease, question(0), question(3))
    states = {wait.id: wait.status for wait in await waits(store, run_id="r")}
    new = states.keys() - {kept, dropped, answered}
    assert len(new) == 1
    assert states[kept] == states[new.pop()] == "pending"
    assert (states[dropped], states[answered]) == ("superseded", "resolved")
    log = await types_of_events(store, "r")
    assert log.count("approval.requested") == 4
    assert log.count("approval.superseded") == 1
    with pytest.raises(SupersededError):
        await resolve(store, dropped)


async def test_same_question_in_another_place_is_another_question(store: RunStore) -> None:
    await parked(
        store,
        "r",
        question(0),
        question(0, ns="child:1"),
        question(0, checkpoint_id="c2"),
        question(1),
    )
    assert len(await waits(store, run_id="r")) == 4


async def test_decision_while_the_run_is_driven_is_not_lost(store: RunStore) -> None:
    first, second = await parked(store, "r", question(0), question(1))
    await resolve(store, first)
    lease = await claim(store, "r")
    await resolve(store, second)
    assert (await store.get_run("", "r")).status is RunStatus.RUNNING
    # The drive had only the first answer: it comes back asking the second.
    await park(store, lease, question(1))
    (claimed,) = await claim_all(store)
    assert claimed.reason == "approval"


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
async def test_pending_questions_end_with_their_run(store: RunStore, end: str) -> None:
    answered, pending = await parked(store, "r", question(0), question(1))
    await resolve(store, answered)
    lease = await claim(store, "r")
    if end == "finish":
        await finish(store, lease)
    elif end == "fail":
        await store.fail_run(lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None)
    else:
        await store.finish_cancel(lease)
    states = {wait.id: wait.status for wait in await waits(store, run_id="r")}
    assert states[answered] == "resolved"
    assert states[pending] == ("superseded" if end == "finish" else "withdrawn")


async def test_questions_are_listed_oldest_first_by_status_run_and_graph(store: RunStore) -> None:
    first = await parked(store, "a", *(question(i) for i in range(3)))
    await store.create_run("", spec("b", graph="h"), on_existing="return")
    await park(store, await claim(store, "b"), other := question())
    assert [wait.id for wait in await waits(store)] == [*first, other.wait_id]
    assert [wait.id for wait in await waits(store, graph="h")] == [other.wait_id]
    assert [wait.id for wait in await waits(store, run_id="a")] == first
    await resolve(store, first[1])
    pending = await waits(store, status=WaitStatus.PENDING)
    assert [wait.id for wait in pending] == [first[0], first[2], other.wait_id]
    page = await store.list_waits("", status=None, run_id=None, graph=None, limit=3, cursor=None)
    rest = await waits(store, cursor=page.cursor)
    assert ([w.id for w in page.items], [w.id for w in rest]) == (first, [other.wait_id])


async def test_stale_worker_cannot_ask(store: RunStore) -> None:
    stale = await running(store, "r")
    await store.release_run(stale, reason="drain", counts=False)
    await claim(store, "r")

    with pytest.raises(LeaseLostError):
        await park(store, stale, question())
    assert await waits(store) == []
