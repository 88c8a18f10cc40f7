"""Whether a run may be given to a worker: it is what its events say, and can be read here.

A damaged run is paused, with an error in the log, so that it neither stops the others nor is looked
at again and again. Once it was put right, whoever resumes it lets it go on.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.tables import events, runs
from agentflow.errors import (
    BlockedTypeError,
    CodecError,
    HashMismatchError,
    KeyUnavailableError,
    UnencryptedValueError,
    UnknownKeyError,
    UnknownVersionError,
)
from agentflow.storage.events import marks_of
from agentflow.storage.marks import RUN, agree, mark
from agentflow.storage.payloads import Payloads, place_of
from agentflow.storage.rows import change_run, to_run
from agentflow.types import NewEvent, Run

logger = logging.getLogger(__name__)

_PUT_OFF = timedelta(minutes=1)
"""How long a run is left alone whose key cannot be had."""

_OF_RUN = (events.c.tenant == runs.c.tenant, events.c.run_id == runs.c.run_id)
_IS_NEWEST = (*_OF_RUN, events.c.seq == runs.c.event_seq)
_IS_NEXT = (*_OF_RUN, events.c.seq == runs.c.event_seq + 1)


def newest_event() -> list[sa.Label[Any]]:
    """Return the columns that `fits` needs beside a run."""
    return [
        sa.select(events.c.data).where(*_IS_NEWEST).correlate(runs).scalar_subquery().label("data"),
        sa.select(events.c.hash).where(*_IS_NEWEST).correlate(runs).scalar_subquery().label("hash"),
        sa.exists().where(*_IS_NEXT).correlate(runs).label("has_next"),
    ]


def is_sound() -> sa.ColumnElement[bool]:
    """Whether the chain of a run ends where the run says, so that an event can be added."""
    return sa.and_(
        _exists(*_IS_NEWEST, events.c.hash == runs.c.event_hash), sa.not_(_exists(*_IS_NEXT))
    )


def _exists(*conditions: sa.ColumnElement[bool]) -> sa.Exists:
    query: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(events).where(*conditions)
    # Keeps PostgreSQL from reading all events at once instead of those of one run.
    return sa.exists(query.correlate(runs).offset(0))


def fits(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    newest: sa.Row[Any],
    now: datetime,
) -> bool:
    """Whether a run that is to be taken is what its newest event says; if not, it is paused.

    Without an event: that would say of what stands there that it is right.
    """
    try:
        _check_newest(payloads, row, newest)
    except (UnknownKeyError, UnencryptedValueError, UnknownVersionError):
        return True  # whoever reads the run is told
    except CodecError as exc:
        _report(row, exc)
        connection.execute(
            sa.update(runs)
            .where(runs.c.seq == row.seq)
            .values(paused_at=now, is_paused_by_failure=True)
        )
        return False
    return True


def read_to_drive(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> Run | None:
    """Read a run that is to be taken; `None` if this worker cannot, or nobody."""
    try:
        return to_run(row, payloads, strict=True)
    except KeyUnavailableError as exc:
        logger.warning("run is put back: its key cannot be had", extra=_facts(row, exc))
        _put_off(connection, payloads, row, now, _unreadable(exc))
    except (BlockedTypeError, UnknownKeyError, UnencryptedValueError):
        # Its classes or its key are not known to this worker; another one may know them.
        pass
    except CodecError as exc:
        _report(row, exc)
        paused = NewEvent(type="run.paused", data={"reason": "unreadable", "by": None})
        log = [_unreadable(exc), paused]
        change_run(
            connection, row, payloads, now, log=log, paused_at=now, is_paused_by_failure=True
        )
    return None


def _unreadable(error: CodecError) -> NewEvent:
    return NewEvent(type="run.unreadable", data={"error": type(error).__name__})


def _report(row: sa.Row[Any], error: CodecError) -> None:
    logger.error("run is paused: it is damaged", extra=_facts(row, error))


def _facts(row: sa.Row[Any], error: CodecError) -> dict[str, str]:
    return {"run_id": row.run_id, "error": type(error).__name__, "reason": str(error)}


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
        available_at=payloads.time(now) + _PUT_OFF,
        lease_expires_at=None if row.lease_expires_at is None else now + _PUT_OFF,
    )


def _check_newest(payloads: Payloads, row: sa.Row[Any], newest: sa.Row[Any]) -> None:
    """Compare a run with its newest event, whose columns are `newest`.

    Raises:
        HashMismatchError: The chain does not end where the run says, or what stands in clear in
            the run is not what it was then.
        CodecError: The event cannot be read.
    """
    key = {"tenant": row.tenant, "run_id": row.run_id, "seq": row.event_seq}
    if newest.hash != row.event_hash or newest.has_next:
        reason = "it is not the last one, or another one"
        raise HashMismatchError(place_of(events.c.data, key), reason)
    _, marks = marks_of({**key, "data": newest.data}, payloads)
    found = mark(runs, dict(zip(row._fields, row, strict=True)))
    if RUN in marks and not agree(marks[RUN], found):
        of_tenant = f" of tenant {row.tenant!r}" if row.tenant else ""
        reason = "what stands there in clear is not what its events say"
        raise HashMismatchError(f"runs of {row.run_id!r}{of_tenant}", reason)
