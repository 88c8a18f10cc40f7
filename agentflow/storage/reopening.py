"""Taking back a decision: the run is held for it, and then the wait is pending again.

In between the checkpointer forgets the answer. A run that is held for this is paused as well, so
that nobody goes on with the old answer if whoever holds it dies; another call then finishes it.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.tables import waits
from agentflow.errors import ConflictError, ThreadBusyError
from agentflow.storage.claims import take
from agentflow.storage.letters import requeue
from agentflow.storage.marks import wait_event
from agentflow.storage.opening import Claimant
from agentflow.storage.payloads import Payloads
from agentflow.storage.questions import to_approval
from agentflow.storage.rows import CLEARED, RELEASED, change_run, get_held_run, get_run
from agentflow.storage.tokens import lock_thread
from agentflow.storage.waits import get_wait
from agentflow.types import Approval, ClaimedRun, Lease, NewEvent, RunStatus, WaitStatus

REOPEN: Final = "reopen"
"""Why a run is paused that is held for this, and why it goes on afterwards."""


def claim_reopening(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    wait_id: str,
    *,
    worker: str,
    lease: timedelta,
    by: str,
) -> ClaimedRun:
    """See `RunStore.claim_reopening`."""
    now = database_now(connection)
    run_id = get_wait(connection, tenant, wait_id).run_id
    lock_thread(connection, tenant, get_run(connection, tenant, run_id, lock=False).thread_id)
    row = get_run(connection, tenant, run_id, lock=True)
    _check_answered(get_wait(connection, tenant, wait_id, lock=True))
    status = RunStatus(row.status)
    if status is RunStatus.RUNNING and row.lease_expires_at > now:
        raise ThreadBusyError(row.thread_id, run_id)
    is_dead = status is RunStatus.FAILED and row.is_dead_letter
    is_undone = row.saga_cause is not None and not is_dead
    is_undone = is_undone or row.saga is not None
    if (status.is_ended and not is_dead) or is_undone:
        state = status.value if row.saga is None else row.saga.replace("_", " ")
        raise ConflictError(f"run {run_id!r} is {state}; fork it instead")
    if is_dead:
        requeue(connection, payloads, row, now, checkpoint_id=None, by=by)
        row = get_run(connection, tenant, run_id, lock=True)
        if row.resume_from is not None:
            raise ConflictError(f"another run has used the thread of {run_id!r} since; fork it")
    elif status is RunStatus.WAITING:
        change_run(connection, row, payloads, now, status=RunStatus.QUEUED)
        row = get_run(connection, tenant, run_id, lock=True)
    if row.paused_at is None:
        change_run(connection, row, payloads, now, paused_at=now, wake_reason=REOPEN)
        row = get_run(connection, tenant, run_id, lock=True)
    # It is not driven: whoever takes it need not know the classes of its input.
    lenient = replace(payloads, strict=payloads.lenient)
    claimed = take(
        connection,
        lenient,
        row,
        now,
        Claimant(worker=worker, instance=None, lease=lease),
        is_changed=True,
    )
    if claimed is None:
        raise ThreadBusyError(row.thread_id, None)
    return claimed


def reopen_wait(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    wait_id: str,
    *,
    by: str,
    comment: str | None,
) -> Approval:
    """See `RunStore.reopen_wait`."""
    now = database_now(connection)
    run = get_held_run(connection, lease, now)
    row = get_wait(connection, lease.tenant, wait_id, lock=True)
    _check_answered(row)
    log = _put_aside(connection, row)
    pending: dict[str, Any] = {
        "status": WaitStatus.PENDING.value,
        "version": row.version + 1,
        **dict.fromkeys(
            ("decision", "decision_type", "decided_by", "decided_at", "comment", "idempotency_key")
        ),
    }
    is_it = (waits.c.tenant == row.tenant, waits.c.wait_id == wait_id)
    connection.execute(sa.update(waits).where(*is_it).values(**pending))
    facts = {"by": by, "comment": comment, "was": row.decision_type, "was_by": row.decided_by}
    log.insert(0, wait_event("reopened", {**row._mapping, **pending}, **facts))
    changes: dict[str, Any] = {**RELEASED, **CLEARED}
    if run.wake_reason == REOPEN:
        changes["paused_at"] = None
    change_run(
        connection,
        run,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=log,
        wake_reason=REOPEN,
        available_at=payloads.time(now),
        failures=None,
        **changes,
    )
    return to_approval(get_wait(connection, lease.tenant, wait_id), payloads)


def _check_answered(row: sa.Row[Any]) -> None:
    if row.kind != "approval":
        raise ConflictError(
            f"approval {row.wait_id!r} is about {row.kind!r}: what was said of it is on record and "
            "cannot be taken back"
        )
    if row.status != WaitStatus.RESOLVED:
        raise ConflictError(f"approval {row.wait_id!r} is {row.status}; there is nothing to reopen")


def _put_aside(connection: Connection, row: sa.Row[Any]) -> list[NewEvent]:
    """Close what the same task has asked since: it is asked anew, under the same ids."""
    query = sa.select(waits).where(
        waits.c.tenant == row.tenant,
        waits.c.run_id == row.run_id,
        waits.c.ns == row.ns,
        waits.c.task_id == row.task_id,
        waits.c.kind == "approval",
        waits.c.answers_recorded > row.answers_recorded,
        waits.c.status.in_((WaitStatus.PENDING.value, WaitStatus.RESOLVED.value)),
    )
    found = connection.execute(query).all()
    log = []
    for later in found:
        aside = {
            "status": WaitStatus.SUPERSEDED.value,
            # The place in the thread is free for the same question.
            "interrupt_id": f"{later.interrupt_id}:{later.wait_id}",
        }
        connection.execute(
            sa.update(waits)
            .where(waits.c.tenant == row.tenant, waits.c.wait_id == later.wait_id)
            .values(**aside)
        )
        log.append(wait_event("superseded", {**later._mapping, **aside}))
    return log
