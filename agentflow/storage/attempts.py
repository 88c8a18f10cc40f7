"""What an attempt does to its run: start, park, finish, retry, fail, release, cancel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.tables import runs, waits
from agentflow.errors import IllegalTransitionError
from agentflow.storage.endings import (
    cancel,
    cancel_or_ask,
    clipped,
    facts_of,
    fail,
    honour_cancel,
)
from agentflow.storage.pauses import reason_to_stop
from agentflow.storage.questions import pack_question, redacted_question
from agentflow.storage.rows import (
    CLEARED,
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
    effect_shift: int | None,
) -> AttemptStart:
    """See `RunStore.start_attempt`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    attempt, losses, is_isolated = row.attempt, row.losses or 0, bool(row.is_isolated)
    pardoned = row.pardoned
    if row.progress not in {None, progress}:
        # A worker that died after its progress died at what comes next: that was the first attempt.
        was_lost = reason == "recovery"
        attempt = 2 if was_lost and row.has_loss_counted is not False else 1
        losses, is_isolated, pardoned = int(was_lost), False, None
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
        losses=losses,
        is_isolated=is_isolated,
        pardoned=pardoned,
        progress=progress,
        resume_from=None,
        checkpoint_id=checkpoint_id,
        step=step,
        failures=payloads.dump(failures, runs.c.failures, row),
        # Only a segment that is being traced becomes the origin of the next one.
        traceparent=traceparent or row.traceparent,
        effect_shift=row.effect_shift if effect_shift is None else effect_shift,
    )
    return AttemptStart(
        attempt=attempt,
        failures=failures,
        losses=losses,
        is_isolated=is_isolated,
        stop=reason_to_stop(row, payloads.time(now)),
    )


def end_isolation(connection: Connection, payloads: Payloads, lease: Lease) -> None:
    """See `RunStore.end_isolation`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    change_run(connection, row, payloads, now, is_isolated=False, pardoned=row.losses)


def finish_rollback(
    connection: Connection, payloads: Payloads, lease: Lease, run_ids: Collection[str]
) -> None:
    """See `RunStore.finish_rollback`."""
    now = database_now(connection)
    held = get_held_run(connection, lease, now)
    query = (
        sa.select(runs)
        .where(
            runs.c.tenant == held.tenant,
            runs.c.thread_id == held.thread_id,
            runs.c.run_id.in_(sorted(run_ids)),
            runs.c.rollback == sa.literal_column("'pending'"),
        )
        .order_by(runs.c.seq)
        .with_for_update()
    )
    for row in connection.execute(query).all():
        event = NewEvent(type="run.rolled_back", data={"for": held.run_id})
        change_run(connection, row, payloads, now, log=[event], rollback="done")


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
    if honour_cancel(connection, payloads, row, now):
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
    for q in new:
        if q.kind == "effect":
            log.append(
                NewEvent(type="effect.in_doubt", data={"effect": q.interrupt_id.rpartition(":")[0]})
            )
        facts = {"approval": q.wait_id, "proposal_hash": q.proposal_hash, "task": q.task_id}
        log.append(NewEvent(type="approval.requested", data=facts))
    is_answered = any(known[key].status == WaitStatus.RESOLVED for key in asked if key in known)
    log.append(NewEvent(type="run.parked", data={"waits": len(asked), "checkpoint": checkpoint_id}))
    changes = {**RELEASED, **CLEARED, "checkpoint_id": checkpoint_id, "step": step}
    if is_answered:
        changes |= {"wake_reason": "approval", "available_at": payloads.time(now)}
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
    output: bytes,
    *,
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.finish_run`; the output is sealed already."""
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
        output=output,
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
    if honour_cancel(connection, payloads, row, now):
        return
    failure = clipped(failure)
    event = NewEvent(
        type="run.retried",
        data={**facts_of(failure), "delay": delay.total_seconds()},
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
        available_at=payloads.time(now) + delay,
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
    if honour_cancel(connection, payloads, row, now):
        return
    fail(
        connection,
        payloads,
        row,
        failure,
        now,
        reason=reason,
        checkpoint_id=checkpoint_id,
        step=step,
    )


def pause_failed_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    failure: RunFailure,
    *,
    reason: str,
    checkpoint_id: str | None,
    step: int | None,
) -> None:
    """See `RunStore.pause_failed_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if honour_cancel(connection, payloads, row, now):
        return
    failure = clipped(failure)
    event = NewEvent(type="run.paused", data={**facts_of(failure), "reason": reason})
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[event],
        error=payloads.dump(failure, runs.c.error, row),
        checkpoint_id=checkpoint_id,
        step=step,
        wake_reason="pause",
        available_at=payloads.time(now),
        paused_at=now,
        is_paused_by_failure=True,
        **RELEASED,
    )


def release_run(
    connection: Connection, payloads: Payloads, lease: Lease, *, reason: str, counts: bool
) -> None:
    """See `RunStore.release_run`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    if honour_cancel(connection, payloads, row, now):
        return
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[NewEvent(type="run.released", data={"reason": reason})],
        wake_reason=reason,
        available_at=payloads.time(now),
        **({} if counts else CLEARED),
        **RELEASED,
    )


def finish_cancel(connection: Connection, payloads: Payloads, lease: Lease) -> None:
    """See `RunStore.finish_cancel`."""
    now = database_now(connection)
    row = get_held_run(connection, lease, now)
    cancel(connection, payloads, row, now, payloads.load(runs.c.cancellation, row) or {})


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
    if status in {RunStatus.SUCCEEDED, RunStatus.FAILED}:
        raise IllegalTransitionError(run_id, status.value, RunStatus.CANCELLED.value)
    if status is not RunStatus.CANCELLED:
        cancel_or_ask(connection, payloads, row, now, {"reason": reason, "by": by})
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)
