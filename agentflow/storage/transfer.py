"""A run with all that is stored of it, as plain data: out of one database, into another.

Payloads stay sealed as they are: they open in the same place of the same tenant, under the same
keys. What has a number of its own in a database gets a new one in the other, and the
key of an effect is hashed by the keys of that one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import is_apart
from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_new
from agentflow.database.tables import (
    Length,
    Timestamp,
    dead_letters,
    effects,
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
from agentflow.journal import GLOBAL
from agentflow.storage.effect_objects import open_apart
from agentflow.storage.effect_rows import effect_marks, key_hashes, repack_request, to_effect
from agentflow.storage.events import GENESIS, hash_event
from agentflow.storage.payloads import Payloads
from agentflow.storage.questions import to_approval
from agentflow.storage.rows import RELEASED, UNFINISHED, change_run, find_run, get_run, to_run
from agentflow.storage.tokens import lock_thread
from agentflow.types import NewEvent, Run, RunStatus, WaitStatus
from agentflow.versions import Fingerprint

_TABLES = {
    "run": runs,
    "waits": waits,
    "events": events,
    "dead_letters": dead_letters,
    "fingerprints": fingerprints,
    "effects": effects,
}
_LATER = frozenset({"effects"})
"""What files lack that were made by programs which had none of it."""
_OWN = ("run_id", "tenant")
_NUMBERED = frozenset({runs.name, waits.name, effects.name})
"""Tables whose `seq` is a number of the database's; that of events is part of the run."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PARKED = frozenset({*RunStatus} - {RunStatus.RUNNING})
"""What a run may be that nobody drives."""
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
    _refuse_shared(connection, row)
    found: dict[str, Any] = {}
    for name, table in _TABLES.items():
        query = sa.select(table).where(table.c.tenant == tenant)
        if table is fingerprints:
            query = query.where(table.c.graph == row.graph)
        else:
            query = query.where(table.c.run_id == run_id)
        order = [table.c.seq] if "seq" in table.c else list(table.primary_key.columns)
        rows = connection.execute(query.order_by(*order)).mappings()
        found[name] = [_packed(table, _whole(payloads, table, each)) for each in rows]
    return found


def _whole(payloads: Payloads, table: sa.Table, row: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a row with what stands apart from it in its place: the other database has no object.

    Raises:
        MissingBlobError: It is not there.
    """
    if table is not effects or row["outcome"] is None or not is_apart(row["outcome"]):
        return row
    body = open_apart(payloads, row)
    return {**row, "outcome": payloads.seal(body, effects.c.outcome, row)}


def _refuse_shared(connection: Connection, run: sa.Row[Any]) -> None:
    """Refuse a run whose effects are not its own alone: some would be called again elsewhere.

    Raises:
        ConflictError: Others share the keys of its effects, or it those of others.
    """
    root = run.root or run.run_id
    of_run = sa.and_(effects.c.scope == root, effects.c.run_id == run.run_id)
    query = sa.select(effects).where(
        effects.c.tenant == run.tenant,
        sa.or_(effects.c.scope == root, effects.c.run_id == run.run_id),
        sa.not_(of_run) if root == run.run_id else sa.true(),
    )
    shared = connection.execute(query.order_by(effects.c.seq).limit(1)).first()
    if shared is None:
        return
    what = f"effect {shared.effect_id!r} ({shared.name})"
    if shared.scope == GLOBAL:
        why = "has a key that is unique in the whole tenant"
    elif root != run.run_id:
        why = f"is shared with run {root!r}, of which this is a fork"
    else:
        why = f"was called by its fork {shared.run_id!r}"
    raise ConflictError(
        f"run {run.run_id!r} cannot be exported: {what} {why}, and would be called again "
        "in another database; let the run end here"
    )


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
        name: [
            _unpacked(table, each)
            for each in (given.get(name, ()) if name in _LATER else given[name])
        ]
        for name, table in _TABLES.items()
    }
    _check_own(payloads, tenant, found)
    (run,) = found["run"]
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
    is_known = sa.select(effects.c.seq).where(effects.c.tenant == tenant, effects.c.scope == run_id)
    if connection.execute(is_known.limit(1)).first() is not None:
        raise ConflictError(f"a fork of run {run_id!r} has effects here; nothing was imported")
    marks: dict[str, bytes] = {}
    for effect in found["effects"]:
        marks |= _add_effect(connection, payloads, run, effect)
    _add_fingerprints(connection, found["fingerprints"])
    row = get_run(connection, tenant, run_id, lock=True)
    event = NewEvent(type="run.imported", data={"by": by, "origin": origin}, marks=marks)
    change_run(connection, row, payloads, now, log=[event])
    final = get_run(connection, tenant, run_id, lock=False)
    # Read whole, so that what cannot be read here is not let in.
    is_own = sa.and_(waits.c.tenant == tenant, waits.c.run_id == run_id)
    for wait in connection.execute(sa.select(waits).where(is_own)):
        to_approval(wait, payloads)
    return to_run(final, payloads)


def _check_own(
    payloads: Payloads, tenant: str, found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """See that all rows are those of one run of the tenant, and can be read here."""
    if len(found["run"]) != 1:
        raise HashMismatchError("exported run", "it is not of one run")
    (run,) = found["run"]
    if run["status"] not in _PARKED:
        raise HashMismatchError("exported run", f"it is {run['status']!r}")
    for name, rows in found.items():
        shared = ("tenant", "graph") if name == "fingerprints" else _OWN
        for row in rows:
            if any(row[key] != run[key] for key in shared if key in row) or row["tenant"] != tenant:
                raise HashMismatchError(f"a row of {_TABLES[name].name}", "it is not of this run")
            _check_payloads(payloads, _TABLES[name], row)
    for row in found["fingerprints"]:
        where = f"fingerprint {row['digest']!r}"
        text = str(payloads.load(fingerprints.c.form, row))
        if Fingerprint.of_text(text, where).digest != row["digest"]:
            raise HashMismatchError(where)
    is_asking = any(row["status"] == WaitStatus.PENDING for row in found["waits"])
    if run["status"] == RunStatus.WAITING and not is_asking:
        raise HashMismatchError("exported run", "it waits for nothing")


def _check_payloads(payloads: Payloads, table: sa.Table, row: Mapping[str, Any]) -> None:
    """See that the payloads of a row open at its place."""
    for column in table.c:
        if isinstance(column.type, sa.LargeBinary) and row[column.name] is not None:
            payloads.unseal(column, row)


def _add_fingerprints(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        insert_new(connection, fingerprints, rows)


def _add_effect(
    connection: Connection, payloads: Payloads, run: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, bytes]:
    """Store what is known of an effect, and return its marks; one in doubt stays in doubt."""
    own = ("tenant", "run_id", "thread_id")
    is_own = all(row[name] == run[name] for name in own) and row["scope"] == run["run_id"]
    if not is_own:
        raise HashMismatchError(f"effect {row['effect_id']!r}", "it is not of this run")
    # Read whole, so that it is not called again because what is known cannot be read here.
    effect = to_effect(row, payloads)
    if payloads.strict.redact is None and row["key_hash"] not in key_hashes(payloads, effect.key):
        raise HashMismatchError(f"effect {effect.id!r}", "its key is another one")
    # Tokens of another database say nothing here, and must not be taken for one of this one.
    whole = {**row, "token": 0, **(repack_request(payloads, row) or {})}
    connection.execute(sa.insert(effects), whole)
    return effect_marks(payloads, whole)


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
            if table is runs and column.name in _LEASE:
                value = None  # nobody drives it here, whoever is said to
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
