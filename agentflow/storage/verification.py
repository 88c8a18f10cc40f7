"""Verification of all that is stored of runs: payloads, chains of events, and rows by these.

Rows are read a few at a time, each few on one consistent snapshot, while others go on. Events only
come behind those that there are, so that a chain may be followed from one snapshot to the next; its
end is compared with what the run says of it within one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import is_apart
from agentflow.database import Database
from agentflow.database.tables import effects, events, logs, metadata, runs, waits
from agentflow.errors import CodecError, HashMismatchError
from agentflow.storage.comparison import compare_rows
from agentflow.storage.effect_objects import open_apart
from agentflow.storage.events import GENESIS, LOG, hash_event
from agentflow.storage.integrity import RowDamage, Verified
from agentflow.storage.payloads import KEYS, Payloads, place_of
from agentflow.storage.questions import unpack_question

_ROWS_AT_ONCE = 100
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError)
"""What comes of bytes that were sealed by something else than this program."""

_Row = Mapping[str, Any]


async def find_damages(
    database: Database, payloads: Payloads, tenant: str | None, thread_id: str | None
) -> AsyncIterator[Verified]:
    """See `RunStore.find_damages`."""
    verifier = _Verifier(payloads)
    for table, key in _tables(thread_id):
        last: _Row | None = None
        read = partial(_read, table, key, tenant, thread_id)
        while page := await database.read(partial(read, last)):
            last = page[-1]
            damages = tuple(damage for row in page for damage in verifier.verify(table, row))
            yield Verified(rows=len(page), damages=damages)
    async for compared in compare_rows(database, payloads, tenant, thread_id):
        yield compared


def _tables(thread_id: str | None) -> Iterator[tuple[sa.Table, Sequence[str]]]:
    """Yield the tables to look through, with what their rows are told apart by."""
    for name, key in KEYS.items():
        table = metadata.tables[name]
        if thread_id is None or "run_id" in table.c:
            yield table, key
    if thread_id is None:
        yield logs, ("tenant",)


def _read(
    table: sa.Table,
    key: Sequence[str],
    tenant: str | None,
    thread_id: str | None,
    after: _Row | None,
    connection: Connection,
) -> Sequence[_Row]:
    columns = [table.c[name] for name in key]
    query = sa.select(table, *_ends(table)).order_by(*columns).limit(_ROWS_AT_ONCE)
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    if thread_id is not None:
        owner = runs.alias("owner")
        of_run = (owner.c.tenant == table.c.tenant, owner.c.run_id == table.c.run_id)
        query = query.where(sa.exists().where(*of_run, owner.c.thread_id == thread_id))
    if after is not None:
        query = query.where(sa.tuple_(*columns) > tuple(after[name] for name in key))
    return [dict(row) for row in connection.execute(query).mappings()]


def _ends(table: sa.Table) -> list[sa.Label[Any]]:
    """Return, for whatever has a chain of events, where these end."""
    if table not in {runs, logs}:
        return []
    run_id = runs.c.run_id if table is runs else sa.literal(LOG)
    of_chain = (events.c.tenant == table.c.tenant, events.c.run_id == run_id)
    newest = sa.select(sa.func.max(events.c.seq)).where(*of_chain)
    of_newest = sa.select(events.c.hash).where(*of_chain, events.c.seq == table.c.event_seq)
    return [
        newest.scalar_subquery().label("newest_seq"),
        of_newest.scalar_subquery().label("newest_hash"),
    ]


class _Verifier:
    """Verifies rows, those of a table in the order of their keys."""

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads
        self._chain: tuple[str, str] | None = None
        """Of which run the last event was, and of which tenant."""
        self._before: tuple[int, str] = (0, GENESIS)
        """Its number and its hash."""

    def verify(self, table: sa.Table, row: _Row) -> Iterator[RowDamage]:
        """Yield what is wrong with a row."""
        for column in table.c:
            if isinstance(column.type, sa.LargeBinary) and row[column.name] is not None:
                yield from self._payload(column, row)
        if table is events:
            yield from self._link(row)
        elif table in {runs, logs}:
            yield from self._end(row)

    def _payload(self, column: sa.Column[Any], row: _Row) -> Iterator[RowDamage]:
        where = place_of(column, row)
        try:
            if column is waits.c.request:
                unpack_question(self._payloads, row)
            elif column is events.c.data and hash_event(row, self._payloads) != row["hash"]:
                raise HashMismatchError(where, "its hash is not that of the event")
            elif column is effects.c.outcome and is_apart(row["outcome"]):
                open_apart(self._payloads, row)
            elif column is not events.c.data:
                self._payloads.unseal(column, row)
        except CodecError as error:
            yield _damage(error, where, row)
        except _MALFORMED:
            yield _damage(HashMismatchError(where, "it is no envelope"), where, row)

    def _link(self, row: _Row) -> Iterator[RowDamage]:
        """Compare an event with the one before it."""
        chain = (row["tenant"], row["run_id"])
        seq, previous = self._before if chain == self._chain else (0, GENESIS)
        if (row["seq"], row["prev_hash"]) != (seq + 1, previous):
            where = place_of(events.c.data, row)
            reason = "the event before it is missing, or another one"
            yield _damage(HashMismatchError(where, reason), where, row)
        self._chain, self._before = chain, (row["seq"], row["hash"])

    def _end(self, row: _Row) -> Iterator[RowDamage]:
        """Compare the last event with what is said of it."""
        found = (row["newest_seq"] or 0, row["newest_hash"] or GENESIS)
        if found != (row["event_seq"], row["event_hash"]):
            run_id = row.get("run_id", LOG)
            whose = f"of run {run_id!r}" if run_id != LOG else "that concern no run"
            of_tenant = f" of tenant {row['tenant']!r}" if row["tenant"] else ""
            where = f"events {whose}{of_tenant}"
            reason = "the last of them is missing, or another one"
            yield _damage(HashMismatchError(where, reason), where, row)


def _damage(error: CodecError, where: str, row: _Row) -> RowDamage:
    return RowDamage(
        error=type(error).__name__, tenant=row["tenant"], payload=where, message=str(error)
    )
