"""What an attempt does to its run: start, park, finish, retry, fail, release, cancel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.tables import runs, waits
from agentflow.errors import IllegalTransitionError
from agentflow.storage.beginning import begin_event
from agentflow.storage.endings import (
    cancel,
    cancel_or_ask,
    clipped,
    facts_of,
    fail,
    honour_cancel,
)
from agentflow.storage.marks import wait_event
from agentflow.storage.pauses import reason_to_stop
from agentflow.storage.payloads import Payloads
from agentflow.storage.questions import pack_question, redacted_question
from agentflow.storage.rows import (
    CLEARED,
    INCOMPATIBLE,
    RELEASED,
    change_run,
    get_held_run,
    get_run,
    to_run,
    withdraw_waits,
)
from agentflow.storage.waits import list_of_run
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

_ALL = 2**31 - 1


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
    fingerprint: str | None = None,
    graph_changed: Mapping[str, Any] | None = None,
) -> AttemptStart:
    """See `RunStore.start_attempt`."""
    row = get_held_run(connection, lease)
    now = row.now
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
    event = begin_event(
        reason, attempt=attempt, checkpoint_id=checkpoint_id, step=step, worker=lease.worker
    )
    log = [event]
    if graph_changed is not None:
        log.insert(0, NewEvent(type="run.graph_changed", data=graph_changed))
    change_run(
        connection,
        row,
        payloads,
        now,
        log=log,
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
        fingerprint=fingerprint or row.fingerprint,
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
    row = get_held_run(connection, lease)
    now = row.now
    change_run(connection, row, payloads, now, is_isolated=False, pardoned=row.losses)


def finish_rollback(
    connection: Connection, payloads: Payloads, lease: Lease, run_ids: Collection[str]
) -> None:
    """See `RunStore.finish_rollback`."""
    held = get_held_run(connection, lease)
    now = held.now
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
    progress: str | None,
) -> bool:
    """See `RunStore.park_run`; say whether the run waits."""
    row = get_held_run(connection, lease)
    now = row.now
    if honour_cancel(connection, payloads, row, now):
        return False
    known = {
        (wait.ns, wait.interrupt_id, wait.checkpoint_id): wait
        for wait in list_of_run(connection, row.tenant, row.run_id, after=0, count=_ALL)
    }
    asked = {(q.ns, q.interrupt_id, q.checkpoint_id): q for q in questions}
    log = supersede(connection, [w for key, w in known.items() if key not in asked], now)
    new = [
        redacted_question(payloads, question, row)
        for key, question in asked.items()
        if key not in known
    ]
    rows = _insert_waits(connection, payloads, row, new, now)
    for q, wait in zip(new, rows, strict=True):
        if q.kind == "effect":
            log.append(
                NewEvent(type="effect.in_doubt", data={"effect": q.interrupt_id.rpartition(":")[0]})
            )
        log.append(wait_event("requested", wait, proposal_hash=q.proposal_hash, task=q.task_id))
    is_answered = any(known[key].status == WaitStatus.RESOLVED for key in asked if key in known)
    log.append(NewEvent(type="run.parked", data={"waits": len(asked), "checkpoint": checkpoint_id}))
    changes = {**RELEASED, **CLEARED, "checkpoint_id": checkpoint_id, "step": step}
    if progress is not None:
        changes["progress"] = progress
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
    return not is_answered


def supersede(connection: Connection, gone: Sequence[sa.Row[Any]], now: datetime) -> list[NewEvent]:
    """Close those of some waits that are pending, and return the events that say so."""
    pending = [wait for wait in gone if wait.status == WaitStatus.PENDING]
    closed = {"status": WaitStatus.SUPERSEDED.value, "decided_at": now}
    if pending:
        ids = [wait.wait_id for wait in pending]
        connection.execute(
            sa.update(waits)
            .where(waits.c.tenant == gone[0].tenant, waits.c.wait_id.in_(ids))
            .values(**closed)
        )
    return [wait_event("superseded", {**wait._mapping, **closed}) for wait in pending]


def _insert_waits(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    questions: Sequence[NewWait],
    now: datetime,
) -> list[dict[str, Any]]:
    new = [
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
    ]
    if new:
        connection.execute(sa.insert(waits), new)
    return new


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
    row = get_held_run(connection, lease)
    now = row.now
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
    row = get_held_run(connection, lease)
    now = row.now
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
    row = get_held_run(connection, lease)
    now = row.now
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
    row = get_held_run(connection, lease)
    now = row.now
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
        wake_reason=INCOMPATIBLE if reason == INCOMPATIBLE else "pause",
        available_at=payloads.time(now),
        paused_at=now,
        is_paused_by_failure=True,
        **RELEASED,
    )


def release_run(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    *,
    reason: str,
    counts: bool,
    delay: timedelta,
) -> None:
    """See `RunStore.release_run`."""
    row = get_held_run(connection, lease)
    now = row.now
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
        available_at=payloads.time(now) + delay,
        **({} if counts else CLEARED),
        **RELEASED,
    )


def finish_cancel(connection: Connection, payloads: Payloads, lease: Lease) -> None:
    """See `RunStore.finish_cancel`."""
    row = get_held_run(connection, lease)
    now = row.now
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
    row = get_run(connection, tenant, run_id, lock=True)
    now = row.now
    status = RunStatus(row.status)
    if status in {RunStatus.SUCCEEDED, RunStatus.FAILED}:
        raise IllegalTransitionError(run_id, status.value, RunStatus.CANCELLED.value)
    if status is not RunStatus.CANCELLED:
        cancel_or_ask(connection, payloads, row, now, {"reason": reason, "by": by})
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)
