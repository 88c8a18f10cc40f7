"""Who may drive which run: claims, fencing tokens and leases.

A claim locks the row of the thread in `leases` before it decides, so that two claims of one thread,
also of two runs of it, never both succeed. Whoever locks both takes the thread first and then its
runs; only the claim of whatever is due finds runs first, and passes by threads that are locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_or_lock
from agentflow.database.tables import Timestamp, epochs, leases, runs
from agentflow.errors import (
    BlockedTypeError,
    CodecError,
    ThreadBusyError,
    UnencryptedValueError,
    UnknownKeyError,
)
from agentflow.storage.losses import has_counted, is_suspect, isolation_of, losses_of
from agentflow.storage.pauses import check_not_paused, paused, reason_to_stop
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


def is_expired(now: Any) -> sa.ColumnElement[bool]:
    """Whether a run is held under a lease that has expired."""
    # Statuses are literals where an index covers only the rows that have them.
    return sa.and_(runs.c.status == sa.literal_column("'running'"), runs.c.lease_expires_at <= now)


# A worker that waits for work asks these over and over: what they are made of is put together once.

_other = runs.alias("other")
_IS_BEHIND = sa.exists(
    sa.select(sa.literal_column("1"))
    .where(
        _other.c.tenant == runs.c.tenant,
        _other.c.thread_id == runs.c.thread_id,
        _other.c.seq != runs.c.seq,
        _other.c.status.in_(UNFINISHED),
        sa.or_(
            _other.c.seq < runs.c.seq,
            _other.c.status.in_((RunStatus.RUNNING.value, RunStatus.WAITING.value)),
        ),
    )
    .correlate(runs)
    # Keeps PostgreSQL from reading all runs at once instead of those of one thread.
    .offset(0)
)
"""Whether an older run of the thread is unfinished, or any other one holds it."""

_marked = runs.alias("marked")
_HAS_ROLLBACK = (
    sa.exists()
    .where(
        _marked.c.tenant == runs.c.tenant,
        _marked.c.thread_id == runs.c.thread_id,
        _marked.c.rollback == sa.literal_column("'pending'"),
    )
    .correlate(runs)
)
"""Whether checkpoints of the thread have to go."""

_now = sa.bindparam("now", type_=Timestamp())
_at = sa.bindparam("at", type_=Timestamp())
_IS_QUEUED = sa.and_(
    runs.c.status == sa.literal_column("'queued'"),
    runs.c.available_at <= _at,
    sa.or_(runs.c.start_deadline_at.is_(None), runs.c.start_deadline_at > _at),
)
_IS_WANTED = sa.and_(
    runs.c.tenant == sa.bindparam("tenant"),
    runs.c.queue.in_(sa.bindparam("queues", expanding=True)),
    sa.tuple_(runs.c.graph, runs.c.version).in_(sa.bindparam("graphs", expanding=True)),
    runs.c.paused_at.is_(None),
)
# Expired runs first: somebody has been waiting for them already.
_DUE = tuple(sa.and_(_IS_WANTED, due, ~_IS_BEHIND) for due in (is_expired(_now), _IS_QUEUED))
_LOCK_DUE = tuple(
    sa.select(runs)
    .where(due, runs.c.seq.not_in(sa.bindparam("seen", expanding=True)))
    .order_by(runs.c.priority.desc(), runs.c.seq)
    .limit(sa.bindparam("room", type_=sa.Integer))
    .with_for_update(of=runs, skip_locked=True)
    for due in _DUE
)
_IS_DUE = sa.select(runs.c.run_id).where(
    runs.c.tenant == sa.bindparam("tenant"),
    runs.c.run_id == sa.bindparam("run_id"),
    sa.or_(is_expired(_now), _IS_QUEUED),
    ~_IS_BEHIND,
)
_LOOK_AGAIN = sa.select(_IS_BEHIND, _HAS_ROLLBACK).where(runs.c.seq == sa.bindparam("seq"))
_THREAD = sa.select(leases.c.token).where(
    leases.c.tenant == sa.bindparam("tenant"), leases.c.thread_id == sa.bindparam("thread_id")
)
_SET_TOKEN = sa.update(leases).where(
    leases.c.tenant == sa.bindparam("in_tenant"), leases.c.thread_id == sa.bindparam("named")
)
_LEAST_TOKEN = sa.select(sa.func.coalesce(sa.func.max(epochs.c.token), 0))
_LOCK_THREAD = _THREAD.with_for_update()
_TRY_THREAD = _THREAD.with_for_update(skip_locked=True)


def _soonest(column: sa.Column[Any], where: str, *conditions: Any) -> Any:
    # In literals, as the partial indexes have it.
    of_tenant = runs.c.tenant == sa.bindparam("tenant")
    query = sa.select(sa.func.min(column)).where(sa.text(where), of_tenant, *conditions)
    return query.scalar_subquery()


_NEXT_DUE = sa.select(
    sa.or_(*(sa.exists(sa.select(runs.c.seq).where(due)) for due in _DUE)),
    _soonest(
        runs.c.lease_expires_at, "status = 'running'", runs.c.lease_expires_at > _now, _IS_WANTED
    ),
    _soonest(runs.c.start_deadline_at, "status = 'queued' AND start_deadline_at IS NOT NULL"),
    _soonest(runs.c.deadline_at, "status IN ('queued', 'waiting') AND deadline_at IS NOT NULL"),
)


def lock_thread(connection: Connection, tenant: str, thread_id: str) -> int:
    """Lock a thread against claims and submissions, and return its token."""
    token = connection.execute(_LEAST_TOKEN).scalar_one()
    row = {"tenant": tenant, "thread_id": thread_id, "token": token}
    return int(insert_or_lock(connection, leases, row, "token"))


def _lock(
    connection: Connection, tenant: str, thread_id: str, *, is_patient: bool = True
) -> int | None:
    query = _LOCK_THREAD if is_patient else _TRY_THREAD
    named = {"tenant": tenant, "thread_id": thread_id}
    token = connection.execute(query, named).scalar_one_or_none()
    return None if token is None else int(token)


def claim_runs(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    *,
    worker: str,
    instance: str | None,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
    limit: int,
    lease: timedelta,
) -> list[ClaimedRun]:
    """See `RunStore.claim_runs`."""
    now = database_now(connection)
    claimant = Claimant(worker, instance or worker, lease)
    open_queues, open_graphs = paused(connection, tenant).without(queues, graphs)
    if not open_queues or not open_graphs:
        return []
    wanted = {
        "tenant": tenant,
        "queues": open_queues,
        "graphs": open_graphs,
        "now": now,
        "at": payloads.time(now),
    }
    claimed: list[ClaimedRun] = []
    for query in _LOCK_DUE:
        seen: list[int] = []
        while (room := limit - len(claimed)) > 0 and len(seen) < _LOOK_AT_MOST:
            rows = connection.execute(query, {**wanted, "seen": seen, "room": room}).all()
            seen += [row.seq for row in rows]
            for row in rows:
                if is_suspect(row) and claimed:
                    continue  # to be claimed alone, as soon as it is the first
                taken = take(connection, payloads, row, now, claimant, is_patient=False)
                if taken is not None:
                    claimed.append(taken)
                if claimed and claimed[0].isolation is not None:
                    return claimed
            if len(rows) < room:
                break
    return claimed


def next_due(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
) -> NextDue:
    """See `RunStore.next_due`."""
    now = database_now(connection)
    open_queues, open_graphs = paused(connection, tenant).without(queues, graphs)
    at = payloads.time(now)
    wanted = {
        "tenant": tenant,
        "queues": open_queues,
        "graphs": open_graphs,
        "now": now,
        "at": at,
    }
    is_claimable, expiry, *deadlines = connection.execute(_NEXT_DUE, wanted).one()
    deadline = min((each for each in deadlines if each is not None), default=None)
    return NextDue(
        is_claimable=bool(is_claimable),
        expiry=None if expiry is None else expiry - now,
        deadline=None if deadline is None else deadline - at,
    )


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims, and for how long."""

    worker: str
    instance: str
    lease: timedelta


def claim_run(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    worker: str,
    instance: str | None,
    lease: timedelta,
    although_paused: bool,
) -> ClaimedRun | None:
    """See `RunStore.claim_run`."""
    now = database_now(connection)
    at = payloads.time(now)
    lock_thread(connection, tenant, get_run(connection, tenant, run_id, lock=False).thread_id)
    row = get_run(connection, tenant, run_id, lock=True)
    status = RunStatus(row.status)
    if status.is_ended or status is RunStatus.WAITING:
        return None
    if not although_paused:
        check_not_paused(connection, row)
    named = {"tenant": tenant, "run_id": run_id, "now": now, "at": at}
    if connection.execute(_IS_DUE, named).first() is None:
        is_late = row.start_deadline_at is not None and row.start_deadline_at <= at
        if status is RunStatus.QUEUED and (row.available_at > at or is_late):
            return None
        raise ThreadBusyError(row.thread_id, run_id if status is RunStatus.RUNNING else None)
    claimant = Claimant(worker, instance or worker, lease)
    return take(connection, payloads, row, now, claimant, is_patient=True)


def take(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    claimant: Claimant,
    *,
    is_patient: bool,
) -> ClaimedRun | None:
    """Give a due run to a worker; `None` if it turns out not to be due any more."""
    last_token = _lock(connection, row.tenant, row.thread_id, is_patient=is_patient)
    if last_token is None:
        if _is_known(connection, row):
            return None  # somebody is about to take it, or to add a run to its thread
        last_token = lock_thread(connection, row.tenant, row.thread_id)
    # Read again under the lock on the thread: a claim of another run of it may have been first.
    is_behind, has_rollback = connection.execute(_LOOK_AGAIN, {"seq": row.seq}).one()
    if is_behind:
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
    counted = has_counted(connection, row, now) if is_recovery else None
    counts = {
        # The attempt that begins always counts; so the one that was lost is taken back or not.
        "attempt": max(row.attempt, 1) if counted is False else row.attempt + 1,
        "claims": row.claims + 1,
        "losses": losses_of(row),
    }
    isolation = isolation_of(row, claimant.lease) if is_suspect(row) else None
    token = _set_token(connection, row.tenant, row.thread_id, last_token + 1)
    log = [NewEvent(type="run.claimed", data={"worker": claimant.worker, "token": token})]
    if is_recovery:
        log.insert(
            0, NewEvent(type="run.recovered", data={"worker": row.worker, "counts": counted})
        )
    change_run(
        connection,
        row,
        payloads,
        now,
        status=None if is_recovery else RunStatus.RUNNING,
        log=log,
        worker=claimant.worker,
        instance=claimant.instance,
        token=token,
        lease_expires_at=now + claimant.lease,
        claimed_at=now,
        started_at=row.started_at or now,
        start_deadline_at=None,
        has_loss_counted=counted,
        is_isolated=isolation is not None,
        **counts,
    )
    return ClaimedRun(
        run=replace(run, status=RunStatus.RUNNING, start_deadline_at=None, **counts),
        lease=Lease(
            tenant=row.tenant,
            run_id=row.run_id,
            thread_id=row.thread_id,
            worker=claimant.worker,
            token=token,
        ),
        reason="recovery" if is_recovery else row.wake_reason,
        isolation=isolation,
        rolled_back=_rolled_back(connection, row) if has_rollback else (),
        traceparent=row.traceparent,
    )


def _is_known(connection: Connection, row: sa.Row[Any]) -> bool:
    query = sa.select(leases.c.token).where(
        leases.c.tenant == row.tenant, leases.c.thread_id == row.thread_id
    )
    return connection.execute(query).first() is not None


def _rolled_back(connection: Connection, row: sa.Row[Any]) -> tuple[str, ...]:
    """Return the runs of a thread whose checkpoints have to go."""
    query = (
        sa.select(runs.c.run_id)
        .where(
            runs.c.tenant == row.tenant,
            runs.c.thread_id == row.thread_id,
            runs.c.rollback == sa.literal_column("'pending'"),
            runs.c.status == RunStatus.CANCELLED.value,
        )
        .order_by(runs.c.seq)
    )
    return tuple(connection.execute(query).scalars())


def _set_token(connection: Connection, tenant: str, thread_id: str, token: int) -> FencingToken:
    named = {"in_tenant": tenant, "named": thread_id, "token": token}
    connection.execute(_SET_TOKEN, named)
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
    last_token = lock_thread(connection, lease.tenant, lease.thread_id)
    row = get_held_run(connection, lease, now)
    token = _set_token(connection, lease.tenant, lease.thread_id, max(last_token, above) + 1)
    change_run(connection, row, payloads, now, token=token)
    return replace(lease, token=token)


def extend_leases(
    connection: Connection, payloads: Payloads, held: Sequence[Lease], duration: timedelta
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
    extended = []
    scopes = {tenant: paused(connection, tenant) for tenant in {lease.tenant for lease in held}}
    at = payloads.time(now)
    for lease in held:
        row = rows.get((lease.tenant, lease.run_id))
        if row is None or not is_held(row, lease, now):
            report[lease.run_id] = Heartbeat(lost=True)
            continue
        stop = reason_to_stop(row, at, scopes[lease.tenant])
        report[lease.run_id] = Heartbeat(lost=False, stop=stop)
        extended.append(row.seq)
    connection.execute(
        sa.update(runs).where(runs.c.seq.in_(extended)).values(lease_expires_at=now + duration)
    )
    return report
