"""Who may drive which run: claims, fencing tokens and leases.

A claim locks the row of the thread in `leases` before it decides, so that two claims of one thread,
also of two runs of it, never both succeed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_new
from agentflow.database.tables import leases, runs
from agentflow.errors import (
    BlockedTypeError,
    CodecError,
    ThreadBusyError,
    UnencryptedValueError,
    UnknownKeyError,
)
from agentflow.storage.rows import (
    UNFINISHED,
    Payloads,
    change_run,
    get_held_run,
    get_run,
    is_held,
    to_run,
)
from agentflow.types import (
    ClaimedRun,
    FencingToken,
    Heartbeat,
    Lease,
    NewEvent,
    NextDue,
    RunStatus,
)

_LOOK_AT_MOST = 1000
"""How many due runs one claim looks at, to get past those that this worker cannot read."""
_REPAIR = timedelta(minutes=1)
"""How long a run whose stored input is damaged is left alone."""


def lock_thread(connection: Connection, tenant: str, thread_id: str) -> int:
    """Lock a thread against claims and submissions, and return its token."""
    query = (
        sa.select(leases.c.token)
        .where(leases.c.tenant == tenant, leases.c.thread_id == thread_id)
        .with_for_update()
    )
    token = connection.execute(query).scalar_one_or_none()
    if token is None:
        insert_new(connection, leases, [{"tenant": tenant, "thread_id": thread_id, "token": 0}])
        token = connection.execute(query).scalar_one()
    return int(token)


def claim_runs(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    *,
    worker: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
    limit: int,
    lease: timedelta,
) -> list[ClaimedRun]:
    """See `RunStore.claim_runs`."""
    now = database_now(connection)
    wanted = _wanted(tenant, queues, graphs)
    claimed: list[ClaimedRun] = []
    # Expired runs first: somebody has been waiting for them already.
    for due in (_is_expired(now), _is_queued(now)):
        seen: list[int] = []
        while (room := limit - len(claimed)) > 0 and len(seen) < _LOOK_AT_MOST:
            query = (
                sa.select(runs)
                .where(*wanted, due, ~_is_behind_another(), runs.c.seq.not_in(seen))
                .order_by(runs.c.priority.desc(), runs.c.seq)
                .limit(room)
                .with_for_update(of=runs, skip_locked=True)
            )
            rows = connection.execute(query).all()
            seen += [row.seq for row in rows]
            taken = (
                _take(connection, payloads, row, now, worker=worker, lease=lease) for row in rows
            )
            claimed += [run for run in taken if run is not None]
            if len(rows) < room:
                break
    return claimed


def has_due(
    connection: Connection,
    tenant: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
) -> bool:
    """Whether there may be something to claim; reads only, so that idle workers disturb nobody."""
    now = database_now(connection)
    wanted = _wanted(tenant, queues, graphs)
    return any(
        connection.execute(
            sa.select(runs.c.seq).where(*wanted, due, ~_is_behind_another()).limit(1)
        ).first()
        for due in (_is_expired(now), _is_queued(now))
    )


def next_due(
    connection: Connection,
    tenant: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
) -> NextDue:
    """See `RunStore.next_due`."""
    now = database_now(connection)

    def soonest(column: sa.Column[Any], where: str, *conditions: Any) -> Any:
        # In literals, as the partial indexes have it.
        of_tenant = runs.c.tenant == tenant
        query = sa.select(sa.func.min(column)).where(sa.text(where), of_tenant, *conditions)
        return query.scalar_subquery()

    wanted = _wanted(tenant, queues, graphs)
    row = connection.execute(
        sa.select(
            soonest(
                runs.c.lease_expires_at,
                "status = 'running'",
                runs.c.lease_expires_at > now,
                *wanted,
            ),
            soonest(
                runs.c.start_deadline_at, "status = 'queued' AND start_deadline_at IS NOT NULL"
            ),
            soonest(
                runs.c.deadline_at, "status IN ('queued', 'waiting') AND deadline_at IS NOT NULL"
            ),
        )
    ).one()
    expiry, *deadlines = row
    deadline = min((each for each in deadlines if each is not None), default=None)
    return NextDue(
        expiry=None if expiry is None else expiry - now,
        deadline=None if deadline is None else deadline - now,
    )


def _wanted(
    tenant: str, queues: Collection[str], graphs: Collection[tuple[str, str]]
) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        runs.c.tenant == tenant,
        runs.c.queue.in_(sorted(queues)),
        sa.tuple_(runs.c.graph, runs.c.version).in_(sorted(graphs)),
    )


def claim_run(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    worker: str,
    lease: timedelta,
) -> ClaimedRun | None:
    """See `RunStore.claim_run`."""
    now = database_now(connection)
    row = get_run(connection, tenant, run_id, lock=True)
    status = RunStatus(row.status)
    if status.is_ended or status is RunStatus.WAITING:
        return None
    query = sa.select(runs.c.run_id).where(
        runs.c.tenant == tenant,
        runs.c.run_id == run_id,
        sa.or_(_is_expired(now), _is_queued(now)),
        ~_is_behind_another(),
    )
    if connection.execute(query).first() is None:
        if status is RunStatus.QUEUED and row.available_at > now:
            return None
        raise ThreadBusyError(row.thread_id, run_id if status is RunStatus.RUNNING else None)
    return _take(connection, payloads, row, now, worker=worker, lease=lease)


def _is_queued(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(runs.c.status == RunStatus.QUEUED.value, runs.c.available_at <= now)


def _is_expired(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(runs.c.status == RunStatus.RUNNING.value, runs.c.lease_expires_at <= now)


def _is_behind_another() -> sa.ColumnElement[bool]:
    """Whether an older run of the thread is unfinished, or any other one holds it."""
    other = runs.alias("other")
    holding = (RunStatus.RUNNING.value, RunStatus.WAITING.value)
    return sa.exists().where(
        other.c.tenant == runs.c.tenant,
        other.c.thread_id == runs.c.thread_id,
        other.c.seq != runs.c.seq,
        sa.or_(
            sa.and_(other.c.status.in_(UNFINISHED), other.c.seq < runs.c.seq),
            other.c.status.in_(holding),
        ),
    )


def _take(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    *,
    worker: str,
    lease: timedelta,
) -> ClaimedRun | None:
    """Give a due run to a worker; `None` if it turns out not to be due any more."""
    lock_thread(connection, row.tenant, row.thread_id)
    # Read again under the lock on the thread: a claim of another run of it may have been first.
    behind = sa.select(runs.c.run_id).where(runs.c.seq == row.seq, _is_behind_another())
    if connection.execute(behind).first() is not None:
        return None
    is_recovery = row.status == RunStatus.RUNNING
    try:
        run = to_run(row, payloads, strict=True)
    except (BlockedTypeError, UnknownKeyError, UnencryptedValueError):
        # Its classes or its key are not known to this worker; another one may know them.
        return None
    except CodecError as exc:
        event = NewEvent(type="run.unreadable", data={"error": type(exc).__name__})
        _put_off(connection, payloads, row, now, event)
        return None
    token = _next_token(connection, row.tenant, row.thread_id)
    log = [NewEvent(type="run.claimed", data={"worker": worker, "token": token})]
    if is_recovery:
        log.insert(0, NewEvent(type="run.recovered", data={"worker": row.worker}))
    change_run(
        connection,
        row,
        payloads,
        now,
        status=None if is_recovery else RunStatus.RUNNING,
        log=log,
        worker=worker,
        token=token,
        lease_expires_at=now + lease,
        attempt=row.attempt + 1,
        claims=row.claims + 1,
        started_at=row.started_at or now,
    )
    return ClaimedRun(
        run=replace(run, status=RunStatus.RUNNING, attempt=row.attempt + 1, claims=row.claims + 1),
        lease=Lease(
            tenant=row.tenant,
            run_id=row.run_id,
            thread_id=row.thread_id,
            worker=worker,
            token=token,
        ),
        reason="recovery" if is_recovery else row.wake_reason,
        traceparent=row.traceparent,
    )


def _next_token(
    connection: Connection, tenant: str, thread_id: str, above: int = 0
) -> FencingToken:
    """Lock the thread and return a token higher than any it had, and than `above`."""
    token = max(lock_thread(connection, tenant, thread_id), above) + 1
    connection.execute(
        sa.update(leases)
        .where(leases.c.tenant == tenant, leases.c.thread_id == thread_id)
        .values(token=token)
    )
    return FencingToken(token)


def _put_off(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    event: NewEvent,
) -> None:
    """Leave a run alone for a while, so that it does not keep others out of the queue."""
    change_run(
        connection,
        row,
        payloads,
        now,
        log=[event],
        available_at=now + _REPAIR,
        lease_expires_at=None if row.lease_expires_at is None else now + _REPAIR,
    )


def raise_token(
    connection: Connection, payloads: Payloads, lease: Lease, *, above: FencingToken
) -> Lease:
    """See `RunStore.raise_token`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    token = _next_token(connection, lease.tenant, lease.thread_id, above)
    change_run(connection, row, payloads, now, token=token)
    return replace(lease, token=token)


def extend_leases(
    connection: Connection, held: Sequence[Lease], duration: timedelta
) -> dict[str, Heartbeat]:
    """See `RunStore.extend_leases`."""
    if not held:
        return {}
    now = database_now(connection)
    keys = [(lease.tenant, lease.run_id) for lease in held]
    query = (
        sa.select(runs)
        .where(sa.tuple_(runs.c.tenant, runs.c.run_id).in_(keys))
        .order_by(runs.c.seq)
        .with_for_update()
    )
    rows = {(row.tenant, row.run_id): row for row in connection.execute(query)}
    report = {}
    for lease in held:
        row = rows.get((lease.tenant, lease.run_id))
        holds = row is not None and is_held(row, lease, now)
        report[lease.run_id] = Heartbeat(
            lost=not holds,
            stop="cancel"
            if holds and row is not None and row.cancel_requested_at is not None
            else None,
        )
        if holds and row is not None:
            connection.execute(
                sa.update(runs).where(runs.c.seq == row.seq).values(lease_expires_at=now + duration)
            )
    return report
