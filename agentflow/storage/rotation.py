"""Sealing the payloads of runs by the current key, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import is_apart
from agentflow.database import Database
from agentflow.database.tables import effects, metadata, waits
from agentflow.failpoints import failpoint
from agentflow.storage.effect_objects import hold, open_apart, put_apart, read_reference
from agentflow.storage.effect_rows import repack_request
from agentflow.storage.key_check import check_keys
from agentflow.storage.payloads import KEYS, Column, Payloads
from agentflow.storage.questions import repack_question

_ROWS_AT_ONCE = 100


class _Change(NamedTuple):
    """A payload, as it was read, and the columns as they are to be."""

    column: Column
    row: Mapping[str, Any]
    after: Mapping[str, Any]
    hold: Callable[[Connection], bool] | None = None
    """Refers to the object that the payload is in after it, if that is still there."""


async def rotate_payloads(
    database: Database, payloads: Payloads, tell: Callable[[int, int], None]
) -> int:
    """Seal by the current key all payloads, of all tenants, that are not.

    Args:
        database: Where they are.
        payloads: How they are stored; its keys open them.
        tell: Called after each batch with the rows that were looked through, and the payloads that
            were sealed, so far.

    Returns:
        How many payloads were sealed.
    """
    # What already has the name of the current key is not opened below.
    await database.read(partial(check_keys, payloads))
    seen = sealed = 0
    for table in map(metadata.tables.__getitem__, KEYS):
        last: Mapping[str, Any] | None = None
        while page := await database.read(partial(_read, table, last)):
            last = page[-1]
            changes = [change for row in page for change in _changes(payloads, table, row)]
            if changes:
                sealed += await database.write(partial(_apply, changes))
            seen += len(page)
            tell(seen, sealed)
    return sealed


def _read(
    table: sa.Table, after: Mapping[str, Any] | None, connection: Connection
) -> Sequence[Mapping[str, Any]]:
    key = [table.c[name] for name in KEYS[table.name]]
    hashes = [waits.c.proposal_hash, effects.c.key_hash]
    hashes += [effects.c.seq, effects.c.attempt]  # which say what an object is needed for
    columns = (*key, *_payload_columns(table), *(each for each in hashes if each.table is table))
    query = sa.select(*columns).order_by(*key).limit(_ROWS_AT_ONCE)
    if after is not None:
        query = query.where(sa.tuple_(*key) > tuple(after[column.name] for column in key))
    return [dict(row) for row in connection.execute(query).mappings()]


def _payload_columns(table: sa.Table) -> list[Column]:
    return [column for column in table.c if isinstance(column.type, sa.LargeBinary)]


def _changes(payloads: Payloads, table: sa.Table, row: Mapping[str, Any]) -> list[_Change]:
    changes = []
    for column in _payload_columns(table):
        before = row[column.name]
        if before is None:
            continue
        after: Mapping[str, Any] | None = None
        if column is waits.c.request:
            after = repack_question(payloads, row)
        elif column is effects.c.request:
            after = repack_request(payloads, row)
        elif column is effects.c.outcome and is_apart(before):
            if not payloads.strict.is_current(before):
                changes.append(_put_anew(payloads, row))
            continue
        elif not payloads.strict.is_current(before):
            body = payloads.unseal(column, row)
            after = {column.name: payloads.seal(body, column, row)}
        if after is not None:
            changes.append(_Change(column, row, after))
    return changes


def _put_anew(payloads: Payloads, row: Mapping[str, Any]) -> _Change:
    """Put an outcome into an object that is sealed by the current key, under its name by that."""
    reference = read_reference(payloads, row)
    tier = payloads.strict.tier
    body = open_apart(payloads, row)
    assert tier is not None
    sealed = put_apart(payloads, tier, reference.name.partition("/")[0], row, body)
    holding: Callable[[Connection], bool] | None = None
    if sealed.object:
        of_row: Mapping[str, Any] = {"seq": row["seq"], "attempt": row["attempt"]}
        holding = partial(hold, payloads=payloads, name=sealed.object, **of_row)
    return _Change(effects.c.outcome, row, {"outcome": sealed.data}, holding)


def _apply(changes: Sequence[_Change], connection: Connection) -> int:
    """Replace payloads that still are as they were; who has changed one meanwhile sealed it."""
    sealed = 0
    for column, row, after, holding in changes:
        if holding is not None and not holding(connection):
            continue  # it was collected; the next pass puts it again
        table = column.table
        of_row = [table.c[name] == row[name] for name in KEYS[table.name]]
        changed = connection.execute(
            sa.update(table).where(*of_row, column == row[column.name]).values(after)
        )
        sealed += changed.rowcount
    failpoint("keys.rewritten")
    return sealed
