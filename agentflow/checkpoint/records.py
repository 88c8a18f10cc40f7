"""What stands inside the rows: sealed records of checkpoints and of writes.

A checkpoint's record is a MessagePack list of three: the serialized head (what LangGraph calls the
checkpoint but for its values and its id, and the metadata); the channels, each with the serialized
bytes of its value or with the numbers of its parts, three for each part; and writes. Writes are a
list of calls: task id, task path and a list of index, channel and what was written: the
serialized bytes, or series, start and length of what has the same bytes among the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ormsgpack

from agentflow.checkpoint.rows import CheckpointRow, Held, Layout, Part, Stored
from agentflow.codec import Codec, unseal

_NUMBERS_PER_PART = 3

Written = bytes | list[int]
"""What was written: serialized, or where it is among the values, as series, start and length."""

Call = tuple[str, str, list[tuple[int, str, Written]]]
"""Task id, task path, and for each write its index, its channel and what was written."""


class Place(NamedTuple):
    """Names something that is stored, for messages."""

    thread_id: str
    ns: str

    def of(self, what: str) -> str:
        """Name a part of it."""
        ns = f", namespace {self.ns!r}" if self.ns else ""
        return f"{what} of thread {self.thread_id!r}{ns}"

    def of_channel(self, channel: str) -> str:
        """Name a channel of it."""
        return self.of(f"channel {channel!r}")


def column_text(text: Any) -> str:
    """Return a text from metadata as a column has it, which takes no NUL and no lone surrogate."""
    return str(text).replace("\x00", "").encode("utf-8", "backslashreplace").decode()


class Record(NamedTuple):
    """A checkpoint's row, opened."""

    body: dict[str, Any]
    metadata: dict[str, Any]
    layout: Layout
    calls: list[Call]
    """Writes bound to it that became durable together with it."""


def pack_record(codec: Codec, head: bytes, layout: Layout, calls: Sequence[Call]) -> bytes:
    """Seal a checkpoint's record."""
    channels = {
        channel: stored if isinstance(stored, bytes) else [n for part in stored for n in part]
        for channel, (_, stored) in layout.items()
        if stored is not None
    }
    return codec.seal(_pack(codec, [head, channels, calls]))


def unpack_record(codec: Codec, row: CheckpointRow, place: Place) -> Record:
    """Verify and open a checkpoint's row."""
    where = place.of(f"checkpoint {row.checkpoint_id!r}")
    head, channels, calls = codec.deserialize(unseal(row.data, where=where), where=where)
    body, metadata = codec.deserialize(head, where=where)
    versions: Mapping[str, Any] = body["channel_versions"]
    layout = {
        channel: Held(version, _stored(channels.get(channel)))
        for channel, version in versions.items()
    }
    return Record(body, metadata, layout, calls)


def _stored(found: Any) -> Stored | None:
    if found is None or isinstance(found, bytes):
        return found
    return tuple(
        Part(found[i], found[i + 1], bool(found[i + 2]))
        for i in range(0, len(found), _NUMBERS_PER_PART)
    )


def pack_writes(codec: Codec, calls: Sequence[Call]) -> bytes:
    """Seal the writes of some calls."""
    return codec.seal(_pack(codec, calls))


def unpack_writes(codec: Codec, sealed: bytes, place: Place) -> list[Call]:
    """Verify and open the writes of some calls."""
    where = place.of("writes")
    calls: list[Call] = codec.deserialize(unseal(sealed, where=where), where=where)
    return calls


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
