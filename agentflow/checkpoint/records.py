"""What stands inside the rows: sealed records of checkpoints and of writes.

A checkpoint's record is a MessagePack list of two: the serialized head (what LangGraph calls the
checkpoint but for its values and its id, and the metadata) and the channels, each with the
serialized bytes of its value or with the numbers of its parts, three for each part. A record of
writes is a list of calls, each serialized as task id, task path and a list of index, channel and
value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ormsgpack
from langgraph.checkpoint.base import writes_sort_key

from agentflow.checkpoint.rows import CheckpointRow, Held, Layout, Part, Stored
from agentflow.codec import Codec, unseal

_NUMBERS_PER_PART = 3


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


class Record(NamedTuple):
    """A checkpoint's row, opened."""

    body: dict[str, Any]
    metadata: dict[str, Any]
    layout: Layout


def pack_record(codec: Codec, head: bytes, layout: Layout) -> bytes:
    """Seal a checkpoint's record."""
    channels = {
        channel: stored if isinstance(stored, bytes) else [n for part in stored for n in part]
        for channel, (_, stored) in layout.items()
        if stored is not None
    }
    return codec.seal(ormsgpack.packb([head, channels]))


def unpack_record(codec: Codec, row: CheckpointRow, place: Place) -> Record:
    """Verify and open a checkpoint's row."""
    where = place.of(f"checkpoint {row.checkpoint_id!r}")
    head, channels = ormsgpack.unpackb(unseal(row.data, where=where))
    body, metadata = codec.deserialize(head, where=where)
    versions: Mapping[str, Any] = body["channel_versions"]
    layout = {
        channel: Held(version, _stored(channels.get(channel)))
        for channel, version in versions.items()
    }
    return Record(body, metadata, layout)


def _stored(found: Any) -> Stored | None:
    if found is None or isinstance(found, bytes):
        return found
    return tuple(
        Part(found[i], found[i + 1], bool(found[i + 2]))
        for i in range(0, len(found), _NUMBERS_PER_PART)
    )


def pack_writes(codec: Codec, calls: Sequence[bytes]) -> bytes:
    """Seal the writes of some calls."""
    return codec.seal(ormsgpack.packb(list(calls)))


def unpack_writes(
    codec: Codec, logged: Iterable[tuple[int, bytes]], place: Place
) -> list[tuple[str, str, Any]]:
    """Open the writes of one checkpoint, as LangGraph wants them.

    Of what a task wrote more than once at one index, the first ordinary write stands, and the last
    special one (error, interrupt, resume: negative index).

    Returns:
        Task id, channel and value, ordered by task path, task id and index.
    """
    where = place.of("writes")
    found: dict[tuple[str, int], tuple[str, str, Any]] = {}
    for _, sealed in sorted(logged, key=lambda entry: entry[0]):
        for call in ormsgpack.unpackb(unseal(sealed, where=where)):
            task_id, task_path, items = codec.deserialize(call, where=where)
            for index, channel, value in items:
                key = (task_id, index)
                if index < 0 or key not in found:
                    found[key] = (task_path, channel, value)
    # Sorted here, since databases collate text differently and the order decides what reducers do.
    order = sorted(found, key=lambda key: writes_sort_key(found[key][0], *key))
    return [(key[0], found[key][1], found[key][2]) for key in order]
