"""Rows of the run store's tables as records, and the one way to change a run.

`change_run` is the only function that updates a run: it checks the table of statuses and appends
the audit events in the same statement group, numbered and chained.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import Codec, context_of, envelope_of_version_1
from agentflow.database.engine import StoreNow
from agentflow.database.prepared import On, Prepared
from agentflow.database.statements import insert_new, insert_of
from agentflow.database.tables import (
    dead_letters,
    effects,
    events,
    fingerprints,
    logs,
    pauses,
    runs,
    waits,
)
from agentflow.errors import (
    CodecError,
    HashMismatchError,
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
    PayloadTooLargeError,
)
from agentflow.storage.marks import RUN, marked, wait_event
from agentflow.types import (
    TRANSITIONS,
    AuditEvent,
    Clock,
    DeadLetter,
    Lease,
    NewEvent,
    Run,
    RunStatus,
    WaitStatus,
)

GENESIS = "0" * 64
"""What the first event of a run names as the hash before it."""

KEYS: Mapping[str, tuple[str, ...]] = {
    runs.name: ("tenant", "run_id"),
    waits.name: ("tenant", "wait_id"),
    events.name: ("tenant", "run_id", "seq"),
    dead_letters.name: ("tenant", "run_id"),
    pauses.name: ("tenant", "scope", "name"),
    effects.name: ("tenant", "effect_id"),
    fingerprints.name: ("tenant", "digest"),
}
"""By table, the columns that say whose a payload is; it opens nowhere else."""

_SALT_SIZE = 16
_EVENTS_AT_ONCE = 8

M = TypeVar("M", bound=StrEnum)
Column = sa.Column[Any]

Keyed = sa.Row[Any] | Mapping[str, Any]
"""A row, or one that is being made, with at least the columns of its key."""

UNFINISHED = (RunStatus.QUEUED.value, RunStatus.RUNNING.value, RunStatus.WAITING.value)


INCOMPATIBLE = "incompatible"
"""Why a run is paused whose graph has changed, and why it is driven once it is resumed."""

LOG = ""
"""What stands for the run in audit events that concern none."""

MAX_PAYLOAD = 32 * 1024 * 1024
"""How many bytes a payload may have before it is compressed, unless a store says otherwise."""


@dataclass(frozen=True, slots=True)
class Payloads:
    """How a store encodes: two codecs, one to run with and one to look with; and its clock."""

    strict: Codec
    """For what a graph gets: every class must be known here."""
    lenient: Codec
    """For what is shown: classes that are not known here come as typed plain data."""
    limit: int = MAX_PAYLOAD
    clock: Clock | None = None
    """Judges times of starting, backoff and deadlines; by default the database's clock does."""

    def time(self, now: datetime) -> datetime:
        """Return the time that timers go by when the database's clock shows `now`."""
        return now if self.clock is None else self.clock.now()

    def dump(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload for its column of a row."""
        return self.seal(self.body(value, column, row), column, row)

    def body(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload that is not too large, without its envelope."""
        body = self.serialize(self.redacted(value, column), column, row)
        if len(body) > self.limit:
            raise PayloadTooLargeError(len(body), self.limit, place_of(column, row))
        return body

    def load(self, column: Column, row: Keyed, *, strict: bool = False) -> Any:
        """Decode the payload in a column of a row; `None` stays `None`."""
        data = _mapping(row)[column.name]
        if data is None:
            return None
        codec, context = self.strict if strict else self.lenient, context_in(column, row)
        try:
            return codec.loads(data, context=context)
        except CodecError:
            # To name the place takes longer than all the rest: only if there is something to say.
            return codec.loads(data, context=context, where=place_of(column, row))

    def redacted(self, value: Any, column: Column) -> Any:
        """Return what is to be stored of a payload."""
        redact = self.strict.redact
        return value if redact is None else redact(_name(column), value)

    def serialize(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload without its envelope."""
        return self.strict.serialize(value, where=place_of(column, row))

    def seal(self, body: bytes, column: Column, row: Keyed) -> bytes:
        """Put what was encoded into an envelope that opens only in this column of this row."""
        return self.strict.seal(body, context_in(column, row))

    def unseal(self, column: Column, row: Keyed) -> bytes:
        """Open the envelope in a column of a row."""
        data = _mapping(row)[column.name]
        return self.strict.unseal(data, context_in(column, row), where=place_of(column, row))


def context_in(column: Column, row: Keyed) -> bytes:
    """Return the context of a payload: its table and column, and the key of its row."""
    return context_of(_name(column), *_key(column, row))


def _key(column: Column, row: Keyed) -> list[Any]:
    found = row._mapping if isinstance(row, sa.Row) else row
    return [found[name] for name in _columns_of_key(column)]


def _mapping(row: Keyed) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", row._mapping) if isinstance(row, sa.Row) else row


@cache
def _columns_of_key(column: Column) -> tuple[str, ...]:
    return KEYS[column.table.name]


@cache
def _name(column: Column) -> str:
    return f"{column.table.name.removeprefix('agentflow_')}.{column.name}"


def place_of(column: Column, row: Keyed) -> str:
    """Name a payload in messages."""
    tenant, *names = _key(column, row)
    of_tenant = f" of tenant {tenant!r}" if tenant else ""
    return f"{_name(column)} of {', '.join(map(repr, names))}{of_tenant}"


def member_of(kind: type[M], column: Column, row: Keyed) -> M:
    """Return what stands in a column of a closed set.

    Raises:
        HashMismatchError: It is none of the set.
    """
    try:
        return kind(_mapping(row)[column.name])
    except ValueError as exc:
        raise HashMismatchError(place_of(column, row), f"it is no {kind.__name__}") from exc


def to_run(row: sa.Row[Any], payloads: Payloads, *, strict: bool = False) -> Run:
    """Build the record of a run; `strict` refuses an input with classes that are not known."""
    cancellation = payloads.load(runs.c.cancellation, row) or {}
    return Run(
        id=row.run_id,
        thread_id=row.thread_id,
        tenant=row.tenant,
        graph=row.graph,
        version=row.version,
        queue=row.queue,
        status=member_of(RunStatus, runs.c.status, row),
        input=payloads.load(runs.c.input, row, strict=strict),
        output=payloads.load(runs.c.output, row),
        error=payloads.load(runs.c.error, row),
        metadata=payloads.load(runs.c.metadata, row),
        config=payloads.load(runs.c.config, row, strict=strict),
        priority=row.priority,
        attempt=row.attempt,
        claims=row.claims,
        losses=row.losses or 0,
        step=row.step,
        checkpoint_id=row.checkpoint_id,
        resume_from=row.resume_from,
        retry=payloads.load(runs.c.retry, row),
        dead_letter=row.is_dead_letter,
        created_at=row.created_at,
        available_at=row.available_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        paused_at=row.paused_at,
        start_deadline_at=row.start_deadline_at,
        deadline_at=row.deadline_at,
        cancel_requested_at=row.cancel_requested_at,
        cancel_reason=cancellation.get("reason"),
        submitted_by=row.submitted_by,
        root_id=row.root,
        forked_from=row.forked_from,
        effect_shift=row.effect_shift or 0,
        saga=row.saga,
        saga_cause=payloads.load(runs.c.saga_cause, row),
        fingerprint=row.fingerprint,
    )


def to_event(row: sa.Row[Any], payloads: Payloads) -> AuditEvent:
    """Build the record of an audit event."""
    return AuditEvent(
        run_id=row.run_id,
        seq=row.seq,
        type=row.type,
        at=row.at,
        data=_event_data(payloads.load(events.c.data, row)),
        prev_hash=row.prev_hash,
        hash=row.hash,
    )


def to_dead_letter(row: sa.Row[Any], payloads: Payloads) -> DeadLetter:
    """Build the record of a dead letter."""
    return DeadLetter(
        run_id=row.run_id,
        thread_id=row.thread_id,
        graph=row.graph,
        version=row.version,
        at=row.at,
        reason=row.reason,
        cause=payloads.load(dead_letters.c.cause, row),
        attempts=row.attempts,
        claims=row.claims,
        step=row.step,
        checkpoint_id=row.checkpoint_id,
    )


# Nearly every verb begins with one of them.
_OF_RUN = (runs.c.tenant == sa.bindparam("tenant"), runs.c.run_id == sa.bindparam("run_id"))
_FIND_RUN = Prepared(sa.select(runs).where(*_OF_RUN))
_LOCK_RUN = Prepared(sa.select(runs, StoreNow().label("now")).where(*_OF_RUN).with_for_update())


def find_run(connection: On, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any] | None:
    """Read a run's row, locked against other transitions if asked.

    A locked row has one column more, the time of the database's clock (`now`).
    """
    named = {"tenant": tenant, "run_id": run_id}
    return (_LOCK_RUN if lock else _FIND_RUN).first(connection, named)


def get_run(connection: On, tenant: str, run_id: str, *, lock: bool) -> sa.Row[Any]:
    """Read a run's row; `NotFoundError` if there is none."""
    row = find_run(connection, tenant, run_id, lock=lock)
    if row is None:
        raise NotFoundError("run", run_id)
    return row


def get_held_run(connection: Connection, lease: Lease, now: datetime | None = None) -> sa.Row[Any]:
    """Read and lock the run of a lease; `LeaseLostError` unless the lease still holds.

    It is judged by the row's `now`, unless a time is given.
    """
    row = get_run(connection, lease.tenant, lease.run_id, lock=True)
    if not is_held(row, lease, now or row.now):
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


RELEASED: Mapping[str, Any] = {
    "worker": None,
    "instance": None,
    "lease_expires_at": None,
    "is_isolated": None,
}
"""The columns of a run that nobody holds."""

CLEARED: Mapping[str, Any] = {
    "attempt": 0,
    "losses": 0,
    "has_loss_counted": None,
    "pardoned": None,
}
"""What counts attempts, of a run with a new budget."""


class Beside(NamedTuple):
    """Another change, made in the same statement as that of a run where there is one for both."""

    change: sa.Update
    parameters: Mapping[str, Any]
    """Named differently from the columns of runs."""


@cache
def _update_run(columns: tuple[str, ...], events_before: int = 0, *beside: sa.Update) -> Prepared:
    """Return the statement that sets these columns of a run; verbs have few such sets.

    On PostgreSQL it may insert events as well, whose parameters are numbered, and make other
    changes beside that.
    """
    statement = (
        sa.update(runs)
        .where(
            runs.c.tenant == sa.bindparam("of_tenant"), runs.c.run_id == sa.bindparam("of_run_id")
        )
        .values({name: sa.bindparam(name, type_=runs.c[name].type) for name in columns})
    )
    if events_before:
        statement = statement.add_cte(_insert(events_before).cte("log"))
    for i, change in enumerate(beside):
        statement = statement.add_cte(change.returning(sa.literal_column("1")).cte(f"beside_{i}"))
    return Prepared(statement)


@cache
def _prepared(change: sa.Update) -> Prepared:
    return Prepared(change)


@cache
def _insert_events(count: int) -> Prepared:
    return Prepared(_insert(count))


def _insert(count: int) -> sa.Insert:
    """Return the statement that inserts so many events, whose parameters are numbered."""
    names = [column.name for column in events.c]
    return sa.insert(events).values(
        [
            {name: sa.bindparam(f"{name}_{i}", type_=events.c[name].type) for name in names}
            for i in range(count)
        ]
    )


def change_run(
    connection: Connection,
    row: sa.Row[Any],
    payloads: Payloads,
    now: datetime,
    *,
    status: RunStatus | None = None,
    log: Sequence[NewEvent] = (),
    beside: Sequence[Beside] = (),
    **values: Any,
) -> None:
    """Update a locked run and append its audit events, with what is to be changed beside it.

    What changes without one, of columns that are marked, is to be followed by one in the same
    transaction.

    Raises:
        IllegalTransitionError: The table of statuses does not allow the change.
    """
    if status is not None:
        check_transition(row.run_id, member_of(RunStatus, runs.c.status, row), status)
        values["status"] = status.value
        if status.is_ended:
            values["ended_at"] = now
    if log:
        log = [
            *log[:-1],
            marked(log[-1], RUN, runs, {**dict(zip(row._fields, row, strict=True)), **values}),
        ]
    entries, end = chain_events(payloads, _mapping(row), row.run_id, log, now)
    changed = {**end, **values}
    columns = tuple(sorted(changed))
    named = {"of_tenant": row.tenant, "of_run_id": row.run_id, **changed}
    if connection.dialect.name == "postgresql" and 0 < len(entries) <= _EVENTS_AT_ONCE:
        # Each statement is a round trip.
        update = _update_run(columns, len(entries), *(each.change for each in beside))
        named |= _numbered(entries)
        for each in beside:
            named |= each.parameters
        update.run(connection, named)
        return
    for each in beside:
        _prepared(each.change).run(connection, each.parameters)
    insert_events(connection, entries)
    _update_run(columns).run(connection, named)


@cache
def _insert_run(dialect: str, columns: tuple[str, ...], events_behind: int = 0) -> Prepared:
    """Return the statement that inserts a run with these columns, unless its id is known.

    On PostgreSQL it may insert events as well, whose parameters are numbered.
    """
    made = (
        insert_of(dialect, runs)
        .values({name: sa.bindparam(name, type_=runs.c[name].type) for name in columns})
        .on_conflict_do_nothing(index_elements=["tenant", "run_id"])
        .returning(runs.c.run_id)
    )
    if not events_behind:
        return Prepared(made)
    names = [column.name for column in events.c]
    row = made.cte("made")
    entries = [
        sa.select(
            *(sa.bindparam(f"{name}_{i}", type_=events.c[name].type).label(name) for name in names)
        ).select_from(row)
        for i in range(events_behind)
    ]
    return Prepared(sa.insert(events).from_select(names, sa.union_all(*entries)))


def insert_run(
    connection: Connection,
    payloads: Payloads,
    row: Mapping[str, Any],
    now: datetime,
    log: Sequence[NewEvent],
) -> bool:
    """Insert a run that has no events yet, with its first ones; say whether its id was new."""
    log = [*log[:-1], marked(log[-1], RUN, runs, row)]
    entries, end = chain_events(payloads, row, row["run_id"], log, now)
    new, dialect = {**row, **end}, connection.dialect.name
    columns = tuple(sorted(new))
    if dialect == "postgresql" and len(entries) <= _EVENTS_AT_ONCE:
        # Each statement is a round trip.
        insert = _insert_run(dialect, columns, len(entries))
        return insert.run(connection, {**new, **_numbered(entries)}) > 0
    is_new = _insert_run(dialect, columns).first(connection, new) is not None
    if is_new:
        insert_events(connection, entries)
    return is_new


def append_to_log(
    connection: Connection, payloads: Payloads, tenant: str, now: datetime, event: NewEvent
) -> None:
    """Append an event that concerns no run to the tenant's own log, which is locked."""
    log = _mapping(lock_log(connection, tenant))
    end = append_events(connection, payloads, log, LOG, [event], now)
    connection.execute(sa.update(logs).where(logs.c.tenant == tenant).values(**end))


def lock_log(connection: Connection, tenant: str) -> sa.Row[Any]:
    """Lock the tenant's own log, and so all else that happens to the tenant as a whole."""
    query = sa.select(logs).where(logs.c.tenant == tenant).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        first = {"tenant": tenant, "event_seq": 0, "event_hash": GENESIS}
        insert_new(connection, logs, [first])
        row = connection.execute(query).one()
    return row


def append_events(
    connection: Connection,
    payloads: Payloads,
    end: Mapping[str, Any],
    run_id: str,
    log: Sequence[NewEvent],
    now: datetime,
) -> dict[str, Any]:
    """Insert events behind the end of a chain, and return its new end.

    The end has the columns `tenant`, `event_seq` and `event_hash`.
    """
    entries, new_end = chain_events(payloads, end, run_id, log, now)
    insert_events(connection, entries)
    return new_end


def chain_events(
    payloads: Payloads,
    end: Mapping[str, Any],
    run_id: str,
    log: Sequence[NewEvent],
    now: datetime,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of events behind the end of a chain, and its new end."""
    seq, previous = end["event_seq"], end["event_hash"]
    entries = []
    for event in log:
        seq += 1
        entry = {
            "tenant": end["tenant"],
            "run_id": run_id,
            "seq": seq,
            "type": event.type,
            "at": now,
            "prev_hash": previous,
        }
        data = payloads.redacted(dict(event.data), events.c.data)
        # The hash is there for all to see: salted, it does not tell whether a guess is right.
        parts = [os.urandom(_SALT_SIZE), data, *([dict(event.marks)] if event.marks else ())]
        body = payloads.serialize(parts, events.c.data, entry)
        entry["data"] = payloads.seal(body, events.c.data, entry)
        entry["hash"] = previous = _hash_event(entry, body)
        entries.append(entry)
    return entries, {"event_seq": seq, "event_hash": previous}


def insert_events(connection: Connection, entries: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of events."""
    for begin in range(0, len(entries), _EVENTS_AT_ONCE):
        some = entries[begin : begin + _EVENTS_AT_ONCE]
        _insert_events(len(some)).run(connection, _numbered(some))


def _numbered(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}_{i}": row[name] for i, row in enumerate(entries) for name in row}


def check_transition(run_id: str, current: RunStatus, wanted: RunStatus) -> None:
    """Raise `IllegalTransitionError` unless the table of statuses allows the change."""
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransitionError(run_id, current.value, wanted.value)


def hash_event(event: Keyed, payloads: Payloads) -> str:
    """Return the hash that a stored event must have, over all of its columns.

    It covers the data as it was before it was sealed, so that another key changes nothing.
    """
    body = payloads.unseal(events.c.data, event)
    data = payloads.lenient.deserialize(body)
    # Events of codec version 1 have no salt, and their hash covers the envelope.
    covered = envelope_of_version_1(body) if isinstance(data, dict) else body
    return _hash_event(_mapping(event), covered)


def _hash_event(entry: Mapping[str, Any], covered: bytes) -> str:
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
    sha.update(covered)
    return sha.hexdigest()


def _event_data(stored: Any) -> Any:
    """Take the salt off; events of codec version 1 have none."""
    return stored if isinstance(stored, dict) else stored[1]


def marks_of(row: Keyed, payloads: Payloads) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """Return what an event says, and the marks of the rows that it has changed."""
    match payloads.load(events.c.data, row):
        case [_, dict() as data, dict() as marks]:
            return data, marks
        # As agentflow stored it before there were marks, and at first without a salt.
        case [_, dict() as data] | (dict() as data):
            return data, {}
    raise HashMismatchError(place_of(events.c.data, row), "it is no event")


_CLOSE_WAITS = Prepared(
    sa.update(waits)
    .where(
        waits.c.tenant == sa.bindparam("of_tenant"),
        waits.c.run_id == sa.bindparam("of_run_id"),
        waits.c.status == sa.literal_column("'pending'"),
    )
    .values(
        {
            "status": sa.bindparam("status"),
            "decided_at": sa.bindparam("decided_at", type_=waits.c.decided_at.type),
        }
    )
    .returning(waits)
)


def withdraw_waits(
    connection: Connection, row: sa.Row[Any], now: datetime, *, status: WaitStatus
) -> list[NewEvent]:
    """Close all pending waits of a run and return the events that say so."""
    closed = _CLOSE_WAITS.all(
        connection,
        {
            "of_tenant": row.tenant,
            "of_run_id": row.run_id,
            "status": status.value,
            "decided_at": now,
        },
    )
    return [
        wait_event(status.value, wait._mapping)
        for wait in sorted(closed, key=lambda wait: wait.seq)
    ]
