"""The run store: fingerprints, routes, migrations and moved runs, on each database."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow.database.tables import workers
from agentflow.errors import (
    ConflictError,
    InvalidInputError,
    LeaseLostError,
    NotFoundError,
    ThreadBusyError,
)
from agentflow.storage import RunStore
from agentflow.types import (
    ClaimedRun,
    Lease,
    MovedWait,
    NewWait,
    Run,
    RunStatus,
    WaitStatus,
    WorkerReport,
)
from agentflow.versions import Fingerprint
from tests.conformance.runs import (
    FAILURE,
    LEASE,
    bring_to,
    claim,
    create,
    finish,
    open_store,
    park,
    parked,
    question,
    resolve,
    running,
    types_of_events,
)
from tests.golden import versions_v1


async def take(store: RunStore, run_id: str) -> ClaimedRun:
    """Claim a run in order to migrate it."""
    claimed = await store.claim_migration("", run_id, worker="m", lease=LEASE)
    assert claimed is not None
    return claimed


async def migrate(store: RunStore, lease: Lease, *waits: MovedWait, **changes: Any) -> Run:
    """Migrate a run that was taken."""
    options: dict[str, Any] = {
        "version": "2",
        "fingerprint": "f2",
        "checkpoint_id": "c2",
        "has_work": False,
        "by": "ada",
    }
    return await store.migrate_run(lease, waits=waits, **(options | changes))


def moved(wait: NewWait) -> MovedWait:
    """Ask a question under other ids."""
    return MovedWait(
        wait_id=wait.wait_id, ns="n", task_id="new", interrupt_id="f" * 32, checkpoint_id="c2"
    )


async def test_fingerprint_is_stored_once_and_found_by_its_tenant(store: RunStore) -> None:
    await store.create_fingerprint("", "d", "g", "form")
    await store.create_fingerprint("", "d", "g", "another form")
    assert await store.find_fingerprint("", "d") == "form"
    assert await store.find_fingerprint("", "e") is None
    assert await store.find_fingerprint("other", "d") is None


async def test_attempt_notes_its_graph_before_it_begins(store: RunStore) -> None:
    lease = await running(store, "r")
    at: dict[str, Any] = {"checkpoint_id": "c", "step": 1, "traceparent": None}
    await store.start_attempt(
        lease, progress="p", reason="retry", fingerprint="f", graph_changed={"from": "e"}, **at
    )
    assert (await store.get_run("", "r")).fingerprint == "f"
    assert (await types_of_events(store, "r"))[-2:] == ["run.graph_changed", "run.resumed"]
    await store.start_attempt(lease, progress="p", reason="retry", **at)
    assert (await store.get_run("", "r")).fingerprint == "f"


async def test_routes_of_a_graph_are_at_most_everything(store: RunStore) -> None:
    await store.route_graph("", "g", "2", 0.25, by="ada")
    await store.route_graph("", "h", "1", 1, by=None)
    with pytest.raises(InvalidInputError, match="more than 1"):
        await store.route_graph("", "g", "3", 0.8, by=None)
    routes = await store.route_graph("", "g", "3", 0.75, by=None)
    assert [(route.version, route.share, route.by) for route in routes] == [
        ("2", 0.25, "ada"),
        ("3", 0.75, None),
    ]
    routes = await store.route_graph("", "g", "2", None, by="bob")
    assert [route.version for route in routes] == ["3"]
    assert len(await store.list_routes("", None)) == 2
    assert await store.list_routes("other", None) == ()
    for version, share in {"1": 0.05, "2": 0.55, "3": 0.3, "4": 0.1}.items():
        await store.route_graph("acme", "g", version, share, by=None)
    log = await store.list_events("", "", after=0, limit=100)
    assert [event.type for event in log] == ["graph.routed"] * 4
    assert log[-1].data == {"graph": "g", "version": "2", "share": None, "by": "bob"}


async def test_only_a_run_that_nobody_drives_is_taken_for_migration(store: RunStore) -> None:
    await bring_to(store, RunStatus.SUCCEEDED, "ended")
    assert await store.claim_migration("", "ended", worker="m", lease=LEASE) is None
    lease = await running(store, "driven")
    with pytest.raises(ThreadBusyError):
        await take(store, "driven")
    await finish(store, lease)
    await create(store, "first", thread_id="t")
    await create(store, "second", thread_id="t")
    with pytest.raises(ThreadBusyError):
        await take(store, "second")
    await create(store, "paused")
    await store.pause_run("", "paused", reason=None, by=None)
    assert (await take(store, "paused")).run.status is RunStatus.RUNNING
    with pytest.raises(NotFoundError):
        await take(store, "unknown")


@pytest.mark.parametrize(
    ("is_answered", "has_work", "status"),
    [
        (False, False, RunStatus.WAITING),
        (True, False, RunStatus.QUEUED),
        (False, True, RunStatus.QUEUED),
    ],
)
async def test_migrated_run_waits_for_what_it_asks_under_new_ids(
    store: RunStore, is_answered: bool, has_work: bool, status: RunStatus
) -> None:
    kept, gone = question(0), question(1)
    await parked(store, "r", kept, gone)
    claimed = await take(store, "r")
    if is_answered:
        # Meanwhile; nobody is told to drive it now.
        await resolve(store, kept.wait_id)
    run = await migrate(store, claimed.lease, moved(kept), has_work=has_work)
    assert (run.status, run.version, run.fingerprint) == (status, "2", "f2")
    assert (run.checkpoint_id, run.attempt, run.losses) == ("c2", 0, 0)
    wait = await store.get_wait("", kept.wait_id)
    assert (wait.ns, wait.task_id) == ("n", "new")
    assert (wait.interrupt_id, wait.checkpoint_id) == ("f" * 32, "c2")
    assert (await store.get_wait("", gone.wait_id)).status is WaitStatus.SUPERSEDED
    assert (await types_of_events(store, "r"))[-2:] == ["approval.superseded", "run.migrated"]
    with pytest.raises(LeaseLostError):
        await migrate(store, claimed.lease)
    if not is_answered and not has_work:
        await resolve(store, kept.wait_id)
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED


async def test_migration_ends_the_pause_for_its_reason_and_no_other(store: RunStore) -> None:
    for run_id, reason in (("a", "incompatible"), ("b", "exhausted")):
        lease = await running(store, run_id)
        await store.pause_failed_run(lease, FAILURE, reason=reason, checkpoint_id="c", step=1)
    assert (await store.survey("")).incompatible == 1
    runs = [await migrate(store, (await take(store, each)).lease) for each in ("a", "b")]
    assert [run.paused_at is None for run in runs] == [True, False]
    assert [run.error is None for run in runs] == [True, False]
    assert (await store.survey("")).incompatible == 0


async def test_resumed_run_is_not_counted_as_incompatible(store: RunStore) -> None:
    lease = await running(store, "a")
    await store.pause_failed_run(lease, FAILURE, reason="incompatible", checkpoint_id="c", step=1)
    await store.resume_run("", "a", by=None)
    assert (await store.survey("")).incompatible == 0


async def test_run_moves_with_its_waits_and_events(store: RunStore, database_url: str) -> None:
    asked = question()
    form = versions_v1.FILE.read_text().strip()
    digest = Fingerprint.of_text(form, "golden").digest
    await store.create_fingerprint("", digest, "g", form)
    await parked(store, "r", asked)
    rows = await store.get_rows("", "r")
    other = open_store("memory://")
    try:
        imported = await other.import_run("", rows, by="ada", origin="x")
        assert imported == await store.get_run("", "r")
        before = await store.list_events("", "r", after=0, limit=100)
        after = await other.list_events("", "r", after=0, limit=100)
        assert after[:-1] == before
        assert after[-1].type == "run.imported"
        assert await other.find_fingerprint("", digest) == form
        await resolve(other, asked.wait_id)
        lease = await claim(other, "r")
        await finish(other, lease)
        with pytest.raises(ConflictError):
            await other.import_run("", rows, by=None, origin="x")
    finally:
        await other.close()


async def test_run_does_not_move_while_it_is_driven_or_onto_a_busy_thread(store: RunStore) -> None:
    with pytest.raises(NotFoundError):
        await store.get_rows("", "unknown")
    lease = await running(store, "r", thread_id="t")
    with pytest.raises(ConflictError, match="being driven"):
        await store.get_rows("", "r")
    await park(store, lease, question())
    rows = await store.get_rows("", "r")
    other = open_store("memory://")
    try:
        await create(other, "o", thread_id="t")
        with pytest.raises(ConflictError, match="unfinished runs"):
            await other.import_run("", rows, by=None, origin="x")
        with pytest.raises(NotFoundError):
            await other.get_run("", "r")
    finally:
        await other.close()


async def test_versions_that_have_runs_and_no_worker_are_told(store: RunStore) -> None:
    def report(instance: str, *versions: str) -> WorkerReport:
        return WorkerReport(
            instance=instance,
            name=instance,
            queues=("default",),
            graphs=tuple(("g", version) for version in versions),
            concurrency=1,
        )

    async def told() -> list[Any]:
        log = await store.list_events("", "", after=0, limit=100)
        return [event.data for event in log if event.type == "graph.stranded"]

    await create(store, "one")
    await create(store, "two", version="2")
    await store.beat_worker("", report("old", "1", "2"))
    assert await told() == []
    await store.beat_worker("", report("new", "2"))
    await store.beat_worker("", report("new", "2"))
    await store.remove_worker("", "old")
    first = {"graph": "g", "version": "1", "runs": 1}
    assert await told() == [first]
    await store.beat_worker("", report("next", "2"))
    assert await told() == [first, first]
    # Killed, the only one of its version does not say so itself; of all others one tells, once.
    await store.beat_worker("", report("killed", "1", "2"))
    await age(store, "killed", timedelta(seconds=50))
    await store.beat_worker("", report("new", "2"))
    assert await told() == [first, first]
    await age(store, "killed", timedelta(seconds=20))
    for instance in ("new", "next", "new"):
        await store.beat_worker("", report(instance, "2"))
    assert await told() == [first, first, first]
    silent = [w.report.name for w in await store.list_workers("") if w.report.health == "silent"]
    assert silent == ["killed"]
    # It was only stopped for a while.
    await store.beat_worker("", report("killed", "1", "2"))
    assert [w.report.health for w in await store.list_workers("")] == ["ok"] * 3


async def age(store: RunStore, instance: str, by: timedelta) -> None:
    """Let time pass in which a worker says nothing."""

    def change(connection: Any) -> None:
        own = workers.c.instance == instance
        beat_at = connection.execute(sa.select(workers.c.beat_at).where(own)).scalar_one()
        connection.execute(sa.update(workers).where(own).values(beat_at=beat_at - by))

    await store._database.write(change)  # type: ignore[attr-defined]
