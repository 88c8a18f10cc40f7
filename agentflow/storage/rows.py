"""Rows of the run store's tables as records, and the one way to change a run.

`change_run` is the only function that updates a run: it checks the table of statuses and appends
the audit events in the same statement group, numbered and chained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import Codec
from agentflow.database.tables import dead_letters, events, runs, waits
from agentflow.errors import (
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
)
from agentflow.types import (
    TRANSITIONS,
    Approval,
    AuditEvent,
    DeadLetter,
    Lease,
    NewEvent,
    Run,
    RunStatus,
    WaitStatus,
)

GENESIS = "0" * 64
"""What the first event of a run names as the hash before it."""

UNFINISHED = (RunStatus.QUEUED.value, RunStatus.RUNNING.value, RunStatus.WAITING.value)


@dataclass(frozen=True, slots=True)
class Payloads:
    """The two codecs of the store: one to run with, one to look with."""

    strict: Codec
    """For what a graph gets: every class must be known here."""
    lenient: Codec
    """For what is shown: classes that are not known here come as typed plain data."""

    def dump(self, value: Any, column: str) -> bytes:
        """Encode a payload of a column."""
        return self.strict.dumps(value, where=column)

    def load(self, data: bytes | None, column: str, *, strict: bool = False) -> Any:
        """Decode a payload of a column; `None` stays `None`."""
        if data is None:
            return None
        codec = self.strict if strict else self.lenient
        return codec.loads(data, where=column)


def to_run(row: sa.Row[Any], payloads: Payloads, *, strict: bool = False) -> Run:
    """Build the record of a run; `strict` refuses an input with classes that are not known."""
    return Run(
        id=row.run_id,
        thread_id=row.thread_id,
        tenant=row.tenant,
        graph=row.graph,
        version=row.version,
        queue=row.queue,
        status=RunStatus(row.status),
        input=payloads.load(row.input, "runs.input", strict=strict),
        output=payloads.load(row.output, "runs.output"),
        error=payloads.load(row.error, "runs.error"),
        metadata=payloads.load(row.metadata, "runs.metadata"),
        config=payloads.load(row.config, "runs.config", strict=strict),
        priority=row.priority,
        attempt=row.attempt,
        claims=row.claims,
        step=row.step,
        checkpoint_id=row.checkpoint_id,
        dead_letter=row.is_dead_letter,
        created_at=row.created_at,
        available_at=row.available_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        cancel_requested_at=row.cancel_requested_at,
        submitted_by=row.submitted_by,
    )


def to_approval(row: sa.Row[Any], payloads: Payloads) -> Approval:
    """Build the record of a wait."""
    return Approval(
        id=row.wait_id,
        run_id=row.run_id,
        thread_id=row.thread_id,
        tenant=row.tenant,
        graph=row.graph,
        ns=row.ns,
        task_id=row.task_id,
        interrupt_id=row.interrupt_id,
        checkpoint_id=row.checkpoint_id,
        answers_recorded=row.answers_recorded,
        kind=row.kind,
        request=payloads.load(row.request, "waits.request"),
        proposal_hash=row.proposal_hash,
        version=row.version,
        status=WaitStatus(row.status),
        created_at=row.created_at,
        decision=payloads.load(row.decision, "waits.decision"),
        decided_by=row.decided_by,
        decided_at=row.decided_at,
        comment=payloads.load(row.comment, "waits.comment"),
    )


def to_event(row: sa.Row[Any], payloads: Payloads) -> AuditEvent:
    """Build the record of an audit event."""
    return AuditEvent(
        run_id=row.run_id,
        seq=row.seq,
        type=row.type,
        at=row.at,
        data=payloads.load(row.data, "events.data"),
        prev_hash=row.prev_hash,
        hash=row.hash,
    )


def to_dead_letter(row: sa.Row[Any], payloads: Payloads) -> DeadLetter:
    """Build the record of a dead letter."""
    return DeadLetter(
        run_id=row.run_id,
        at=row.at,
        cause=payloads.load(row.cause, "dead_letters.cause"),
        attempts=row.attempts,
        claims=row.claims,
        checkpoint_id=row.checkpoint_id,
    )


def find_run(connection: Connection, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any] | None:
    """Read a run's row, locked against other transitions if asked."""
    query = sa.select(runs).where(runs.c.tenant == tenant, runs.c.run_id == run_id)
    return connection.execute(query.with_for_update() if lock else query).first()


def get_run(connection: Connection, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any]:
    """Read a run's row; `NotFoundError` if there is none."""
    row = find_run(connection, tenant, run_id, lock=lock)
    if row is None:
        raise NotFoundError("run", run_id)
    return row


def get_held_run(connection: Connection, lease: Lease, now: datetime) -> sa.Row[Any]:
    """Read and lock the run of a lease; `LeaseLostError` unless the lease still holds."""
    row = get_run(connection, lease.tenant, lease.run_id, lock=True)
    if not is_held(row, lease, now):
        raise LeaseLostError(lease.run_id, lease.token)
    return row


def is_held(row: sa.Row[Any], lease: Lease, now: datetime) -> bool:
    """Whether the run is running under this very lease, and the lease has not expired."""
    return (
        row.status == RunStatus.RUNNING
        and row.token == lease.token
        and row.lease_expires_at is not None
        and row.lease_expires_at > now
    )


RELEASED: Mapping[str, Any] = {"worker": None, "lease_expires_at": None}
"""The columns of a run that nobody holds."""


def change_run(
    connection: Connection,
    row: sa.Row[Any],
    payloads: Payloads,
    now: datetime,
    *,
    status: RunStatus | None = None,
    log: Sequence[NewEvent] = (),
    **values: Any,
) -> None:
    """Update a locked run and append its audit events.

    Raises:
        IllegalTransitionError: The table of statuses does not allow the change.
    """
    if status is not None:
        check_transition(row.run_id, RunStatus(row.status), status)
        values["status"] = status.value
        if status.is_ended:
            values["ended_at"] = now
    seq, previous = row.event_seq, row.event_hash
    entries = []
    for event in log:
        seq += 1
        data = payloads.dump(dict(event.data), "events.data")
        entry = {
            "tenant": row.tenant,
            "run_id": row.run_id,
            "seq": seq,
            "type": event.type,
            "at": now,
            "data": data,
            "prev_hash": previous,
        }
        entry["hash"] = previous = hash_event(entry)
        entries.append(entry)
    if entries:
        connection.execute(sa.insert(events), entries)
    connection.execute(
        sa.update(runs)
        .where(runs.c.tenant == row.tenant, runs.c.run_id == row.run_id)
        .values(event_seq=seq, event_hash=previous, **values)
    )


def check_transition(run_id: str, current: RunStatus, wanted: RunStatus) -> None:
    """Raise `IllegalTransitionError` unless the table of statuses allows the change."""
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransitionError(run_id, current.value, wanted.value)


def hash_event(entry: Mapping[str, Any]) -> str:
    """Return the hash that chains an event to the one before it, over all of its columns."""
    head = "\x1f".join(
        (
            entry["prev_hash"],
            entry["tenant"],
            entry["run_id"],
            str(entry["seq"]),
            entry["type"],
            entry["at"].isoformat(),
        )
    )
    sha = hashlib.sha256(head.encode())
    sha.update(entry["data"])
    return sha.hexdigest()


def withdraw_waits(
    connection: Connection, row: sa.Row[Any], now: datetime, *, status: WaitStatus
) -> list[NewEvent]:
    """Close all pending waits of a run and return the events that say so."""
    pending = _close_waits(
        connection,
        [waits.c.tenant == row.tenant, waits.c.run_id == row.run_id],
        now,
        status=status,
    )
    return [NewEvent(type=f"approval.{status.value}", data={"approval": w}) for w in pending]


def _close_waits(
    connection: Connection,
    conditions: Sequence[sa.ColumnElement[bool]],
    now: datetime,
    *,
    status: WaitStatus,
) -> list[str]:
    pending = [*conditions, waits.c.status == WaitStatus.PENDING.value]
    ids = connection.execute(sa.select(waits.c.wait_id).where(*pending)).scalars().all()
    if ids:
        connection.execute(
            sa.update(waits).where(*pending).values(status=status.value, decided_at=now)
        )
    return list(ids)


def drop_dead_letter(connection: Connection, row: sa.Row[Any]) -> None:
    """Forget the dead letter of a run that is queued again."""
    connection.execute(
        sa.delete(dead_letters).where(
            dead_letters.c.tenant == row.tenant, dead_letters.c.run_id == row.run_id
        )
    )
