"""Fingerprints and routes of graphs, and a run on its way from one version to another."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_new, replace
from agentflow.database.tables import fingerprints, routes, waits
from agentflow.errors import InvalidInputError, ThreadBusyError
from agentflow.storage.attempts import supersede
from agentflow.storage.claims import take
from agentflow.storage.events import append_to_log, lock_log
from agentflow.storage.marks import GONE, mark, of_route, of_wait
from agentflow.storage.opening import Claimant
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import (
    CLEARED,
    INCOMPATIBLE,
    RELEASED,
    change_run,
    get_held_run,
    get_run,
    to_run,
)
from agentflow.storage.tokens import lock_thread
from agentflow.types import (
    ClaimedRun,
    Lease,
    MovedWait,
    NewEvent,
    Route,
    Run,
    RunStatus,
    WaitStatus,
)

_WHOLE = 1_000_000
_OF_ATTEMPTS = frozenset({"effect", "budget"})
"""Kinds of questions that no place in the graph asks, and that the next attempt finds again."""


def create_fingerprint(
    connection: Connection, payloads: Payloads, tenant: str, digest: str, graph: str, form: str
) -> None:
    """See `RunStore.create_fingerprint`."""
    row: dict[str, Any] = {"tenant": tenant, "digest": digest, "graph": graph}
    # Not redacted: it says what code is like, and is compared.
    body = payloads.serialize(form, fingerprints.c.form, row)
    row["form"] = payloads.seal(body, fingerprints.c.form, row)
    insert_new(connection, fingerprints, [{**row, "at": database_now(connection)}])


def find_fingerprint(
    connection: Connection, payloads: Payloads, tenant: str, digest: str
) -> str | None:
    """See `RunStore.find_fingerprint`."""
    query = sa.select(fingerprints).where(
        fingerprints.c.tenant == tenant, fingerprints.c.digest == digest
    )
    row = connection.execute(query).first()
    return None if row is None else str(payloads.load(fingerprints.c.form, row))


def route_graph(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    graph: str,
    version: str,
    share: float | None,
    *,
    by: str | None,
) -> tuple[Route, ...]:
    """See `RunStore.route_graph`."""
    now = database_now(connection)
    lock_log(connection, tenant)
    key = {"tenant": tenant, "graph": graph, "version": version}
    if share is None:
        is_it = [routes.c[name] == value for name, value in key.items()]
        connection.execute(sa.delete(routes).where(*is_it))
        left = GONE
    else:
        row = {**key, "share": round(share * _WHOLE), "at": now, "set_by": by}
        replace(connection, routes, [row])
        left = mark(routes, row)
    found = list_routes(connection, payloads, tenant, graph)
    if sum(round(each.share * _WHOLE) for each in found) > _WHOLE:
        raise InvalidInputError(
            "route", (f"share: those of graph {graph!r} would be more than 1 in all",)
        )
    event = NewEvent(
        type="graph.routed",
        data={"graph": graph, "version": version, "share": share, "by": by},
        marks={of_route(graph, version): left},
    )
    append_to_log(connection, payloads, tenant, now, event)
    return found


def list_routes(
    connection: Connection, payloads: Payloads, tenant: str, graph: str | None
) -> tuple[Route, ...]:
    """See `RunStore.list_routes`."""
    del payloads
    query = sa.select(routes).where(routes.c.tenant == tenant)
    if graph is not None:
        query = query.where(routes.c.graph == graph)
    return tuple(
        Route(
            graph=row.graph,
            version=row.version,
            share=row.share / _WHOLE,
            at=row.at,
            by=row.set_by,
        )
        for row in connection.execute(query.order_by(routes.c.graph, routes.c.version))
    )


def claim_migration(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    worker: str,
    lease: timedelta,
) -> ClaimedRun | None:
    """See `RunStore.claim_migration`."""
    now = database_now(connection)
    lock_thread(connection, tenant, get_run(connection, tenant, run_id, lock=False).thread_id)
    row = get_run(connection, tenant, run_id, lock=True)
    status = RunStatus(row.status)
    if status.is_ended:
        return None
    if status is RunStatus.RUNNING and row.lease_expires_at > now:
        raise ThreadBusyError(row.thread_id, run_id)
    if status is RunStatus.WAITING:
        change_run(connection, row, payloads, now, status=RunStatus.QUEUED)
        row = get_run(connection, tenant, run_id, lock=True)
    claimed = take(
        connection,
        payloads,
        row,
        now,
        Claimant(worker=worker, instance=None, lease=lease),
        is_changed=True,
    )
    if claimed is None:
        raise ThreadBusyError(row.thread_id, None)
    return claimed


def migrate_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    *,
    version: str,
    fingerprint: str,
    checkpoint_id: str | None,
    moved: Sequence[MovedWait],
    has_work: bool,
    by: str | None,
) -> Run:
    """See `RunStore.migrate_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    asked = _move_waits(connection, row, moved)
    named = {wait.wait_id for wait in moved}
    gone = [
        wait
        for wait in _waits_of(connection, row)
        if wait.wait_id not in named and wait.kind not in _OF_ATTEMPTS
    ]
    log = supersede(connection, gone, now)
    facts = {
        "from": row.version,
        "to": version,
        "checkpoint": checkpoint_id,
        "before": row.checkpoint_id,
        "waits": len(named),
        "by": by,
    }
    marks = {
        of_wait(wait.wait_id): mark(waits, wait._mapping) for wait in _waits_of(connection, row)
    }
    log.append(NewEvent(type="run.migrated", data=facts, marks=marks))
    is_answered = WaitStatus.RESOLVED.value in asked
    # What is being undone asks nothing any more.
    is_asking = WaitStatus.PENDING.value in asked and row.saga_cause is None
    is_waiting = is_asking and not is_answered and not has_work
    changes: dict[str, Any] = {**RELEASED, **CLEARED}
    if is_answered:
        changes["wake_reason"] = "approval"
    elif row.progress is not None:
        changes["wake_reason"] = "migration"
    if row.is_paused_by_failure and row.wake_reason == INCOMPATIBLE:
        changes |= {"paused_at": None, "is_paused_by_failure": None, "error": None}
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.WAITING if is_waiting else RunStatus.QUEUED,
        log=log,
        version=version,
        fingerprint=fingerprint,
        checkpoint_id=checkpoint_id or row.checkpoint_id,
        failures=None,
        **changes,
    )
    return to_run(get_run(connection, row.tenant, row.run_id, lock=False), payloads)


def _waits_of(connection: Connection, row: sa.Row[Any]) -> Sequence[sa.Row[Any]]:
    query = sa.select(waits).where(waits.c.tenant == row.tenant, waits.c.run_id == row.run_id)
    return connection.execute(query).all()


def _move_waits(connection: Connection, row: sa.Row[Any], moved: Sequence[MovedWait]) -> set[str]:
    """Give waits their new ids, and return the statuses that they have."""
    statuses = {wait.wait_id: wait.status for wait in _waits_of(connection, row)}
    for wait in moved:
        connection.execute(
            sa.update(waits)
            .where(waits.c.tenant == row.tenant, waits.c.wait_id == wait.wait_id)
            .values(
                ns=wait.ns,
                task_id=wait.task_id,
                interrupt_id=wait.interrupt_id,
                checkpoint_id=wait.checkpoint_id,
            )
        )
    return {statuses[wait.wait_id] for wait in moved if wait.wait_id in statuses}
