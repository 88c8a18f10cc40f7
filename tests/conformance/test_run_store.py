"""The run store: the table of statuses, claims, leases and the audit log, on each database."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow.codec import Codec, context_of
from agentflow.database.engine import parse_url
from agentflow.database.tables import events
from agentflow.errors import (
    IdempotencyConflictError,
    IllegalTransitionError,
    InvalidInputError,
    LeaseLostError,
    NotFoundError,
    SupersededError,
    ThreadBusyError,
)
from agentflow.storage import RunStore
from agentflow.storage.rows import check_transition
from agentflow.types import Lease, RunStatus, WaitStatus
from tests.conformance.runs import (
    EXPIRED,
    FAILURE,
    LEASE,
    bring_to,
    claim,
    claim_all,
    create,
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

Q, R, W = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING
S, F, C = RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED

# design.md §2, the table of statuses.
LEGAL = {(Q, R), (Q, C), (R, W), (R, S), (R, F), (R, C), (R, Q), (W, Q), (W, F), (W, C), (F, Q)}


@pytest.mark.parametrize(("before", "after"), list(product(RunStatus, RunStatus)))
def test_only_the_changes_in_the_table_of_statuses_are_legal(
    before: RunStatus, after: RunStatus
) -> None:
    if (before, after) in LEGAL:
        check_transition("r", before, after)
    else:
        with pytest.raises(IllegalTransitionError, match=f"is {before}; it cannot become {after}"):
            check_transition("r", before, after)


Verb = Callable[[RunStore, Lease], Awaitable[Any]]


@dataclass(frozen=True)
class _Case:
    verb: Verb
    legal: dict[RunStatus, RunStatus]
    """What the run becomes, from each status that allows the verb."""
    refused: type[Exception] | None
    """What is raised from the others; `None` if the verb just does nothing."""


VERBS = {
    "claim": _Case(
        lambda store, lease: store.claim_run("", lease.run_id, worker="v", lease=LEASE),
        {Q: R},
        None,
    ),
    "park": _Case(lambda store, lease: park(store, lease, question(7)), {R: W}, LeaseLostError),
    "finish": _Case(finish, {R: S}, LeaseLostError),
    "retry": _Case(
        lambda store, lease: store.retry_run(
            lease, FAILURE, delay=LEASE, failures={}, checkpoint_id=None, step=None
        ),
        {R: Q},
        LeaseLostError,
    ),
    "fail": _Case(
        lambda store, lease: store.fail_run(
            lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None
        ),
        {R: F},
        LeaseLostError,
    ),
    "release": _Case(
        lambda store, lease: store.release_run(lease, reason="drain", counts=False),
        {R: Q},
        LeaseLostError,
    ),
    "finish_cancel": _Case(lambda store, lease: store.finish_cancel(lease), {R: C}, LeaseLostError),
    "cancel": _Case(
        lambda store, lease: store.cancel_run("", lease.run_id, reason=None, by=None),
        {Q: C, W: C, R: R, C: C},
        IllegalTransitionError,
    ),
    "requeue": _Case(
        lambda store, lease: store.create_run(
            "", spec(lease.run_id), on_existing="restart_if_failed"
        ),
        {F: Q},
        None,
    ),
}


@pytest.mark.parametrize("name", list(VERBS))
async def test_each_verb_changes_a_run_only_as_the_table_allows(store: RunStore, name: str) -> None:
    case = VERBS[name]
    for status in RunStatus:
        lease = await bring_to(store, status, f"r-{status}")
        run_id = lease.run_id
        if status in case.legal:
            await case.verb(store, lease)
            assert (await store.get_run("", run_id)).status is case.legal[status]
            continue
        before, log = await store.get_run("", run_id), await types_of_events(store, run_id)
        refused = ThreadBusyError if (name, status) == ("claim", R) else case.refused
        if refused is None:
            await case.verb(store, lease)
        else:
            with pytest.raises(refused):
                await case.verb(store, lease)
        assert await store.get_run("", run_id) == before
        assert await types_of_events(store, run_id) == log


async def test_created_run_is_there_for_another_process_at_once(
    store: RunStore, database_url: str
) -> None:
    made, is_new, _ = await store.create_run(
        "",
        spec(
            "r", input={"a": (1, 2)}, metadata={"m": 1}, config={"tags": ["t"]}, submitted_by="ada"
        ),
        on_existing="return",
    )
    assert is_new
    other = open_store(database_url)
    assert await other.get_run("", "r") == made
    await other.close()
    assert (made.status, made.input, made.metadata) == (Q, {"a": (1, 2)}, {"m": 1})
    assert (made.config, made.submitted_by, made.attempt) == ({"tags": ["t"]}, "ada", 0)
    assert made.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - made.created_at) < timedelta(minutes=1)
    assert await types_of_events(store, "r") == ["run.submitted"]


async def test_same_submission_again_gives_the_stored_run(store: RunStore) -> None:
    made, *_ = await store.create_run("", spec("r", input={"a": 1, "b": 2}), on_existing="return")
    again, is_new, _ = await store.create_run(
        "", spec("r", input={"b": 2, "a": 1}), on_existing="return"
    )
    assert (again, is_new) == (made, False)
    with pytest.raises(IdempotencyConflictError):
        await store.create_run("", spec("r", input={"a": 1, "b": 2}), on_existing="reject")
    assert await types_of_events(store, "r") == ["run.submitted"]


@pytest.mark.parametrize("on_existing", ["return", "reject", "restart_if_failed"])
async def test_known_id_with_other_content_is_a_conflict(store: RunStore, on_existing: Any) -> None:
    made = await create(store, "r")
    others: list[dict[str, Any]] = [
        {"graph": "h"},
        {"thread_id": "t2"},
        {"input": {"n": 2}},
        {"input": {"n": "1"}},
    ]
    for changes in others:
        with pytest.raises(IdempotencyConflictError, match="'r' exists with another"):
            await store.create_run("", spec("r", **changes), on_existing=on_existing)
    assert await store.get_run("", "r") == made


async def test_requeued_run_has_a_new_budget_and_no_dead_letter(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.fail_run(lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None)
    run, is_new, _ = await store.create_run("", spec("r"), on_existing="restart_if_failed")
    assert not is_new
    assert (run.status, run.attempt, run.dead_letter, run.ended_at) == (Q, 0, False, None)
    assert await store.find_dead_letter("", "r") is None
    (claimed,) = await claim_all(store)
    assert (claimed.reason, claimed.run.attempt, claimed.run.claims) == ("requeue", 1, 2)
    assert "run.requeued" in await types_of_events(store, "r")


async def test_concurrent_submissions_of_one_id_make_one_run(
    store: RunStore, database_url: str
) -> None:
    others = [open_store(database_url) for _ in range(3)]
    made = await asyncio.gather(
        *(
            each.create_run("", spec("r"), on_existing="return")
            for each in [store, *others]
            for _ in range(5)
        )
    )
    assert sorted(is_new for _, is_new, _ in made) == [False] * 19 + [True]
    assert await types_of_events(store, "r") == ["run.submitted"]
    for other in others:
        await other.close()


async def test_tenants_do_not_see_each_other(store: RunStore) -> None:
    for tenant in ("", "acme"):
        await store.create_run(tenant, spec("r", input={"t": tenant}), on_existing="return")
    assert (await store.get_run("acme", "r")).input == {"t": "acme"}
    (claimed,) = await claim_all(store)
    assert claimed.run.tenant == ""
    await park(store, claimed.lease, asked := question())
    with pytest.raises(NotFoundError):
        await store.get_wait("acme", asked.wait_id)
    options: dict[str, Any] = {"status": None, "graph": None, "limit": 9, "cursor": None}
    assert (await store.list_waits("acme", run_id=None, **options)).items == ()
    assert len((await store.list_runs("acme", thread_id=None, **options)).items) == 1
    assert len(await store.list_events("acme", "r", after=0, limit=9)) == 1


async def test_what_is_not_there_is_not_found(store: RunStore) -> None:
    for call in (
        store.get_run("", "none"),
        store.get_wait("", "none"),
        store.claim_run("", "none", worker="w", lease=LEASE),
        store.cancel_run("", "none", reason=None, by=None),
        resolve(store, "none"),
    ):
        with pytest.raises(NotFoundError, match="'none'"):
            await call
    assert await store.find_dead_letter("", "none") is None


async def test_runs_are_listed_newest_first_in_pages(store: RunStore) -> None:
    ids = [f"r{i}" for i in range(7)]
    for run_id in ids:
        await create(store, run_id)
    options: dict[str, Any] = {"status": None, "graph": None, "thread_id": None}
    seen, cursor = [], None
    while True:
        page = await store.list_runs("", limit=3, cursor=cursor, **options)
        seen.append([run.id for run in page.items])
        if (cursor := page.cursor) is None:
            break
    assert seen == [["r6", "r5", "r4"], ["r3", "r2", "r1"], ["r0"]]
    exact = await store.list_runs("", limit=7, cursor=None, **options)
    assert (len(exact.items), exact.cursor) == (7, None)
    with pytest.raises(InvalidInputError):
        await store.list_runs("", limit=3, cursor="junk", **options)


async def test_runs_are_listed_by_status_graph_and_thread(store: RunStore) -> None:
    await create(store, "a", thread_id="t")
    await create(store, "b", graph="h")
    await finish(store, await claim(store, "a"))

    async def ids(**wanted: Any) -> list[str]:
        options: dict[str, Any] = {"status": None, "graph": None, "thread_id": None} | wanted
        page = await store.list_runs("", limit=9, cursor=None, **options)
        return [run.id for run in page.items]

    assert await ids(status=S) == ["a"]
    assert await ids(graph="h") == ["b"]
    assert await ids(thread_id="t") == ["a"]
    assert await ids(status=Q, graph="g") == []


async def test_retried_run_waits_and_keeps_its_error(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.retry_run(
        lease, FAILURE, delay=timedelta(minutes=5), failures={}, checkpoint_id=None, step=None
    )
    run = await store.get_run("", "r")
    assert run.error == FAILURE
    assert timedelta(minutes=4) < run.available_at - datetime.now(UTC) < timedelta(minutes=6)
    assert await claim_all(store) == []


async def test_failed_run_and_its_dead_letter_come_together(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.fail_run(lease, FAILURE, reason="not_retryable", checkpoint_id=None, step=None)
    run, letter = await store.get_run("", "r"), await store.find_dead_letter("", "r")
    assert letter is not None
    assert (run.dead_letter, run.error, letter.cause) == (True, FAILURE, FAILURE)
    assert (letter.attempts, letter.claims) == (1, 1)
    assert run.ended_at == letter.at
    failed = (await store.list_events("", "r", after=0, limit=99))[-1]
    assert (failed.type, failed.data["reason"]) == ("run.failed", "not_retryable")
    assert "message" not in failed.data


async def test_finished_run_has_its_output(store: RunStore) -> None:
    lease = await running(store, "r")
    await finish(store, lease, {"total": (1, 2)})
    run = await store.get_run("", "r")
    assert (run.output, run.step, run.checkpoint_id) == ({"total": (1, 2)}, 9, "c9")
    assert run.ended_at is not None
    assert (await types_of_events(store, "r"))[-1] == "run.succeeded"


@pytest.mark.parametrize("verb", ["park", "retry", "release"])
async def test_requested_cancellation_is_honoured_where_the_run_would_go_on(
    store: RunStore, verb: str
) -> None:
    lease = await running(store, "r")
    for _ in range(2):
        asked = await store.cancel_run("", "r", reason="enough", by="ada")
        assert (asked.status, asked.cancel_requested_at is not None) == (R, True)
    await VERBS[verb].verb(store, lease)
    assert (await store.get_run("", "r")).status is C
    log = await types_of_events(store, "r")
    assert log.count("run.cancel_requested") == 1
    assert log[-1] == "run.cancelled"


async def test_expired_run_is_given_out_with_its_requested_cancellation(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.cancel_run("", "r", reason=None, by=None)
    await store.extend_leases([lease], EXPIRED)
    (claimed,) = await claim_all(store)
    assert claimed.run.cancel_requested_at is not None
    await store.finish_cancel(claimed.lease)
    assert (await store.get_run("", "r")).status is C


async def test_cancelled_waiting_run_withdraws_its_questions(store: RunStore) -> None:
    wait_id = (await parked(store, "r"))[0]
    await store.cancel_run("", "r", reason=None, by="ada")
    assert (await store.get_wait("", wait_id)).status is WaitStatus.WITHDRAWN
    with pytest.raises(SupersededError):
        await resolve(store, wait_id)
    assert (await types_of_events(store, "r"))[-2:] == ["approval.withdrawn", "run.cancelled"]


async def test_audit_log_is_gapless_and_its_hashes_recompute(
    store: RunStore, database_url: str
) -> None:
    wait_id = (await parked(store, "r"))[0]
    await resolve(store, wait_id)
    await finish(store, await claim(store, "r"))
    engine = sa.create_engine(parse_url(database_url))
    with engine.connect() as connection:
        rows = connection.execute(sa.select(events).order_by(events.c.seq)).all()
    engine.dispose()
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    previous = "0" * 64
    for row in rows:
        head = [previous, "", "r", str(row.seq), row.type, row.at.isoformat()]
        # Over the data before it is sealed, which another key does not change.
        data = Codec().unseal(row.data, context_of("events.data", "", "r", row.seq))
        sha = hashlib.sha256("\x1f".join(head).encode() + data)
        assert (row.prev_hash, row.hash) == (previous, sha.hexdigest())
        previous = row.hash


async def test_events_are_read_from_a_number_in_order(store: RunStore) -> None:
    await bring_to(store, W, "r")
    everything = await store.list_events("", "r", after=0, limit=99)
    assert [event.seq for event in everything] == [1, 2, 3, 4]
    assert await store.list_events("", "r", after=2, limit=1) == everything[2:3]
    assert await store.list_events("", "r", after=4, limit=9) == ()
    assert all(event.at.utcoffset() == timedelta(0) for event in everything)
