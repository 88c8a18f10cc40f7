"""What stands inside the rows: sealed records of checkpoints and of writes.

A checkpoint's record is a MessagePack list of four: the serialized head (what LangGraph calls the
checkpoint but for its values and its id, and the metadata); the channels, each with the serialized
bytes of its value, or with a digest of them and the numbers of its parts, three for each part;
writes; and the hash of the parent. Writes are a list of calls: task id, task path and a list of
index, channel and what was written: the serialized bytes, or series, start and length of what has
the same bytes among the values.

Each record is sealed in the context of its place: all columns of its row are part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ormsgpack

from agentflow.checkpoint.layout import Held, Layout, Part, Stored
from agentflow.checkpoint.rows import CheckpointRow
from agentflow.codec import Codec, context_of
from agentflow.errors import HashMismatchError

_NUMBERS_PER_PART = 3

Written = bytes | list[int]
"""What was written: serialized, or where it is among the values, as series, start and length."""

Call = tuple[str, str, list[tuple[int, str, Written]]]
"""Task id, task path, and for each write its index, its channel and what was written."""


class Place(NamedTuple):
    """A namespace of a thread: where something belongs, and its name for messages."""

    tenant: str
    thread_id: str
    ns: str

    def of(self, what: str) -> str:
        """Name a part of it."""
        ns = f", namespace {self.ns!r}" if self.ns else ""
        tenant = f" of tenant {self.tenant!r}" if self.tenant else ""
        return f"{what} of thread {self.thread_id!r}{ns}{tenant}"

    def of_channel(self, channel: str) -> str:
        """Name a channel of it."""
        return self.of(f"channel {channel!r}")

    def context_of_row(self, row: CheckpointRow) -> bytes:
        """Return the context of a checkpoint's record."""
        has = (row.parent_writes is not None, row.base is not None)
        return context_of("checkpoint", *self, *row[2:8], row.hash, *has)

    def context_of_carried(self, seq: int, checkpoint_id: str) -> bytes:
        """Return the context of the writes that a checkpoint carries for its parent."""
        return context_of("parent writes", *self, seq, checkpoint_id)

    def context_of_writes(self, checkpoint_id: str, seq: int) -> bytes:
        """Return the context of writes in the log."""
        return context_of("writes", *self, checkpoint_id, seq)

    def context_of_base(self, checkpoint_id: str) -> bytes:
        """Return the context of what the delta channels of a checkpoint had at its parent."""
        return context_of("base", *self, checkpoint_id)

    def context_of_anchor(self, checkpoint_id: str, seq: int) -> bytes:
        """Return the context of the hash of a deleted checkpoint."""
        return context_of("anchor", *self, checkpoint_id, seq)

    def context_of_value(self, series: int, start: int) -> bytes:
        """Return the context of a stretch of a value, which other namespaces may share."""
        return context_of("value", self.tenant, self.thread_id, series, start)


def column_text(text: Any) -> str:
    """Return a text from metadata as a column has it, which takes no NUL and no lone surrogate."""
    return str(text).replace("\x00", "").encode("utf-8", "backslashreplace").decode()


class Record(NamedTuple):
    """A checkpoint's row, opened."""

    head: bytes
    body: dict[str, Any]
    metadata: dict[str, Any]
    layout: Layout
    calls: list[Call]
    """Writes bound to it that became durable together with it."""
    parent_hash: bytes | None


class Identity(Protocol):
    """What a checkpoint is, and what it follows; both as it is put and as it is stored."""

    @property
    def checkpoint_id(self) -> str: ...
    @property
    def parent_id(self) -> str | None: ...
    @property
    def attempt(self) -> str: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def step(self) -> int | None: ...


def hash_of(
    codec: Codec,
    place: Place,
    made: Identity,
    head: bytes,
    layout: Layout,
    parent: bytes | None,
) -> bytes:
    """Return what a checkpoint's hash covers: what it is, where it belongs, and its parent's hash.

    Where its values are kept is not part of it, so that they may be moved.
    """
    values = [
        [channel, stored if isinstance(stored, bytes) else digest]
        for channel, (_, stored, digest) in sorted(layout.items())
        if stored is not None
    ]
    columns = (made.checkpoint_id, made.parent_id, made.attempt, made.run_id, made.step)
    return _pack(codec, [*place, *columns, parent, head, values])


def pack_record(
    codec: Codec,
    place: Place,
    row: CheckpointRow,
    head: bytes,
    layout: Layout,
    calls: Sequence[Call],
    parent_hash: bytes | None,
    *,
    like: bytes | None = None,
) -> bytes:
    """Seal the record of a checkpoint that has these columns.

    Args:
        codec: How it is stored.
        place: Where it belongs.
        row: Its columns.
        head: What LangGraph calls the checkpoint, and the metadata.
        layout: Where its values are.
        calls: Writes.
        parent_hash: The hash of its parent.
        like: The record as it was, if it keeps its hash, which is under the same key.
    """
    channels = {
        channel: stored if isinstance(stored, bytes) else [digest, *(n for p in stored for n in p)]
        for channel, (_, stored, digest) in layout.items()
        if stored is not None
    }
    body, context = _pack(codec, [head, channels, calls, parent_hash]), place.context_of_row(row)
    return codec.seal(body, context) if like is None else codec.seal_like(like, body, context)


def unpack_record(codec: Codec, row: CheckpointRow, place: Place) -> Record:
    """Verify and open a checkpoint's row.

    Raises:
        HashMismatchError: Any of its columns is not what was stored.
    """
    where = place.of(f"checkpoint {row.checkpoint_id!r}")
    sealed = codec.unseal(row.data, place.context_of_row(row), where=where)
    head, channels, calls, parent_hash = codec.deserialize(sealed, where=where)
    body, metadata = codec.deserialize(head, where=where)
    versions: Mapping[str, Any] = body["channel_versions"]
    layout = {
        channel: Held(version, *_stored(channels.get(channel)))
        for channel, version in versions.items()
    }
    covered = hash_of(codec, place, row, head, layout, parent_hash)
    if codec.hash_like(row.data, covered, where=where) != row.hash:
        raise HashMismatchError(where)
    return Record(head, body, metadata, layout, calls, parent_hash)


def reseal(codec: Codec, place: Place, row: CheckpointRow, after: CheckpointRow) -> CheckpointRow:
    """Return `after`, which differs from `row` in what it carries, with its record sealed anew."""
    where = place.of(f"checkpoint {row.checkpoint_id!r}")
    body = codec.unseal(row.data, place.context_of_row(row), where=where)
    # By the key that its hash is under, which stays as it is.
    return after._replace(data=codec.seal_like(row.data, body, place.context_of_row(after)))


def _stored(found: Any) -> tuple[Stored | None, bytes | None]:
    if found is None or isinstance(found, bytes):
        return found, None
    parts = tuple(
        Part(found[i], found[i + 1], bool(found[i + 2]))
        for i in range(1, len(found), _NUMBERS_PER_PART)
    )
    return parts, found[0]


def pack_writes(codec: Codec, calls: Sequence[Call], context: bytes) -> bytes:
    """Seal the writes of some calls."""
    return codec.seal(_pack(codec, calls), context)


def unpack_writes(codec: Codec, sealed: bytes, where: str, context: bytes) -> list[Call]:
    """Verify and open the writes of some calls."""
    body = codec.unseal(sealed, context, where=where)
    calls: list[Call] = codec.deserialize(body, where=where)
    return calls


def cut_chain(parent_id: str) -> str:
    """Say of a checkpoint that its parent is missing."""
    return f"its chain is cut: its parent {parent_id!r} was deleted, and left no anchor"


def _pack(codec: Codec, value: Any) -> bytes:
    try:
        return ormsgpack.packb(value)
    except TypeError:
        # A name that is not valid Unicode, which only the serializer can keep.
        return codec.serialize(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def references(calls: Iterable[Call]) -> Iterator[tuple[int, int, int]]:
    """Yield what writes share with values, as series, start and length."""
    for _, _, items in calls:
        for _, _, written in items:
            if not isinstance(written, bytes):
                series, start, length = written
                yield (series, start, length)
