"""The run store: dead letters, on each database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentflow.errors import InvalidInputError, NotDeadLetterError, NotFoundError
from agentflow.storage import RunStore
from agentflow.types import Run, RunStatus
from tests.conformance.runs import (
    FAILURE,
    bring_to,
    claim,
    claim_all,
    finish,
    open_store,
    running,
    spec,
    types_of_events,
)

F, Q = RunStatus.FAILED, RunStatus.QUEUED


async def failed(store: RunStore, run_id: str, reason: str = "exhausted", **changes: Any) -> None:
    """Store a run and fail it."""
    lease = await running(store, run_id, **changes)
    await store.fail_run(lease, FAILURE, reason=reason, checkpoint_id="c3", step=3)


async def requeue(store: RunStore, run_id: str, checkpoint_id: str | None = None) -> Run:
    """Requeue a dead letter."""
    return await store.requeue_dead_letter("", run_id, checkpoint_id=checkpoint_id, by="ada")


async def test_dead_letter_keeps_what_is_needed_to_judge(store: RunStore) -> None:
    await failed(store, "r", thread_id="t")
    (letter,) = (await page(store)).items
    assert letter == await store.find_dead_letter("", "r")
    assert (letter.run_id, letter.thread_id, letter.graph, letter.version) == ("r", "t", "g", "1")
    assert (letter.reason, letter.cause, letter.attempts, letter.claims) == (
        "exhausted",
        FAILURE,
        1,
        1,
    )
    assert (letter.checkpoint_id, letter.step) == ("c3", 3)


async def page(store: RunStore, **changes: Any) -> Any:
    """List dead letters."""
    options: dict[str, Any] = {"graph": None, "reason": None, "limit": 99, "cursor": None}
    return await store.list_dead_letters("", **(options | changes))


async def test_dead_letters_are_listed_newest_first_in_pages(store: RunStore) -> None:
    for number in range(5):
        await failed(store, f"r{number}", "deadline" if number == 2 else "exhausted")
    found: list[str] = []
    cursor = None
    while True:
        part = await page(store, limit=2, cursor=cursor)
        found += [letter.run_id for letter in part.items]
        if (cursor := part.cursor) is None:
            break
    assert found == ["r4", "r3", "r2", "r1", "r0"]
    assert [x.run_id for x in (await page(store, reason="deadline")).items] == ["r2"]
    assert (await page(store, graph="h")).items == ()
    assert (
        await store.list_dead_letters("acme", graph=None, reason=None, limit=9, cursor=None)
    ).items == ()
    for cursor in ("x", "1/2", "2026-01-01T00:00:00/r"):
        with pytest.raises(InvalidInputError, match="cursor"):
            await page(store, cursor=cursor)


async def test_requeue_works_exactly_once(store: RunStore, database_url: str) -> None:
    await failed(store, "r")
    others = [open_store(database_url) for _ in range(3)]
    outcomes = await asyncio.gather(
        *(requeue(each, "r") for each in [store, *others]), return_exceptions=True
    )
    assert sum(isinstance(each, Run) for each in outcomes) == 1
    assert sum(isinstance(each, NotDeadLetterError) for each in outcomes) == 3
    (claimed,) = await claim_all(store)
    assert (claimed.reason, claimed.run.attempt, claimed.run.claims) == ("requeue", 1, 2)
    assert claimed.run.resume_from is None, "from where it failed"
    assert (await types_of_events(store, "r")).count("run.requeued") == 1
    for other in others:
        await other.close()


@pytest.mark.parametrize("status", [each for each in RunStatus if each is not F])
async def test_run_that_is_not_dead_is_neither_requeued_nor_discarded(
    store: RunStore, status: RunStatus
) -> None:
    await bring_to(store, status, "r")
    before = await store.get_run("", "r")
    for call in (
        requeue(store, "r"),
        store.discard_dead_letter("", "r", reason=None, by=None),
    ):
        with pytest.raises(NotDeadLetterError, match=f"'r' has no dead letter: it is {status}"):
            await call
    assert await store.get_run("", "r") == before
    for call in (
        requeue(store, "none"),
        store.discard_dead_letter("", "none", reason=None, by=None),
    ):
        with pytest.raises(NotFoundError):
            await call


async def test_chosen_checkpoint_is_told_until_an_attempt_has_begun_there(store: RunStore) -> None:
    await failed(store, "r")
    assert (await requeue(store, "r", "c1")).resume_from == "c1"
    for _ in range(2):
        (claimed,) = await claim_all(store)
        assert claimed.run.resume_from == "c1"
        await store.release_run(claimed.lease, reason="drain", counts=False)
    lease = await claim(store, "r")
    await store.start_attempt(
        lease, progress="p", reason="requeue", checkpoint_id="c9", step=1, traceparent=None
    )
    assert (await store.get_run("", "r")).resume_from is None


async def test_run_whose_thread_went_on_is_requeued_from_its_own_state(store: RunStore) -> None:
    await failed(store, "r", thread_id="t")
    await finish(store, await running(store, "next", thread_id="t"))
    assert (await requeue(store, "r")).resume_from == "c3"


async def test_discarded_run_stays_failed(store: RunStore) -> None:
    await failed(store, "r")
    run = await store.discard_dead_letter("", "r", reason="a test", by="ada")
    assert (run.status, run.dead_letter, run.error) == (F, False, FAILURE)
    assert await store.find_dead_letter("", "r") is None
    with pytest.raises(NotDeadLetterError):
        await requeue(store, "r")
    event = (await store.list_events("", "r", after=0, limit=99))[-1]
    assert (event.type, event.data) == (
        "dead_letter.discarded",
        {"reason": "a test", "by": "ada"},
    )
    again, *_ = await store.create_run("", spec("r"), on_existing="restart_if_failed")
    assert again.status is Q
