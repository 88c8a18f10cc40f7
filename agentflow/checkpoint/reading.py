"""Reading checkpoints from the tables, and what rows look like.

One row per checkpoint: it holds the values of the channels that changed, and for each other channel
the id of the checkpoint that holds its value. A reader never depends on channel versions being
unique, so a racing fork cannot read the other writer's value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ormsgpack
import sqlalchemy as sa
from langgraph.checkpoint.base import writes_sort_key
from sqlalchemy.engine import Connection

from agentflow.codec import seal, unseal
from agentflow.database.tables import checkpoints, heads, writes
from agentflow.errors import HashMismatchError

ThreadKey = tuple[str, str]
"""Tenant and thread id."""

HeadKey = tuple[str, str, str]
"""Tenant, thread id and checkpoint namespace."""


Channels = dict[str, bytes | str]
"""Channel to its sealed value, or to the id of the checkpoint that holds it."""


@dataclass(slots=True)
class Head:
    """Where a namespace stands."""

    checkpoint_id: str
    seq: int
    attempt: str


def pack_channels(channels: Channels) -> bytes:
    """Encode a row's channels."""
    return seal(ormsgpack.packb(channels))


def unpack_channels(data: bytes) -> Channels:
    """Decode a row's channels."""
    channels: Channels = ormsgpack.unpackb(unseal(data, where="checkpoints.channels"))
    return channels


def load_heads(connection: Connection, keys: Iterable[HeadKey]) -> dict[HeadKey, Head]:
    """Read where these namespaces stand; a namespace without a checkpoint is left out."""
    wanted = sorted(keys)
    if not wanted:
        return {}
    rows = connection.execute(_HEADS, {"keys": wanted})
    return {
        (tenant, thread_id, ns): Head(checkpoint_id, seq, attempt)
        for tenant, thread_id, ns, checkpoint_id, seq, attempt in rows
    }


_HEADS = sa.select(heads).where(
    sa.tuple_(heads.c.tenant, heads.c.thread_id, heads.c.ns).in_(
        sa.bindparam("keys", expanding=True)
    )
)


def load_channels(
    connection: Connection, key: HeadKey, checkpoint_ids: Sequence[str]
) -> dict[str, Channels]:
    """Read the channels of some checkpoints of one namespace."""
    query = sa.select(checkpoints.c.checkpoint_id, checkpoints.c.channels).where(
        *in_namespace(checkpoints, key), checkpoints.c.checkpoint_id.in_(checkpoint_ids)
    )
    return {row.checkpoint_id: unpack_channels(row.channels) for row in connection.execute(query)}


def in_namespace(table: sa.Table, key: HeadKey) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the conditions for the rows of one namespace."""
    tenant, thread_id, ns = key
    return (table.c.tenant == tenant, table.c.thread_id == thread_id, table.c.ns == ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint as it is stored, with its values and writes still sealed."""

    thread_id: str
    ns: str
    checkpoint_id: str
    parent_id: str | None
    seq: int
    body: bytes
    metadata: bytes
    channels: Channels
    values: Mapping[str, bytes]
    """The sealed value of each channel that has one."""
    writes: tuple[tuple[str, str, bytes], ...]
    """Task id, channel and sealed value, ordered by task path, task id and index."""
    head_seq: int
    """The number of its namespace's head at the moment of reading."""


def load_checkpoint(
    connection: Connection, key: HeadKey, checkpoint_id: str | None
) -> StoredCheckpoint | None:
    """Read a checkpoint, or the head of its namespace if no id is given."""
    head = connection.execute(sa.select(heads).where(*in_namespace(heads, key))).first()
    if checkpoint_id is None:
        if head is None:
            return None
        checkpoint_id = head.checkpoint_id
    query = sa.select(checkpoints).where(
        *in_namespace(checkpoints, key), checkpoints.c.checkpoint_id == checkpoint_id
    )
    rows = connection.execute(query).all()
    found = _complete(connection, key[0], rows)
    if not found and head is not None and head.checkpoint_id == checkpoint_id:
        raise HashMismatchError(f"head of thread {key[1]!r}", "the checkpoint it names is gone")
    return found[0] if found else None


def list_checkpoints(
    connection: Connection,
    tenant: str,
    *,
    thread_id: str | None,
    ns: str | None,
    checkpoint_id: str | None,
    before: str | None,
    run_id: str | None,
    after_key: tuple[Any, ...] | None,
    limit: int,
) -> list[StoredCheckpoint]:
    """Read one page of checkpoints, newest first.

    Within a thread the order is that of the sequence numbers. Over all threads it is that of the
    ids, whose clocks may differ.
    """
    table = checkpoints
    query = sa.select(table).where(table.c.tenant == tenant).limit(limit)
    if ns is not None:
        query = query.where(table.c.ns == ns)
    if checkpoint_id is not None:
        query = query.where(table.c.checkpoint_id == checkpoint_id)
    if run_id is not None:
        query = query.where(table.c.run_id == run_id)
    if thread_id is None:
        order = (table.c.checkpoint_id, table.c.thread_id, table.c.ns)
        if before is not None:
            query = query.where(table.c.checkpoint_id < before)
        if after_key is not None:
            query = query.where(sa.tuple_(*order) < sa.tuple_(*map(sa.literal, after_key)))
        query = query.order_by(*(column.desc() for column in order))
    else:
        query = query.where(table.c.thread_id == thread_id).order_by(table.c.seq.desc())
        if before is not None:
            query = query.where(_is_before(connection, tenant, thread_id, before))
        if after_key is not None:
            query = query.where(table.c.seq < after_key[0])
    return _complete(connection, tenant, connection.execute(query).all())


def page_key(stored: StoredCheckpoint, thread_id: str | None) -> tuple[Any, ...]:
    """Return where the next page starts after this checkpoint."""
    if thread_id is None:
        return (stored.checkpoint_id, stored.thread_id, stored.ns)
    return (stored.seq,)


def _is_before(
    connection: Connection, tenant: str, thread_id: str, before: str
) -> sa.ColumnElement[bool]:
    """Return the condition for "older than that checkpoint", by its number if it is known."""
    table = checkpoints
    seq = connection.execute(
        sa.select(sa.func.max(table.c.seq)).where(
            table.c.tenant == tenant,
            table.c.thread_id == thread_id,
            table.c.checkpoint_id == before,
        )
    ).scalar_one()
    return table.c.checkpoint_id < before if seq is None else table.c.seq < seq


def _complete(
    connection: Connection, tenant: str, rows: Sequence[sa.Row[Any]]
) -> list[StoredCheckpoint]:
    """Add to rows of checkpoints their values, writes and heads, with one query for each kind."""
    if not rows:
        return []
    spaces = {(row.thread_id, row.ns) for row in rows}
    parsed = {
        (row.thread_id, row.ns, row.checkpoint_id): unpack_channels(row.channels) for row in rows
    }
    held: dict[tuple[str, str], set[str]] = {space: set() for space in spaces}
    for (thread_id, ns, _), channels in parsed.items():
        held[thread_id, ns].update(v for v in channels.values() if isinstance(v, str))
    holders = {
        space: load_channels(connection, (tenant, *space), sorted(ids))
        for space, ids in held.items()
        if ids
    }
    all_writes = _load_writes(connection, tenant, list(parsed))
    current = load_heads(connection, {(tenant, *space) for space in spaces})
    complete = []
    for row in rows:
        key = (row.thread_id, row.ns, row.checkpoint_id)
        head = current.get((tenant, row.thread_id, row.ns))
        complete.append(
            StoredCheckpoint(
                thread_id=row.thread_id,
                ns=row.ns,
                checkpoint_id=row.checkpoint_id,
                parent_id=row.parent_id,
                seq=row.seq,
                body=row.body,
                metadata=row.metadata,
                channels=parsed[key],
                values=_values(parsed[key], holders.get(key[:2], {}), key),
                writes=tuple(all_writes.get(key, ())),
                head_seq=head.seq if head else row.seq,
            )
        )
    return complete


def _values(
    channels: Channels, holders: Mapping[str, Channels], key: tuple[str, str, str]
) -> dict[str, bytes]:
    values = {}
    for channel, held in channels.items():
        value = holders.get(held, {}).get(channel) if isinstance(held, str) else held
        if not isinstance(value, bytes):
            raise HashMismatchError(
                f"channel {channel!r} of checkpoint {key[2]!r} in thread {key[0]!r}",
                "the checkpoint that holds its value is gone",
            )
        values[channel] = value
    return values


def _load_writes(
    connection: Connection, tenant: str, keys: Sequence[tuple[str, str, str]]
) -> dict[tuple[str, str, str], list[tuple[str, str, bytes]]]:
    key = sa.tuple_(writes.c.thread_id, writes.c.ns, writes.c.checkpoint_id)
    rows = connection.execute(sa.select(writes).where(writes.c.tenant == tenant, key.in_(keys)))
    found: dict[tuple[str, str, str], list[tuple[str, str, bytes]]] = {}
    # Sorted here, since databases collate text differently and the order decides what reducers do.
    for row in sorted(rows, key=lambda row: writes_sort_key(row.task_path, row.task_id, row.idx)):
        place = (row.thread_id, row.ns, row.checkpoint_id)
        found.setdefault(place, []).append((row.task_id, row.channel, row.value))
    return found
