"""Rows of runs: read, held and inserted, and the one way to change them.

`change_run` is the only function that updates a run: it checks the table of statuses and appends
the audit events in the same statement group, numbered and chained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.prepared import On, Prepared
from agentflow.database.statements import insert_of
from agentflow.database.tables import dead_letters, events, runs, waits
from agentflow.errors import IllegalTransitionError, LeaseLostError, NotFoundError
from agentflow.storage.events import (
    EVENTS_AT_ONCE,
    chain_events,
    insert_events,
    insert_statement,
    numbered,
)
from agentflow.storage.marks import RUN, marked, wait_event
from agentflow.storage.payloads import Payloads, mapping_of, member_of
from agentflow.types import TRANSITIONS, DeadLetter, Lease, NewEvent, Run, RunStatus, WaitStatus

UNFINISHED = (RunStatus.QUEUED.value, RunStatus.RUNNING.value, RunStatus.WAITING.value)

INCOMPATIBLE = "incompatible"
"""Why a run is paused whose graph has changed, and why it is driven once it is resumed."""


def to_run(row: sa.Row[Any], payloads: Payloads, *, strict: bool = False) -> Run:
    """Build the record of a run; `strict` refuses an input with classes that are not known."""
    cancellation = payloads.load(runs.c.cancellation, row) or {}
    return Run(
        id=row.run_id,
        thread_id=row.thread_id,
        tenant=row.tenant,
        graph=row.graph,
        version=row.version,
        queue=row.queue,
        status=member_of(RunStatus, runs.c.status, row),
        input=payloads.load(runs.c.input, row, strict=strict),
        output=payloads.load(runs.c.output, row),
        error=payloads.load(runs.c.error, row),
        metadata=payloads.load(runs.c.metadata, row),
        config=payloads.load(runs.c.config, row, strict=strict),
        priority=row.priority,
        attempt=row.attempt,
        claims=row.claims,
        losses=row.losses or 0,
        step=row.step,
        checkpoint_id=row.checkpoint_id,
        resume_from=row.resume_from,
        retry=payloads.load(runs.c.retry, row),
        dead_letter=row.is_dead_letter,
        created_at=row.created_at,
        available_at=row.available_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        paused_at=row.paused_at,
        start_deadline_at=row.start_deadline_at,
        deadline_at=row.deadline_at,
        cancel_requested_at=row.cancel_requested_at,
        cancel_reason=cancellation.get("reason"),
        submitted_by=row.submitted_by,
        root_id=row.root,
        forked_from=row.forked_from,
        effect_shift=row.effect_shift or 0,
        saga=row.saga,
        saga_cause=payloads.load(runs.c.saga_cause, row),
        fingerprint=row.fingerprint,
    )


def to_dead_letter(row: sa.Row[Any], payloads: Payloads) -> DeadLetter:
    """Build the record of a dead letter."""
    return DeadLetter(
        run_id=row.run_id,
        thread_id=row.thread_id,
        graph=row.graph,
        version=row.version,
        at=row.at,
        reason=row.reason,
        cause=payloads.load(dead_letters.c.cause, row),
        attempts=row.attempts,
        claims=row.claims,
        step=row.step,
        checkpoint_id=row.checkpoint_id,
    )


# Nearly every verb begins with one of them.
_OF_RUN = (runs.c.tenant == sa.bindparam("tenant"), runs.c.run_id == sa.bindparam("run_id"))
_FIND_RUN = Prepared(sa.select(runs).where(*_OF_RUN))
_LOCK_RUN = Prepared(sa.select(runs, StoreNow().label("now")).where(*_OF_RUN).with_for_update())


def find_run(connection: On, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any] | None:
    """Read a run's row, locked against other transitions if asked.

    A locked row has one column more, the time of the database's clock (`now`).
    """
    named = {"tenant": tenant, "run_id": run_id}
    return (_LOCK_RUN if lock else _FIND_RUN).first(connection, named)


def get_run(connection: On, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any]:
    """Read a run's row; `NotFoundError` if there is none."""
    row = find_run(connection, tenant, run_id, lock=lock)
    if row is None:
        raise NotFoundError("run", run_id)
    return row


def get_held_run(connection: Connection, lease: Lease, now: datetime | None = None) -> sa.Row[Any]:
    """Read and lock the run of a lease; `LeaseLostError` unless the lease still holds.

    It is judged by the row's `now`, unless a time is given.
    """
    row = get_run(connection, lease.tenant, lease.run_id, lock=True)
    if not is_held(row, lease, now or row.now):
        raise LeaseLostError(lease.run_id, lease.token)
    return row


def is_held(row: sa.Row[Any], lease: Lease, now: datetime) -> bool:
    """Whether the run is running under this very lease, and the lease has not expired."""
    return (
        row.status == RunStatus.RUNNING
        and row.token == lease.token
        and row.lease_expires_at is not None
        and row.lease_expires_at > now
    )


RELEASED: Mapping[str, Any] = {
    "worker": None,
    "instance": None,
    "lease_expires_at": None,
    "is_isolated": None,
}
"""The columns of a run that nobody holds."""

CLEARED: Mapping[str, Any] = {
    "attempt": 0,
    "losses": 0,
    "has_loss_counted": None,
    "pardoned": None,
}
"""What counts attempts, of a run with a new budget."""


class Beside(NamedTuple):
    """Another change, made in the same statement as that of a run where there is one for both."""

    change: sa.Update
    parameters: Mapping[str, Any]
    """Named differently from the columns of runs."""


@cache
def _update_run(columns: tuple[str, ...], events_before: int = 0, *beside: sa.Update) -> Prepared:
    """Return the statement that sets these columns of a run; verbs have few such sets.

    On PostgreSQL it may insert events as well, whose parameters are numbered, and make other
    changes beside that.
    """
    statement = (
        sa.update(runs)
        .where(
            runs.c.tenant == sa.bindparam("of_tenant"), runs.c.run_id == sa.bindparam("of_run_id")
        )
        .values({name: sa.bindparam(name, type_=runs.c[name].type) for name in columns})
    )
    if events_before:
        statement = statement.add_cte(insert_statement(events_before).cte("log"))
    for i, change in enumerate(beside):
        statement = statement.add_cte(change.returning(sa.literal_column("1")).cte(f"beside_{i}"))
    return Prepared(statement)


@cache
def _prepared(change: sa.Update) -> Prepared:
    return Prepared(change)


def change_run(
    connection: Connection,
    row: sa.Row[Any],
    payloads: Payloads,
    now: datetime,
    *,
    status: RunStatus | None = None,
    log: Sequence[NewEvent] = (),
    beside: Sequence[Beside] = (),
    **values: Any,
) -> None:
    """Update a locked run and append its audit events, with what is to be changed beside it.

    What changes without one, of columns that are marked, is to be followed by one in the same
    transaction.

    Raises:
        IllegalTransitionError: The table of statuses does not allow the change.
    """
    if status is not None:
        check_transition(row.run_id, member_of(RunStatus, runs.c.status, row), status)
        values["status"] = status.value
        if status.is_ended:
            values["ended_at"] = now
    if log:
        log = [
            *log[:-1],
            marked(log[-1], RUN, runs, {**dict(zip(row._fields, row, strict=True)), **values}),
        ]
    entries, end = chain_events(payloads, mapping_of(row), row.run_id, log, now)
    changed = {**end, **values}
    columns = tuple(sorted(changed))
    named = {"of_tenant": row.tenant, "of_run_id": row.run_id, **changed}
    if connection.dialect.name == "postgresql" and 0 < len(entries) <= EVENTS_AT_ONCE:
        # Each statement is a round trip.
        update = _update_run(columns, len(entries), *(each.change for each in beside))
        named |= numbered(entries)
        for each in beside:
            named |= each.parameters
        update.run(connection, named)
        return
    for each in beside:
        _prepared(each.change).run(connection, each.parameters)
    insert_events(connection, entries)
    _update_run(columns).run(connection, named)


@cache
def _insert_run(dialect: str, columns: tuple[str, ...], events_behind: int = 0) -> Prepared:
    """Return the statement that inserts a run with these columns, unless its id is known.

    On PostgreSQL it may insert events as well, whose parameters are numbered.
    """
    made = (
        insert_of(dialect, runs)
        .values({name: sa.bindparam(name, type_=runs.c[name].type) for name in columns})
        .on_conflict_do_nothing(index_elements=["tenant", "run_id"])
        .returning(runs.c.run_id)
    )
    if not events_behind:
        return Prepared(made)
    names = [column.name for column in events.c]
    row = made.cte("made")
    entries = [
        sa.select(
            *(sa.bindparam(f"{name}_{i}", type_=events.c[name].type).label(name) for name in names)
        ).select_from(row)
        for i in range(events_behind)
    ]
    return Prepared(sa.insert(events).from_select(names, sa.union_all(*entries)))


def insert_run(
    connection: Connection,
    payloads: Payloads,
    row: Mapping[str, Any],
    now: datetime,
    log: Sequence[NewEvent],
) -> bool:
    """Insert a run that has no events yet, with its first ones; say whether its id was new."""
    log = [*log[:-1], marked(log[-1], RUN, runs, row)]
    entries, end = chain_events(payloads, row, row["run_id"], log, now)
    new, dialect = {**row, **end}, connection.dialect.name
    columns = tuple(sorted(new))
    if dialect == "postgresql" and len(entries) <= EVENTS_AT_ONCE:
        # Each statement is a round trip.
        insert = _insert_run(dialect, columns, len(entries))
        return insert.run(connection, {**new, **numbered(entries)}) > 0
    is_new = _insert_run(dialect, columns).first(connection, new) is not None
    if is_new:
        insert_events(connection, entries)
    return is_new


def check_transition(run_id: str, current: RunStatus, wanted: RunStatus) -> None:
    """Raise `IllegalTransitionError` unless the table of statuses allows the change."""
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransitionError(run_id, current.value, wanted.value)


_CLOSE_WAITS = Prepared(
    sa.update(waits)
    .where(
        waits.c.tenant == sa.bindparam("of_tenant"),
        waits.c.run_id == sa.bindparam("of_run_id"),
        waits.c.status == sa.literal_column("'pending'"),
    )
    .values(
        {
            "status": sa.bindparam("status"),
            "decided_at": sa.bindparam("decided_at", type_=waits.c.decided_at.type),
        }
    )
    .returning(waits)
)


def withdraw_waits(
    connection: Connection, row: sa.Row[Any], now: datetime, *, status: WaitStatus
) -> list[NewEvent]:
    """Close all pending waits of a run and return the events that say so."""
    closed = _CLOSE_WAITS.all(
        connection,
        {
            "of_tenant": row.tenant,
            "of_run_id": row.run_id,
            "status": status.value,
            "decided_at": now,
        },
    )
    return [
        wait_event(status.value, wait._mapping)
        for wait in sorted(closed, key=lambda wait: wait.seq)
    ]
