"""Who may drive which run: claims, fencing tokens and leases.

A claim locks the row of the thread in `leases` before it decides, so that two claims of one thread,
also of two runs of it, never both succeed. Whoever locks both takes the thread first and then its
runs; only the claim of whatever is due finds runs first, and passes by threads that are locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.prepared import Prepared
from agentflow.database.tables import runs
from agentflow.errors import CodecError, ThreadBusyError
from agentflow.storage.due import HAS_ROLLBACK, IS_BEHIND, IS_DUE, LOOK, asking, named
from agentflow.storage.holding import Hold, hold
from agentflow.storage.losses import is_suspect
from agentflow.storage.opening import Claimant, Opening
from agentflow.storage.pauses import check_not_paused, paused, paused_of, reason_to_stop
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import change_run, get_held_run, get_run, is_held, to_run
from agentflow.storage.soundness import fits, newest_event, read_to_drive
from agentflow.storage.tokens import lock_thread, set_token, take_thread
from agentflow.types import ClaimedRun, FencingToken, Heartbeat, Lease, RunStatus

_LOOK_AT_MOST = 1000
"""How many due runs one claim looks at, to get past those that this worker cannot read."""
_HIGHEST = 2**31 - 1
"""The highest priority that a column can hold."""
_LOOK_AGAIN = Prepared(
    sa.select(
        IS_BEHIND.label("is_behind"), HAS_ROLLBACK.label("has_rollback"), *newest_event()
    ).where(runs.c.seq == sa.bindparam("seq"))
)


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
    opening: Opening | None,
) -> list[ClaimedRun]:
    """See `RunStore.claim_runs`."""
    found = LOOK.all(connection, {"tenant": tenant})
    now, expiry = found[0].now, found[0].expiry
    claimant = Claimant(worker=worker, instance=instance, lease=lease, opening=opening)
    open_queues, open_graphs = paused_of(found).without(queues, graphs)
    if not open_queues or not open_graphs:
        return []
    wanted = {
        "tenant": tenant,
        "now": now,
        "at": payloads.time(now),
        **named(open_queues, open_graphs),
    }
    asked = asking(len(open_queues), len(open_graphs))
    expired = [(asked.lock_expired, wanted)]
    queued = [(asked.lock_queued, {**wanted, "queue": queue}) for queue in open_queues]
    # Expired runs first: somebody has been waiting for them already.
    kinds = [queued] if expiry is None or expiry > now else [expired, queued]
    claimed: list[ClaimedRun] = []
    for kind in kinds:
        seen, place = 0, {"priority": _HIGHEST, "after": -1}
        while (room := limit - len(claimed)) > 0 and seen < _LOOK_AT_MOST:
            locked = [
                row
                for query, of in kind
                for row in query.all(connection, {**of, **place, "room": room})
            ]
            rows = sorted(locked, key=lambda row: (-row.priority, row.seq))[:room]
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
    opening: Opening | None,
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
    asked = {"tenant": tenant, "run_id": run_id, "now": now, "at": at}
    if IS_DUE.first(connection, asked) is None:
        is_late = row.start_deadline_at is not None and row.start_deadline_at <= at
        if status is RunStatus.QUEUED and (row.available_at > at or is_late):
            return None
        raise ThreadBusyError(row.thread_id, run_id if status is RunStatus.RUNNING else None)
    claimant = Claimant(worker=worker, instance=instance, lease=lease, opening=opening)
    return take(connection, payloads, row, now, claimant)


def offer(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    look: sa.Row[Any],
    now: datetime,
    claimant: Claimant,
    token: FencingToken,
) -> Hold | None:
    """Give a run to whom it is offered, in the one change that makes it due.

    Its thread is locked, and was before it was looked at, or else it is held by the run, which
    waits: no other run of it can have been claimed in between.

    Args:
        connection: The transaction's.
        payloads: How the store encodes.
        row: The run as it is going to be, queued.
        look: What was found of it, as `due.OFFERED` describes.
        now: The database's time.
        claimant: To whom.
        token: The thread's next one, which the caller stores; that of the lease, if it is higher.

    Returns:
        What the caller is to store. `None` if it was not taken; then nothing has been changed.
    """
    at = payloads.time(now)
    is_late = row.start_deadline_at is not None and row.start_deadline_at <= at
    is_kept = look.is_behind or look.is_paused or row.paused_at is not None
    if is_kept or is_late or row.available_at > at:
        return None
    if not claimant.wants(row.queue, (row.graph, row.version)):
        return None
    try:
        run = to_run(row, payloads, strict=True)
    except CodecError:
        return None  # whoever claims it says what is to be said
    rollback: bool = look.has_rollback
    return hold(connection, payloads, row, run, now, claimant, token, has_rollback=rollback)


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
    token = take_thread(connection, row)
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
    rollback: bool = again.has_rollback
    held = hold(connection, payloads, row, run, now, claimant, token, has_rollback=rollback)
    status = None if row.status == RunStatus.RUNNING else RunStatus.RUNNING
    change_run(connection, row, payloads, now, status=status, log=held.log, **held.changes)
    return held.claimed


def raise_token(
    connection: Connection, payloads: Payloads, lease: Lease, *, above: FencingToken
) -> Lease:
    """See `RunStore.raise_token`."""
    thread = lock_thread(connection, lease.tenant, lease.thread_id)
    row = get_held_run(connection, lease)
    token = set_token(connection, lease.tenant, lease.thread_id, max(thread.token, above) + 1)
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
