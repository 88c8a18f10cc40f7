"""How runs end without success: failed with a dead letter, or cancelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import replace as replace_row
from agentflow.database.tables import dead_letters, runs
from agentflow.errors import DeadlineExceededError
from agentflow.storage.effect_queries import has_any_to_undo, is_all_undone
from agentflow.storage.marks import LETTER, marked
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import CLEARED, RELEASED, change_run, get_run, withdraw_waits
from agentflow.storage.soundness import is_sound
from agentflow.types import NewEvent, RunFailure, RunStatus, WaitStatus

COMPENSATING = "compensating"
"""What `runs.saga` says of a run whose effects are being undone."""
COMPENSATED, PARTIALLY_COMPENSATED = "compensated", "partially_compensated"
"""What it says once they are, as far as they could be."""
_MESSAGE, _TRACEBACK = 16_000, 64_000
"""Characters that are kept; a message may hold what the node could not store."""


def fail(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    failure: RunFailure,
    now: datetime,
    *,
    reason: str,
    checkpoint_id: str | None,
    step: int | None,
    waits: WaitStatus = WaitStatus.WITHDRAWN,
) -> None:
    """End a locked run as `failed`, with a dead letter; its pending waits become `waits`."""
    failure = clipped(failure)
    log = withdraw_waits(connection, row, now, status=waits)
    changes: dict[str, Any] = {"error": payloads.dump(failure, runs.c.error, row)}
    place: dict[str, Any] = {"checkpoint_id": checkpoint_id, "step": step}
    cause = {"kind": "failed", "failure": failure, "reason": reason, **place}
    if _begin_saga(connection, payloads, row, now, log, cause, **changes, **place):
        return
    letter = {
        "tenant": row.tenant,
        "run_id": row.run_id,
        "thread_id": row.thread_id,
        "graph": row.graph,
        "version": row.version,
        "at": now,
        "reason": reason,
        "attempts": row.attempt,
        "claims": row.claims,
        "step": step,
        "checkpoint_id": checkpoint_id,
        "cause": payloads.dump(failure, dead_letters.c.cause, row),
    }
    replace_row(connection, dead_letters, [letter])
    failed = NewEvent(type="run.failed", data={**facts_of(failure), "reason": reason})
    log.append(marked(failed, LETTER, dead_letters, letter))
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.FAILED,
        log=log,
        is_dead_letter=True,
        **_end_of_saga(connection, row),
        **changes,
        **place,
        **RELEASED,
    )


def _begin_saga(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    log: list[NewEvent],
    cause: Mapping[str, Any],
    **changes: Any,
) -> bool:
    """Queue a locked run to have its effects undone, if it has any; it ends after that.

    Neither its deadlines nor its cancellation are to stop that.
    """
    if row.saga is not None or not has_any_to_undo(connection, row):
        return False
    log.append(NewEvent(type="run.compensating", data={"cause": cause["kind"]}))
    is_queued = row.status == RunStatus.QUEUED
    changes |= {
        **RELEASED,
        **CLEARED,
        "saga": COMPENSATING,
        "saga_cause": payloads.dump(dict(cause), runs.c.saga_cause, row),
        "wake_reason": "compensation",
        "available_at": payloads.time(now),
        "deadline_at": None,
        "start_deadline_at": None,
        "cancel_requested_at": None,
    }
    status = None if is_queued else RunStatus.QUEUED
    change_run(connection, row, payloads, now, status=status, log=log, **changes)
    return True


def _end_of_saga(connection: Connection, row: sa.Row[Any]) -> dict[str, Any]:
    if row.saga != COMPENSATING:
        return {}
    is_whole = is_all_undone(connection, row)
    return {"saga": COMPENSATED if is_whole else PARTIALLY_COMPENSATED}


def clipped(failure: RunFailure) -> RunFailure:
    """Cut what is too long: the end of a message, the beginning of a traceback."""
    message, trace = failure.message, failure.traceback
    if len(message) > _MESSAGE:
        message = f"{message[:_MESSAGE]}… ({len(message)} characters in all)"
    if trace is not None and len(trace) > _TRACEBACK:
        trace = f"({len(trace)} characters in all) …{trace[-_TRACEBACK:]}"
    return replace(failure, message=message, traceback=trace)


def facts_of(failure: RunFailure) -> dict[str, Any]:
    """Return what events say of a failure: nothing that may be a payload."""
    return {"error": failure.type, "node": failure.node, "attempt": failure.attempt}


def cancel(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    facts: Mapping[str, Any],
    **changes: Any,
) -> None:
    """End a locked run as `cancelled`; its pending waits become `withdrawn`."""
    log = withdraw_waits(connection, row, now, status=WaitStatus.WITHDRAWN)
    if _begin_saga(connection, payloads, row, now, log, {"kind": "cancelled"}, **changes):
        return
    log.append(NewEvent(type="run.cancelled", data=facts))
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.CANCELLED,
        log=log,
        **{**RELEASED, **_end_of_saga(connection, row), **changes},
    )


def cancel_or_ask(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    facts: Mapping[str, Any],
    **changes: Any,
) -> None:
    """Cancel a locked run that is unfinished; one that runs is asked to stop.

    Whoever holds such a run, or recovers it, ends it: only under its lease can the thread be given
    back.
    """
    if row.saga == COMPENSATING:
        return  # it is about to end, and not before all is undone
    if row.cancel_requested_at is None:
        changes["cancellation"] = payloads.dump(dict(facts), runs.c.cancellation, row)
    if row.status != RunStatus.RUNNING:
        cancel(connection, payloads, row, now, facts, **changes)
    elif row.cancel_requested_at is None:
        event = NewEvent(type="run.cancel_requested", data=facts)
        changes["cancel_requested_at"] = now
        change_run(connection, row, payloads, now, log=[event], **changes)
    elif any(row._mapping[name] != value for name, value in changes.items()):
        event = NewEvent(type="run.cancel_requested", data=facts)
        change_run(connection, row, payloads, now, log=[event], **changes)


def honour_cancel(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> bool:
    """End a run whose cancellation was requested while it ran; say whether it was."""
    if row.cancel_requested_at is None:
        return False
    cancel(connection, payloads, row, now, payloads.load(runs.c.cancellation, row) or {})
    return True


def fire_due(connection: Connection, payloads: Payloads, tenant: str, limit: int) -> int:
    """See `RunStore.fire_due`."""
    now = database_now(connection)
    at = payloads.time(now)
    missed = _lock_due(connection, tenant, _missed_start(at), runs.c.start_deadline_at, limit)
    for row in missed:
        facts = {"reason": "start_deadline", "by": None}
        sealed = payloads.dump(facts, runs.c.cancellation, row)
        cancel(connection, payloads, row, now, facts, cancellation=sealed)
    room = limit - len(missed)
    overdue = _lock_due(connection, tenant, _is_overdue(at), runs.c.deadline_at, room)
    for row in overdue:
        _fail_overdue(connection, payloads, row, now)
    return len(missed) + len(overdue)


def has_due(connection: Connection, payloads: Payloads, tenant: str) -> bool:
    """Whether `fire_due` would find anything; reads only."""
    now = database_now(connection)
    at = payloads.time(now)
    return any(
        connection.execute(
            sa.select(runs.c.seq).where(runs.c.tenant == tenant, condition, is_sound()).limit(1)
        ).first()
        for condition in (_missed_start(at), _is_overdue(at))
    )


def _lock_due(
    connection: Connection,
    tenant: str,
    condition: sa.ColumnElement[bool],
    order: sa.Column[Any],
    limit: int,
) -> list[sa.Row[Any]]:
    query = (
        sa.select(runs)
        .where(runs.c.tenant == tenant, condition, is_sound())
        .order_by(order)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return list(connection.execute(query).all())


def _missed_start(at: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(
        runs.c.status == sa.literal_column("'queued'"),
        runs.c.start_deadline_at.is_not(None),
        runs.c.start_deadline_at <= at,
    )


def _is_overdue(at: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(
        sa.literal_column("status IN ('queued', 'waiting')"),
        runs.c.deadline_at.is_not(None),
        runs.c.deadline_at <= at,
    )


def _fail_overdue(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> None:
    if row.status == RunStatus.QUEUED:
        # The table of statuses has no other way. Nobody else sees it: it is one transaction.
        change_run(connection, row, payloads, now, status=RunStatus.RUNNING)
        row = get_run(connection, row.tenant, row.run_id, lock=True)
    error = DeadlineExceededError(row.run_id, row.deadline_at.isoformat())
    failure = RunFailure(
        type=f"{type(error).__module__}.{type(error).__qualname__}",
        message=str(error),
        attempt=row.attempt,
    )
    fail(
        connection,
        payloads,
        row,
        failure,
        now,
        reason="deadline",
        checkpoint_id=row.checkpoint_id,
        step=row.step,
        waits=WaitStatus.EXPIRED,
    )
