"""What a claim makes of a run: who holds it, and how its attempt is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.tables import runs
from agentflow.storage.beginning import Beginning, beginning
from agentflow.storage.losses import has_counted, is_suspect, isolation_of, losses_of
from agentflow.storage.opening import Claimant, Opening
from agentflow.storage.payloads import Payloads
from agentflow.storage.tokens import set_token
from agentflow.types import (
    ClaimedRun,
    FencingToken,
    Lease,
    NewEvent,
    Run,
    RunStatus,
    TakenThread,
)


class Hold(NamedTuple):
    """A run under a lease, before that is stored."""

    changes: dict[str, Any]
    """The columns of its row that change, but for its status, which becomes `running`."""
    log: list[NewEvent]
    claimed: ClaimedRun


def hold(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    run: Run,
    now: datetime,
    claimant: Claimant,
    token: FencingToken,
    *,
    has_rollback: bool,
) -> Hold:
    """Put a run that is due under a lease, and its thread in the checkpointer.

    Args:
        connection: The transaction's.
        payloads: How the store encodes.
        row: The run, locked, or as it is going to be stored.
        run: The same, as it is read.
        now: The database's time.
        claimant: Who gets it.
        token: The thread's new token.
        has_rollback: Whether checkpoints of the thread have to go.
    """
    is_recovery = row.status == RunStatus.RUNNING
    reason = "recovery" if is_recovery else row.wake_reason
    counted = has_counted(connection, row, now) if is_recovery else None
    counts = _counts(row, has_loss_counted=counted)
    isolation = isolation_of(row, claimant.lease) if is_suspect(row) else None
    lease = Lease(
        tenant=row.tenant,
        run_id=row.run_id,
        thread_id=row.thread_id,
        worker=claimant.worker,
        token=token,
    )
    rolled_back = _rolled_back(connection, row) if has_rollback else ()
    thread: TakenThread | None = None
    begun: Beginning | None = None
    if claimant.opening is not None:
        lease, thread = _open(connection, claimant.opening, lease, reason)
        if not rolled_back and isolation is None:
            begun = beginning(
                claimant.opening,
                payloads,
                row,
                thread,
                now,
                worker=claimant.worker,
                attempt=counts["attempt"],
                losses=counts["losses"],
            )
    started: dict[str, Any] = {
        "started_at": row.started_at or now,
        "start_deadline_at": None,
        **counts,
    }
    changes = {
        "worker": claimant.worker,
        "instance": claimant.instance or claimant.worker,
        "token": lease.token,
        "lease_expires_at": now + claimant.lease,
        "claimed_at": now,
        "has_loss_counted": counted,
        "is_isolated": isolation is not None,
        **started,
        **({} if begun is None else begun.changes),
    }
    claimed = ClaimedRun(
        run=replace(run, status=RunStatus.RUNNING, **started),
        lease=lease,
        reason=reason,
        isolation=isolation,
        rolled_back=rolled_back,
        traceparent=row.traceparent,
        thread=thread,
        started=None if begun is None else begun.started,
    )
    return Hold(changes, _log(row, changes, begun), claimed)


def _counts(row: sa.Row[Any], *, has_loss_counted: bool | None) -> dict[str, int]:
    """Count this claim, and the attempt that begins with it.

    That attempt always counts; so the one that was lost is taken back, or not.
    """
    attempt = max(row.attempt, 1) if has_loss_counted is False else row.attempt + 1
    return {"attempt": attempt, "claims": row.claims + 1, "losses": losses_of(row)}


def _log(row: sa.Row[Any], changes: Mapping[str, Any], begun: Beginning | None) -> list[NewEvent]:
    claim = {name: changes[name] for name in ("worker", "token", "instance")}
    log = [NewEvent(type="run.claimed", data=claim)]
    if row.status == RunStatus.RUNNING:
        lost = {"worker": row.worker, "counts": changes["has_loss_counted"]}
        log.insert(0, NewEvent(type="run.recovered", data=lost))
    if begun is not None:
        log.append(begun.event)
    return log


def _open(
    connection: Connection, opening: Opening, lease: Lease, reason: str
) -> tuple[Lease, TakenThread]:
    """Take the thread in the checkpointer too; what it has seen may ask for a higher token."""
    thread = opening.take_thread(connection, lease, is_read=reason == "approval")
    if thread.token > lease.token:
        token = set_token(connection, lease.tenant, lease.thread_id, thread.token)
        lease = replace(lease, token=token)
    return lease, thread


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
