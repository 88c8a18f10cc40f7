"""Audit events: numbered, salted, and chained by their hashes, for each run and for each tenant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import envelope_of_version_1
from agentflow.database.prepared import Prepared
from agentflow.database.statements import insert_new
from agentflow.database.tables import events, logs
from agentflow.errors import HashMismatchError
from agentflow.storage.payloads import Keyed, Payloads, mapping_of, place_of
from agentflow.types import AuditEvent, NewEvent

GENESIS = "0" * 64
"""What the first event of a run names as the hash before it."""

LOG = ""
"""What stands for the run in audit events that concern none."""

EVENTS_AT_ONCE = 8
"""How many events one statement inserts at most."""

_SALT_SIZE = 16


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


@cache
def _insert_events(count: int) -> Prepared:
    return Prepared(insert_statement(count))


def insert_statement(count: int) -> sa.Insert:
    """Return the statement that inserts so many events, whose parameters are numbered."""
    names = [column.name for column in events.c]
    return sa.insert(events).values(
        [
            {name: sa.bindparam(f"{name}_{i}", type_=events.c[name].type) for name in names}
            for i in range(count)
        ]
    )


def append_to_log(
    connection: Connection, payloads: Payloads, tenant: str, now: datetime, event: NewEvent
) -> None:
    """Append an event that concerns no run to the tenant's own log, which is locked."""
    log = mapping_of(lock_log(connection, tenant))
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
    for begin in range(0, len(entries), EVENTS_AT_ONCE):
        some = entries[begin : begin + EVENTS_AT_ONCE]
        _insert_events(len(some)).run(connection, numbered(some))


def numbered(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters of `insert_statement` for rows of events."""
    return {f"{name}_{i}": row[name] for i, row in enumerate(entries) for name in row}


def hash_event(event: Keyed, payloads: Payloads) -> str:
    """Return the hash that a stored event must have, over all of its columns.

    It covers the data as it was before it was sealed, so that another key changes nothing.
    """
    body = payloads.unseal(events.c.data, event)
    data = payloads.lenient.deserialize(body)
    # Events of codec version 1 have no salt, and their hash covers the envelope.
    covered = envelope_of_version_1(body) if isinstance(data, dict) else body
    return _hash_event(mapping_of(event), covered)


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
