"""Dead letters: listed, requeued once, or discarded."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.tables import dead_letters, runs
from agentflow.errors import InvalidInputError, NotDeadLetterError
from agentflow.storage.endings import COMPENSATING
from agentflow.storage.pages import to_page
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import CLEARED, change_run, get_run, to_dead_letter, to_run
from agentflow.types import FROM_START, DeadLetter, NewEvent, Page, Run, RunStatus


def list_dead_letters(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    *,
    graph: str | None,
    reason: str | None,
    limit: int,
    cursor: str | None,
) -> Page[DeadLetter]:
    """See `RunStore.list_dead_letters`."""
    place = (dead_letters.c.at, dead_letters.c.run_id)
    query = (
        sa.select(dead_letters)
        .where(dead_letters.c.tenant == tenant)
        .order_by(*(column.desc() for column in place))
        .limit(limit + 1)
    )
    if graph is not None:
        query = query.where(dead_letters.c.graph == graph)
    if reason is not None:
        query = query.where(dead_letters.c.reason == reason)
    if cursor is not None:
        at, run_id = _parse_cursor(cursor)
        query = query.where(sa.tuple_(*place) < sa.tuple_(sa.literal(at, place[0].type), run_id))
    rows = connection.execute(query).all()
    next_cursor = _cursor(rows[limit - 1]) if len(rows) > limit > 0 else None
    return to_page(rows[:limit], payloads, to_dead_letter, next_cursor)


def _cursor(row: sa.Row[Any]) -> str:
    return f"{row.at.isoformat()}/{row.run_id}"


def _parse_cursor(cursor: str) -> tuple[datetime, str]:
    at, _, run_id = cursor.partition("/")
    unknown = InvalidInputError("cursor", ("it is not one that a listing returned",))
    try:
        parsed = datetime.fromisoformat(at)
    except ValueError as exc:
        raise unknown from exc
    if parsed.tzinfo is None:
        raise unknown
    return parsed, run_id


def requeue_dead_letter(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    checkpoint_id: str | None,
    by: str | None,
) -> Run:
    """See `RunStore.requeue_dead_letter`."""
    now = database_now(connection)
    row = _get_dead(connection, tenant, run_id)
    requeue(connection, payloads, row, now, checkpoint_id=checkpoint_id, by=by)
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)


def discard_dead_letter(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    reason: str | None,
    by: str | None,
) -> Run:
    """See `RunStore.discard_dead_letter`."""
    now = database_now(connection)
    row = _get_dead(connection, tenant, run_id)
    _drop(connection, row)
    event = NewEvent(type="dead_letter.discarded", data={"reason": reason, "by": by})
    change_run(connection, row, payloads, now, log=[event], is_dead_letter=False)
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)


def requeue(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    *,
    checkpoint_id: str | None,
    by: str | None,
) -> None:
    """Queue a locked, failed run again."""
    _drop(connection, row)
    at = payloads.time(now)
    timeout: timedelta | None = row.timeout
    if checkpoint_id is None and row.saga is not None:
        # Nodes that have finished count on effects that are undone by now.
        checkpoint_id = FROM_START
    elif checkpoint_id is None and _was_overtaken(connection, row):
        # What the thread's head shows by now is another run's state.
        checkpoint_id = row.checkpoint_id
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[NewEvent(type="run.requeued", data={"by": by, "checkpoint": checkpoint_id})],
        wake_reason="requeue",
        available_at=at,
        deadline_at=None if timeout is None else at + timeout,
        failures=None,
        resume_from=checkpoint_id,
        saga=None,
        saga_cause=None,
        is_dead_letter=False,
        ended_at=None,
        **CLEARED,
    )


def undo_again(connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime) -> None:
    """Queue a locked, failed run to have undone what could not be undone before."""
    _drop(connection, row)
    changes = {**CLEARED, "saga": COMPENSATING, "wake_reason": "compensation"}
    change_run(
        connection,
        row,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[NewEvent(type="run.compensating", data={"cause": "failed"})],
        available_at=payloads.time(now),
        is_dead_letter=False,
        ended_at=None,
        **changes,
    )


def _get_dead(connection: Connection, tenant: str, run_id: str) -> sa.Row[Any]:
    row = get_run(connection, tenant, run_id, lock=True)
    if row.status != RunStatus.FAILED or not row.is_dead_letter:
        raise NotDeadLetterError(run_id, row.status)
    return row


def _was_overtaken(connection: Connection, row: sa.Row[Any]) -> bool:
    query = sa.select(runs.c.run_id).where(
        runs.c.tenant == row.tenant,
        runs.c.thread_id == row.thread_id,
        runs.c.run_id != row.run_id,
        runs.c.started_at > row.ended_at,
    )
    return connection.execute(query.limit(1)).first() is not None


def _drop(connection: Connection, row: sa.Row[Any]) -> None:
    connection.execute(
        sa.delete(dead_letters).where(
            dead_letters.c.tenant == row.tenant, dead_letters.c.run_id == row.run_id
        )
    )
