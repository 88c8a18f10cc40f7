"""A run with all that is stored of it, as plain data: out of one database, into another.

Payloads stay sealed as they are: they open in the same place of the same tenant, under the same
keys. What has a number of its own in a database gets a new one in the other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_new
from agentflow.database.tables import (
    Length,
    Timestamp,
    dead_letters,
    events,
    fingerprints,
    runs,
    waits,
)
from agentflow.errors import (
    AgentflowError,
    ConflictError,
    HashMismatchError,
    InvalidInputError,
)
from agentflow.storage.claims import lock_thread
from agentflow.storage.rows import (
    GENESIS,
    RELEASED,
    UNFINISHED,
    Payloads,
    change_run,
    find_run,
    get_run,
    hash_event,
    to_run,
)
from agentflow.types import NewEvent, Run, RunStatus

_TABLES = {
    "run": runs,
    "waits": waits,
    "events": events,
    "dead_letters": dead_letters,
    "fingerprints": fingerprints,
}
_OWN = ("run_id", "tenant")
_NUMBERED = frozenset({runs.name, waits.name})
"""Tables whose `seq` is a number of the database's; that of events is part of the run."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LEASE = frozenset({*RELEASED, "token", "claimed_at"})


def get_rows(
    connection: Connection, payloads: Payloads, tenant: str, run_id: str
) -> dict[str, Any]:
    """See `RunStore.get_rows`."""
    row = get_run(connection, tenant, run_id, lock=False)
    if row.status == RunStatus.RUNNING:
        raise ConflictError(
            f"run {run_id!r} is being driven; wait until it is parked, or pause it, and call again"
        )
    del payloads
    found: dict[str, Any] = {}
    for name, table in _TABLES.items():
        query = sa.select(table).where(table.c.tenant == tenant)
        if table is fingerprints:
            query = query.where(table.c.graph == row.graph)
        else:
            query = query.where(table.c.run_id == run_id)
        order = [table.c.seq] if "seq" in table.c else list(table.primary_key.columns)
        rows = connection.execute(query.order_by(*order)).mappings()
        found[name] = [_packed(table, each) for each in rows]
    return found


def import_run(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    given: Mapping[str, Any],
    *,
    by: str | None,
    origin: str,
) -> Run:
    """See `RunStore.import_run`."""
    now = database_now(connection)
    found = {
        name: [_unpacked(table, each) for each in given[name]] for name, table in _TABLES.items()
    }
    run = found["run"][0]
    run_id, thread_id = run["run_id"], run["thread_id"]
    if find_run(connection, tenant, run_id, lock=True) is not None:
        raise ConflictError(f"run {run_id!r} is there already; nothing was imported")
    lock_thread(connection, tenant, thread_id)
    busy = sa.select(runs.c.run_id).where(
        runs.c.tenant == tenant,
        runs.c.thread_id == thread_id,
        runs.c.status.in_(UNFINISHED),
    )
    if connection.execute(busy).first() is not None:
        raise ConflictError(f"thread {thread_id!r} has unfinished runs here; nothing was imported")
    _verify(payloads, run, found["events"])
    for name in ("run", "waits", "events", "dead_letters"):
        if found[name]:
            connection.execute(sa.insert(_TABLES[name]), found[name])
    _add_fingerprints(connection, found["fingerprints"])
    row = get_run(connection, tenant, run_id, lock=True)
    event = NewEvent(type="run.imported", data={"by": by, "origin": origin})
    change_run(connection, row, payloads, now, log=[event])
    final = get_run(connection, tenant, run_id, lock=False)
    # Read whole, so that what cannot be read here is not let in.
    return to_run(final, payloads)


def _add_fingerprints(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        insert_new(connection, fingerprints, rows)


def _verify(payloads: Payloads, run: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """Verify that the events are all there are, and those of this run."""
    where = f"events of {run['run_id']!r}"
    previous, number = GENESIS, 0
    for event in log:
        number += 1
        is_next = event["seq"] == number and event["prev_hash"] == previous
        is_own = all(event[name] == run[name] for name in _OWN)
        if not is_next or not is_own or hash_event(event, payloads) != event["hash"]:
            raise HashMismatchError(f"event {number} of {run['run_id']!r}")
        previous = event["hash"]
    if (run["event_seq"], run["event_hash"]) != (number, previous):
        raise HashMismatchError(where)


def _packed(table: sa.Table, row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row as JSON has it, without what belongs to the database that it is in."""
    made = {}
    for column in table.c:
        value = row[column.name]
        if table is runs and column.name in _LEASE:
            value = None
        if value is None or (column.name == "seq" and table.name in _NUMBERED):
            continue
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        elif isinstance(value, datetime):
            value = (value - _EPOCH) // _MICROSECOND
        elif isinstance(value, timedelta):
            value = value // _MICROSECOND
        made[column.name] = value
    return made


def _unpacked(table: sa.Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the database takes it.

    Raises:
        InvalidInputError: It has what this program's tables do not.
        HashMismatchError: It is no row.
    """
    unknown = set(row) - {column.name for column in table.c}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InvalidInputError(
            "exported run",
            (f"{table.name}: {names} are not known to this program; upgrade agentflow here",),
        )
    made: dict[str, Any] = {}
    try:
        for column in table.c:
            if column.name == "seq" and table.name in _NUMBERED:
                continue
            value = row.get(column.name)
            if value is not None and isinstance(column.type, sa.LargeBinary):
                value = base64.b64decode(value, validate=True)
            elif value is not None and isinstance(column.type, Timestamp):
                value = _EPOCH + value * _MICROSECOND
            elif value is not None and isinstance(column.type, Length):
                value = value * _MICROSECOND
            made[column.name] = value
    except (AgentflowError, TypeError, ValueError, binascii.Error) as exc:
        raise HashMismatchError(f"a row of {table.name}", "it is none") from exc
    return made
