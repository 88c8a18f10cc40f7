"""Who may drive which run: claims, fencing tokens and leases.

A claim locks the row of the thread in `leases` before it decides, so that two claims of one thread,
also of two runs of it, never both succeed. Whoever locks both takes the thread first and then its
runs; only the claim of whatever is due finds runs first, and passes by threads that are locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache, lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.engine import now as database_now
from agentflow.database.prepared import On, Prepared
from agentflow.database.statements import insert_of
from agentflow.database.tables import Timestamp, epochs, leases, pauses, runs
from agentflow.errors import ThreadBusyError
from agentflow.storage.losses import has_counted, is_suspect, isolation_of, losses_of
from agentflow.storage.pauses import (
    check_not_paused,
    concerns,
    paused,
    paused_of,
    reason_to_stop,
)
from agentflow.storage.rows import (
    UNFINISHED,
    Payloads,
    change_run,
    get_held_run,
    get_run,
    is_held,
)
from agentflow.storage.soundness import fits, newest_event, read_to_drive
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
_HIGHEST = 2**31 - 1
"""The highest priority that a column can hold."""


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
        _other.c.status.in_([sa.literal_column(f"'{status}'") for status in UNFINISHED]),
        sa.or_(
            _other.c.seq < runs.c.seq,
            _other.c.status.in_([sa.literal_column("'running'"), sa.literal_column("'waiting'")]),
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


class _Asking(NamedTuple):
    """What workers ask about runs of so many queues and so many graphs."""

    lock_due: tuple[Prepared, ...]
    """Lock what is due behind a place in the order: expired runs, and queued ones."""
    next_due: Prepared


@lru_cache(maxsize=100)
def _asking(queues: int, graphs: int) -> _Asking:
    is_wanted = sa.and_(
        runs.c.tenant == sa.bindparam("tenant"),
        sa.or_(sa.false(), *(runs.c.queue == sa.bindparam(f"queue_{i}") for i in range(queues))),
        sa.or_(
            sa.false(),
            *(
                sa.and_(
                    runs.c.graph == sa.bindparam(f"graph_{i}"),
                    runs.c.version == sa.bindparam(f"version_{i}"),
                )
                for i in range(graphs)
            ),
        ),
        runs.c.paused_at.is_(None),
    )
    due = [sa.and_(is_wanted, each, ~_IS_BEHIND) for each in (is_expired(_now), _IS_QUEUED)]
    is_behind_place = sa.or_(
        runs.c.priority < sa.bindparam("priority"),
        sa.and_(
            runs.c.priority == sa.bindparam("priority"),
            runs.c.seq > sa.bindparam("after"),
        ),
    )
    return _Asking(
        lock_due=tuple(
            Prepared(
                sa.select(runs)
                .where(each, is_behind_place)
                .order_by(runs.c.priority.desc(), runs.c.seq)
                .limit(sa.bindparam("room", type_=sa.Integer))
                .with_for_update(of=runs, skip_locked=True)
            )
            for each in due
        ),
        next_due=Prepared(
            sa.select(
                sa.or_(*(sa.exists(sa.select(runs.c.seq).where(each)) for each in due)).label(
                    "is_claimable"
                ),
                _soonest(
                    runs.c.lease_expires_at,
                    "status = 'running'",
                    runs.c.lease_expires_at > _now,
                    is_wanted,
                ).label("expiry"),
                _soonest(
                    runs.c.start_deadline_at,
                    "status = 'queued' AND start_deadline_at IS NOT NULL",
                ).label("start_deadline"),
                _soonest(
                    runs.c.deadline_at,
                    "status IN ('queued', 'waiting') AND deadline_at IS NOT NULL",
                ).label("deadline"),
            )
        ),
    )


def _soonest(column: sa.Column[Any], where: str, *conditions: Any) -> Any:
    # In literals, as the partial indexes have it.
    of_tenant = runs.c.tenant == sa.bindparam("tenant")
    query = sa.select(sa.func.min(column)).where(sa.text(where), of_tenant, *conditions)
    return query.scalar_subquery()


def _named(queues: Sequence[str], graphs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return queues and graphs as parameters."""
    return {
        **{f"queue_{i}": queue for i, queue in enumerate(queues)},
        **{f"graph_{i}": graph for i, (graph, _) in enumerate(graphs)},
        **{f"version_{i}": version for i, (_, version) in enumerate(graphs)},
    }


# What is paused, if anything, and whether looking for expired runs is worth it.
_LOOK = Prepared(
    sa.select(
        pauses.c.scope,
        pauses.c.name,
        StoreNow().label("now"),
        _soonest(runs.c.lease_expires_at, "status = 'running'").label("expiry"),
    ).select_from(
        sa.select(sa.literal_column("1").label("one"))
        .subquery()
        .outerjoin(pauses, concerns(sa.bindparam("tenant")))
    )
)
_IS_DUE = Prepared(
    sa.select(runs.c.run_id).where(
        runs.c.tenant == sa.bindparam("tenant"),
        runs.c.run_id == sa.bindparam("run_id"),
        sa.or_(is_expired(_now), _IS_QUEUED),
        ~_IS_BEHIND,
    )
)
_LOOK_AGAIN = Prepared(
    sa.select(
        _IS_BEHIND.label("is_behind"), _HAS_ROLLBACK.label("has_rollback"), *newest_event()
    ).where(runs.c.seq == sa.bindparam("seq"))
)
_OF_THREAD = (
    leases.c.tenant == sa.bindparam("of_tenant"),
    leases.c.thread_id == sa.bindparam("of_thread"),
)
_IS_KNOWN = Prepared(sa.select(leases.c.token).where(*_OF_THREAD))
_SET_TOKEN = Prepared(sa.update(leases).where(*_OF_THREAD).values(token=sa.bindparam("token")))
_locked = leases.alias("locked")
_TRY_THREAD = Prepared(
    sa.update(leases)
    .where(
        leases.c.tenant == sa.bindparam("of_tenant"),
        leases.c.thread_id
        == sa.select(_locked.c.thread_id)
        .where(
            _locked.c.tenant == sa.bindparam("of_tenant"),
            _locked.c.thread_id == sa.bindparam("of_thread"),
        )
        .with_for_update(skip_locked=True)
        .scalar_subquery(),
    )
    .values(token=leases.c.token + 1)
    .returning(leases.c.token)
)
"""Lock a thread, unless somebody else has, and give it the next token."""
_LEAST_TOKEN = sa.select(sa.func.coalesce(sa.func.max(epochs.c.token), 0)).scalar_subquery()


@cache
def _lock_thread(dialect: str) -> Prepared:
    """Return the statement that makes or locks the row of a thread."""
    named: dict[str, Any] = {
        "tenant": sa.bindparam("of_tenant"),
        "thread_id": sa.bindparam("of_thread"),
    }
    return Prepared(
        insert_of(dialect, leases)
        .values({**named, "token": _LEAST_TOKEN})
        # A row is locked by writing to it what stands there.
        .on_conflict_do_update(
            index_elements=["tenant", "thread_id"], set_={"token": leases.c.token}
        )
        .returning(leases.c.token, StoreNow().label("now"))
    )


def lock_thread(connection: Connection, tenant: str, thread_id: str) -> sa.Row[Any]:
    """Lock a thread against claims and submissions; return its `token`, and what time it is."""
    named: dict[str, Any] = {"of_tenant": tenant, "of_thread": thread_id}
    return _lock_thread(connection.dialect.name).one(connection, named)


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
    found = _LOOK.all(connection, {"tenant": tenant})
    now, expiry = found[0].now, found[0].expiry
    claimant = Claimant(worker, instance or worker, lease)
    open_queues, open_graphs = paused_of(found).without(queues, graphs)
    if not open_queues or not open_graphs:
        return []
    wanted = {
        "tenant": tenant,
        "now": now,
        "at": payloads.time(now),
        **_named(open_queues, open_graphs),
    }
    lock_expired, lock_queued = _asking(len(open_queues), len(open_graphs)).lock_due
    # Expired runs first: somebody has been waiting for them already.
    queries = [lock_queued] if expiry is None or expiry > now else [lock_expired, lock_queued]
    claimed: list[ClaimedRun] = []
    for query in queries:
        seen, place = 0, {"priority": _HIGHEST, "after": -1}
        while (room := limit - len(claimed)) > 0 and seen < _LOOK_AT_MOST:
            rows = query.all(connection, {**wanted, **place, "room": room})
            for row in rows:
                if is_suspect(row) and claimed:
                    continue  # to be claimed alone, as soon as it is the first
                taken = take(connection, payloads, row, now, claimant)
                if taken is not None:
                    claimed.append(taken)
                if claimed and claimed[0].isolation is not None:
                    return claimed
            if len(rows) < room:
                break
            seen += len(rows)
            place = {"priority": rows[-1].priority, "after": rows[-1].seq}
    return claimed


def next_due(
    connection: On,
    payloads: Payloads,
    tenant: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
) -> NextDue:
    """See `RunStore.next_due`."""
    found = _LOOK.all(connection, {"tenant": tenant})
    now = found[0].now
    open_queues, open_graphs = paused_of(found).without(queues, graphs)
    at = payloads.time(now)
    wanted = {"tenant": tenant, "now": now, "at": at, **_named(open_queues, open_graphs)}
    due = _asking(len(open_queues), len(open_graphs)).next_due.one(connection, wanted)
    deadlines = [each for each in (due.start_deadline, due.deadline) if each is not None]
    return NextDue(
        is_claimable=bool(due.is_claimable),
        expiry=None if due.expiry is None else due.expiry - now,
        deadline=min(deadlines) - at if deadlines else None,
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
    lock_thread(connection, tenant, get_run(connection, tenant, run_id, lock=False).thread_id)
    row = get_run(connection, tenant, run_id, lock=True)
    now = row.now
    at = payloads.time(now)
    status = RunStatus(row.status)
    if status.is_ended or status is RunStatus.WAITING:
        return None
    if not although_paused:
        check_not_paused(connection, row)
    named = {"tenant": tenant, "run_id": run_id, "now": now, "at": at}
    if _IS_DUE.first(connection, named) is None:
        is_late = row.start_deadline_at is not None and row.start_deadline_at <= at
        if status is RunStatus.QUEUED and (row.available_at > at or is_late):
            return None
        raise ThreadBusyError(row.thread_id, run_id if status is RunStatus.RUNNING else None)
    claimant = Claimant(worker, instance or worker, lease)
    return take(connection, payloads, row, now, claimant)


def take(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    claimant: Claimant,
    *,
    is_changed: bool = False,
) -> ClaimedRun | None:
    """Give a due run to a worker; `None` if it turns out not to be due any more, or damaged.

    `is_changed` says that the caller has changed it just now, and no event says so yet.
    """
    token = _take_thread(connection, row)
    if token is None:
        return None
    # Read again under the lock on the thread: a claim of another run of it may have been first.
    again = _LOOK_AGAIN.one(connection, {"seq": row.seq})
    if again.is_behind:
        return None
    if not is_changed and not fits(connection, payloads, row, again, now):
        return None
    run = read_to_drive(connection, payloads, row, now)
    if run is None:
        return None
    is_recovery = row.status == RunStatus.RUNNING
    counted = has_counted(connection, row, now) if is_recovery else None
    counts = {
        # The attempt that begins always counts; so the one that was lost is taken back or not.
        "attempt": max(row.attempt, 1) if counted is False else row.attempt + 1,
        "claims": row.claims + 1,
        "losses": losses_of(row),
    }
    isolation = isolation_of(row, claimant.lease) if is_suspect(row) else None
    claim = {"worker": claimant.worker, "token": token}
    if claimant.instance is not None:
        claim["instance"] = claimant.instance
    log = [NewEvent(type="run.claimed", data=claim)]
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
        rolled_back=_rolled_back(connection, row) if again.has_rollback else (),
        traceparent=row.traceparent,
    )


def _take_thread(connection: Connection, row: sa.Row[Any]) -> FencingToken | None:
    """Lock the thread of a run and give it the next token; `None` if somebody else has it locked.

    Whoever asked for this run alone has locked its thread already.
    """
    of_thread = {"of_tenant": row.tenant, "of_thread": row.thread_id}
    taken = _TRY_THREAD.first(connection, of_thread)
    if taken is None:
        if _IS_KNOWN.first(connection, of_thread) is not None:
            return None  # somebody is about to take it, or to add a run to its thread
        lock_thread(connection, row.tenant, row.thread_id)
        taken = _TRY_THREAD.one(connection, of_thread)
    return FencingToken(taken.token)


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
    _SET_TOKEN.run(connection, {"of_tenant": tenant, "of_thread": thread_id, "token": token})
    return FencingToken(token)


def raise_token(
    connection: Connection, payloads: Payloads, lease: Lease, *, above: FencingToken
) -> Lease:
    """See `RunStore.raise_token`."""
    thread = lock_thread(connection, lease.tenant, lease.thread_id)
    row = get_held_run(connection, lease)
    token = _set_token(connection, lease.tenant, lease.thread_id, max(thread.token, above) + 1)
    change_run(connection, row, payloads, row.now, token=token)
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
