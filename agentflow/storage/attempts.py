"""What an attempt does to its run: start, park, finish, retry, fail, release, cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import replace
from agentflow.database.tables import dead_letters, runs, waits
from agentflow.errors import IllegalTransitionError
from agentflow.storage.questions import pack_question, redacted_question
from agentflow.storage.rows import (
    RELEASED,
    Payloads,
    change_run,
    get_held_run,
    get_run,
    to_run,
    withdraw_waits,
)
from agentflow.types import (
    AttemptStart,
    Lease,
    NewEvent,
    NewWait,
    Run,
    RunFailure,
    RunStatus,
    WaitStatus,
)


def start_attempt(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    *,
    progress: str,
    reason: str,
    checkpoint_id: str | None,
    step: int | None,
    traceparent: str | None,
) -> AttemptStart:
    """See `RunStore.start_attempt`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    attempt = row.attempt
    if row.progress not in {None, progress}:
        # A worker that died after its progress died at what comes next: that was the first attempt.
        attempt = 2 if reason == "recovery" else 1
    failures: dict[str, int] = payloads.load(runs.c.failures, row) or {}
    if row.checkpoint_id != checkpoint_id:
        failures = {}
    facts = {"attempt": attempt, "checkpoint": checkpoint_id, "step": step, "worker": lease.worker}
    if reason == "start":
        event = NewEvent(type="run.started", data=facts)
    else:
        event = NewEvent(type="run.resumed", data={**facts, "reason": reason})
    change_run(
        connection,
        row,
        payloads,
        now,
        log=[event],
        attempt=attempt,
        progress=progress,
        checkpoint_id=checkpoint_id,
        step=step,
        failures=payloads.dump(failures, runs.c.failures, row),
        # Only a segment that is being traced becomes the origin of the next one.
        traceparent=traceparent or row.traceparent,
    )
    return AttemptStart(attempt=attempt, failures=failures)


def park_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    questions: Sequence[NewWait],
    *,
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.park_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if _honour_cancel(connection, payloads, row, now):
        return
    known = {
        (wait.ns, wait.interrupt_id, wait.checkpoint_id): wait
        for wait in connection.execute(
            sa.select(waits).where(waits.c.tenant == row.tenant, waits.c.run_id == row.run_id)
        )
    }
    asked = {(q.ns, q.interrupt_id, q.checkpoint_id): q for q in questions}
    log = _supersede(connection, [w for key, w in known.items() if key not in asked], now)
    new = [
        redacted_question(payloads, question, row)
        for key, question in asked.items()
        if key not in known
    ]
    _insert_waits(connection, payloads, row, new, now)
    log += [
        NewEvent(
            type="approval.requested",
            data={"approval": q.wait_id, "proposal_hash": q.proposal_hash, "task": q.task_id},
        )
        for q in new
    ]
    is_answered = any(known[key].status == WaitStatus.RESOLVED for key in asked if key in known)
    log.append(NewEvent(type="run.parked", data={"waits": len(asked), "checkpoint": checkpoint_id}))
    changes = {**RELEASED, "attempt": 0, "checkpoint_id": checkpoint_id, "step": step}
    if is_answered:
        changes |= {"wake_reason": "approval", "available_at": now}
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED if is_answered else RunStatus.WAITING,
        log=log,
        **changes,
    )


def _supersede(
    connection: Connection, gone: Sequence[sa.Row[Any]], now: datetime
) -> list[NewEvent]:
    pending = [wait.wait_id for wait in gone if wait.status == WaitStatus.PENDING]
    if pending:
        connection.execute(
            sa.update(waits)
            .where(waits.c.tenant == gone[0].tenant, waits.c.wait_id.in_(pending))
            .values(status=WaitStatus.SUPERSEDED.value, decided_at=now)
        )
    return [NewEvent(type="approval.superseded", data={"approval": wait}) for wait in pending]


def _insert_waits(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    questions: Sequence[NewWait],
    now: datetime,
) -> None:
    if not questions:
        return
    connection.execute(
        sa.insert(waits),
        [
            {
                "tenant": row.tenant,
                "wait_id": question.wait_id,
                "kind": question.kind,
                "run_id": row.run_id,
                "thread_id": row.thread_id,
                "graph": row.graph,
                "ns": question.ns,
                "task_id": question.task_id,
                "interrupt_id": question.interrupt_id,
                "checkpoint_id": question.checkpoint_id,
                "answers_recorded": question.answers_recorded,
                "status": WaitStatus.PENDING.value,
                "version": 1,
                **pack_question(payloads, question, row),
                "created_at": now,
            }
            for question in questions
        ],
    )


def finish_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    output: Any,
    *,
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.finish_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    log = withdraw_waits(connection, row, now, status=WaitStatus.SUPERSEDED)
    log.append(NewEvent(type="run.succeeded", data={"checkpoint": checkpoint_id, "step": step}))
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.SUCCEEDED,
        log=log,
        output=payloads.dump(output, runs.c.output, row),
        error=None,
        checkpoint_id=checkpoint_id,
        step=step,
        **RELEASED,
    )


def retry_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    failure: RunFailure,
    *,
    delay: timedelta,
    failures: Mapping[str, int],
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.retry_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if _honour_cancel(connection, payloads, row, now):
        return
    event = NewEvent(
        type="run.retried",
        data={**_facts(failure), "delay": delay.total_seconds()},
    )
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[event],
        error=payloads.dump(failure, runs.c.error, row),
        failures=payloads.dump(dict(failures), runs.c.failures, row),
        checkpoint_id=checkpoint_id,
        step=step,
        wake_reason="retry",
        available_at=now + delay,
        **RELEASED,
    )


def fail_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    failure: RunFailure,
    *,
    reason: str,
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.fail_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if _honour_cancel(connection, payloads, row, now):
        return
    log = withdraw_waits(connection, row, now, status=WaitStatus.WITHDRAWN)
    log.append(NewEvent(type="run.failed", data={**_facts(failure), "reason": reason}))
    letter = {
        "tenant": row.tenant,
        "run_id": row.run_id,
        "at": now,
        "attempts": row.attempt,
        "claims": row.claims,
        "checkpoint_id": checkpoint_id,
        "cause": payloads.dump(failure, dead_letters.c.cause, row),
    }
    replace(connection, dead_letters, [letter])
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.FAILED,
        log=log,
        error=payloads.dump(failure, runs.c.error, row),
        is_dead_letter=True,
        checkpoint_id=checkpoint_id,
        step=step,
        **RELEASED,
    )


def release_run(
    connection: Connection, payloads: Payloads, lease: Lease, *, reason: str, counts: bool
) -> None:
    """See `RunStore.release_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if _honour_cancel(connection, payloads, row, now):
        return
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[NewEvent(type="run.released", data={"reason": reason})],
        wake_reason=reason,
        available_at=now,
        attempt=row.attempt if counts else 0,
        **RELEASED,
    )


def finish_cancel(connection: Connection, payloads: Payloads, lease: Lease) -> None:
    """See `RunStore.finish_cancel`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    _cancel(connection, payloads, row, now, NewEvent(type="run.cancelled"))


def cancel_run(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    reason: str | None,
    by: str | None,
) -> Run:
    """See `RunStore.cancel_run`."""
    now = database_now(connection)
    row = get_run(connection, tenant, run_id, lock=True)
    status = RunStatus(row.status)
    data = {"reason": reason, "by": by}
    if status in {RunStatus.SUCCEEDED, RunStatus.FAILED}:
        raise IllegalTransitionError(run_id, status.value, RunStatus.CANCELLED.value)
    if status is RunStatus.RUNNING:
        # Whoever holds the run, or recovers it, ends it: only under its lease can the thread be
        # given back.
        if row.cancel_requested_at is None:
            event = NewEvent(type="run.cancel_requested", data=data)
            change_run(connection, row, payloads, now, log=[event], cancel_requested_at=now)
    elif status is not RunStatus.CANCELLED:
        _cancel(connection, payloads, row, now, NewEvent(type="run.cancelled", data=data))
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)


def _cancel(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime, event: NewEvent
) -> None:
    log = [*withdraw_waits(connection, row, now, status=WaitStatus.WITHDRAWN), event]
    change_run(connection, row, payloads, now, status=RunStatus.CANCELLED, log=log, **RELEASED)


def _honour_cancel(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> bool:
    """End a run whose cancellation was requested while it ran; say whether it was."""
    if row.cancel_requested_at is None:
        return False
    _cancel(connection, payloads, row, now, NewEvent(type="run.cancelled"))
    return True


def _facts(failure: RunFailure) -> dict[str, Any]:
    return {"error": failure.type, "node": failure.node, "attempt": failure.attempt}
