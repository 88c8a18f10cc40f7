"""LangGraph's calls as serialized puts, and rows as LangGraph's tuples.

Serializing happens in the thread that calls the saver, before anything is queued: what is stored is
the value as it was then, whatever the caller does with the object afterwards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import xxhash
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.types import ERROR

from agentflow.checkpoint.pending import Write
from agentflow.checkpoint.planning import (
    INLINE,
    GrownList,
    NewValue,
    PlannedCheckpoint,
    PlannedWrites,
    Seen,
    WholeList,
    size_of,
)
from agentflow.checkpoint.records import Place, Record, Written, column_text, unpack_record
from agentflow.checkpoint.rows import (
    WHOLE,
    FoundCheckpoint,
    HeadKey,
    Layout,
    Part,
    Stored,
    ThreadKey,
)
from agentflow.checkpoint.stamps import KEY, Stamp, read_seen
from agentflow.codec import Codec, unseal
from agentflow.delta import KnownList, grown, hash_block, whole
from agentflow.delta import loaded as remembered
from agentflow.errors import HashMismatchError, SerializationError
from agentflow.types import Lease, new_id

# LangGraph's engine marks the configuration of what it runs with keys of its own.
_ENGINE = "__pregel_"
_KNOWN_LIMIT = 1024
_KNOWN_ELEMENTS = 2_000_000

Stretches = Mapping[tuple[int, int], Sequence[bytes]]
"""The sealed stretches of values, by thread number and series."""


Lists = dict[str, tuple[Any, KnownList]]
"""The lists of a checkpoint by channel, each with its version."""


class _Known(NamedTuple):
    """The lists of one checkpoint, by channel, each with its version."""

    lists: Lists
    size: int


class KnownLists:
    """The lists of checkpoints that may get a successor; bounded, safe from any thread."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[HeadKey, str], _Known] = OrderedDict()
        self._size = 0

    def remember(self, key: HeadKey, checkpoint_id: str, lists: Lists) -> None:
        """Keep the lists of a checkpoint, and drop the oldest ones if there are too many."""
        known = _Known(lists, sum(len(entry.items) for _, entry in lists.values()))
        with self._lock:
            self._drop((key, checkpoint_id))
            self._known[key, checkpoint_id] = known
            self._size += known.size
            while len(self._known) > _KNOWN_LIMIT or self._size > _KNOWN_ELEMENTS:
                self._drop(next(iter(self._known)))

    def recall(self, key: HeadKey, checkpoint_id: str) -> Lists:
        """Return the lists of a checkpoint that are kept."""
        with self._lock:
            known = self._known.get((key, checkpoint_id))
            return known.lists if known else {}

    def forget(self, key: HeadKey, checkpoint_id: str) -> None:
        """Drop the lists of a checkpoint."""
        with self._lock:
            self._drop((key, checkpoint_id))

    def forget_thread(self, thread: ThreadKey) -> None:
        """Drop everything about a thread."""
        with self._lock:
            for place in [place for place in self._known if place[0][:2] == thread]:
                self._drop(place)

    def _drop(self, place: tuple[HeadKey, str]) -> None:
        known = self._known.pop(place, None)
        if known is not None:
            self._size -= known.size


class Encoder:
    """Makes puts out of LangGraph's calls, and LangGraph's tuples out of rows."""

    def __init__(self, codec: Codec, known: KnownLists, *, verify_deltas: bool) -> None:
        """Serialize with `codec`; `verify_deltas` compares growing lists as a whole each time."""
        self.codec = codec
        self._serialize = codec.serialize
        self._known = known
        self._verify = verify_deltas

    def writes(
        self,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> PlannedWrites:
        """Serialize the writes of one task."""
        serialize = self._serialize
        items: list[tuple[int, str, Written]] = []
        size = 0
        for position, (channel, value) in enumerate(writes):
            try:
                written = serialize(value)
            except SerializationError:
                written = self._of_channel(channel, _storable(channel, value), key)
            size += len(written)
            items.append((WRITES_IDX_MAP.get(channel, position), channel, written))
        return PlannedWrites(
            key=key,
            lease=lease,
            codec=self.codec,
            checkpoint_id=config["configurable"]["checkpoint_id"],
            call=(task_id, task_path, items),
            size=size,
        )

    def _of_channel(self, channel: str, value: Any, key: HeadKey) -> bytes:
        """Serialize a value, and name its channel if that fails."""
        return self.codec.serialize(value, where=Place(*key[1:]).of_channel(channel))

    def checkpoint(
        self,
        key: HeadKey,
        lease: Lease | None,
        attempt: str,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> PlannedCheckpoint:
        """Serialize a checkpoint; only the values of changed channels go with it."""
        configurable = config["configurable"]
        parent_id = configurable.get("checkpoint_id") or None
        seen = read_seen(config, key[2])
        body: dict[str, Any] = dict(checkpoint)
        del body["channel_values"], body["id"]
        merged: Any = get_checkpoint_metadata(config, metadata)
        run_id = merged.get("run_id")
        head = self._head(body, merged, key)
        source = parent_id or (seen.checkpoint_id if seen else None)
        values, lists = self._values(key, checkpoint, new_versions, source)
        return PlannedCheckpoint(
            key=key,
            ns=key[2],
            lease=lease,
            codec=self.codec,
            checkpoint_id=checkpoint["id"],
            parent_id=parent_id,
            attempt=attempt,
            run_id=None if run_id is None else column_text(run_id),
            step=metadata.get("step"),
            head=head,
            # Copied: the engine goes on counting in the same dictionary.
            versions=dict(checkpoint["channel_versions"]),
            changed=frozenset(new_versions),
            values=values,
            lists=lists,
            source=source,
            seen=seen,
            # It matters only where nothing was loaded.
            is_invocation=seen is None and any(map(_is_engines, configurable)),
            size=len(head) + sum(map(size_of, values.values())),
        )

    def _head(self, body: dict[str, Any], metadata: Any, key: HeadKey) -> bytes:
        try:
            return self._serialize([body, metadata])
        except SerializationError:
            place = Place(*key[1:])
            self.codec.serialize(body, where=place.of("the checkpoint itself"))
            self.codec.serialize(metadata, where=place.of("the metadata"))
            raise

    def _values(
        self,
        key: HeadKey,
        checkpoint: Checkpoint,
        new_versions: ChannelVersions,
        source: str | None,
    ) -> tuple[dict[str, NewValue], Lists]:
        """Serialize what changed; of a list that has grown only what is new."""
        before = self._known.recall(key, source) if source else {}
        versions, present = checkpoint["channel_versions"], checkpoint["channel_values"]
        values: dict[str, NewValue] = {}
        lists = {
            channel: known
            for channel, known in before.items()
            if channel not in new_versions and versions.get(channel) == known[0]
        }
        for channel in new_versions:
            if channel not in present or channel not in versions:
                continue
            value = present[channel]
            try:
                if type(value) is not list:
                    values[channel] = self._serialize(value)
                    continue
                last = before.get(channel)
                values[channel], after = self._list(value, last[1] if last else None, source)
            except SerializationError:
                self._of_channel(channel, value, key)
                raise
            if after is not None:
                lists[channel] = (versions[channel], after)
        return values, lists

    def follow(self, planned: PlannedCheckpoint) -> None:
        """From now on tell new elements of lists from those that this checkpoint stores."""
        if planned.source is not None:
            self._known.forget(planned.key, planned.source)
        if planned.lists:
            self._known.remember(planned.key, planned.checkpoint_id, dict(planned.lists))

    def _list(
        self, items: list[Any], known: KnownList | None, since: str | None
    ) -> tuple[NewValue, KnownList | None]:
        dumps = self._serialize
        if known is not None and since is not None:
            found = grown(known, items, dumps, verify=self._verify)
            if found is not None:
                return GrownList(since, found[0]), found[1]
        block = dumps(items)
        if len(block) <= INLINE:
            return block, None
        return WholeList(block, len(items)), whole(items, block, dumps)

    def read(self, found: FoundCheckpoint, parts: Loaded) -> CheckpointTuple:
        """Decode a stored checkpoint, and stamp it with what the reader saw."""
        row = found.row
        place = Place(found.thread_id, row.ns)
        values = self._read_values(found, parts, place)
        configurable = {
            "thread_id": found.thread_id,
            "checkpoint_ns": row.ns,
            KEY: Stamp(
                Seen(
                    ns=row.ns,
                    head_seq=found.head_seq,
                    checkpoint_id=row.checkpoint_id,
                    load_id=new_id(),
                )
            ),
        }
        parent = row.parent_id
        body = parts.record.body
        return CheckpointTuple(
            config={"configurable": {**configurable, "checkpoint_id": row.checkpoint_id}},
            checkpoint=cast(
                "Checkpoint", {**body, "id": row.checkpoint_id, "channel_values": values}
            ),
            metadata=cast("CheckpointMetadata", parts.record.metadata),
            parent_config=(
                {"configurable": {**configurable, "checkpoint_id": parent}} if parent else None
            ),
            pending_writes=list(parts.writes),
        )

    def _read_values(self, found: FoundCheckpoint, loaded: Loaded, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lists: Lists = {}
        for channel, (version, stored) in loaded.record.layout.items():
            if stored is None:
                continue
            where = place.of_channel(channel)
            values[channel], known = self.read_value(
                found.row.thread, stored, loaded.stretches, where
            )
            if known is not None:
                lists[channel] = (version, known)
        if lists and found.row.seq == found.head_seq:
            key = (found.tenant, found.thread_id, found.row.ns)
            self._known.remember(key, found.row.checkpoint_id, lists)
        return values

    def read_value(
        self, thread: int, stored: Stored, stretches: Stretches, where: str
    ) -> tuple[Any, KnownList | None]:
        """Decode a stored value, and note a list, so that its successor only adds."""
        if isinstance(stored, bytes):
            return self.codec.deserialize(stored, where=where), None
        sealed = [stretches.get((thread, part.series), ()) for part in stored]
        if stored[0].length != WHOLE:
            return self._join(stored, sealed, where)
        if not sealed[0]:
            raise missing_part(where)
        return self.codec.deserialize(unseal(sealed[0][0], where=where), where=where), None

    def _join(
        self, parts: Sequence[Part], sealed: Sequence[Sequence[bytes]], where: str
    ) -> tuple[list[Any], KnownList]:
        """Put a list together from its stretches."""
        joined: list[Any] = []
        hasher: xxhash.xxh3_128 | None = xxhash.xxh3_128()
        for part, stretches in zip(parts, sealed, strict=True):
            wanted = len(joined) + part.length
            for stretch in stretches:
                if len(joined) >= wanted:
                    break
                block = unseal(stretch, where=where)
                elements = self.codec.deserialize(block, where=where)
                joined += elements
                if hasher is not None:
                    hash_block(hasher, block, len(elements))
            if len(joined) < wanted:
                raise missing_part(where)
            if len(joined) > wanted:
                del joined[wanted:]
                hasher = None

        def dumps(value: Any) -> bytes:
            return self.codec.serialize(value, where=where)

        return joined, remembered(joined, hasher, len(parts), dumps)


class Loaded(NamedTuple):
    """What belongs to a checkpoint's row, ready to be decoded."""

    record: Record
    stretches: Stretches
    writes: Sequence[Write]


def open_record(codec: Codec, found: FoundCheckpoint) -> Record:
    """Verify and open a checkpoint's row."""
    return unpack_record(codec, found.row, Place(found.thread_id, found.row.ns))


def missing_part(where: str) -> HashMismatchError:
    """Make the error of a value that is not stored as a whole any more."""
    return HashMismatchError(where, "a part of its value is gone")


def is_complete(found: FoundCheckpoint, layout: Layout, stretches: Stretches) -> bool:
    """Whether there is something of each series that a checkpoint names."""
    return all((found.row.thread, part.series) in stretches for _, part in parts_of(found, layout))


def parts_of(found: FoundCheckpoint, layout: Layout) -> list[tuple[int, Part]]:
    """List where a checkpoint's values are kept, but for those in its row."""
    return [
        (found.row.thread, part)
        for _, stored in layout.values()
        if stored is not None and not isinstance(stored, bytes)
        for part in stored
    ]


def safe_repr(error: BaseException) -> str:
    """Return an exception's text, also if its own `repr` raises."""
    try:
        return repr(error)
    except Exception:  # noqa: BLE001 -- user code
        return f"{type(error).__name__}(<no text: its repr raises>)"


def _is_engines(name: str) -> bool:
    return name.startswith(_ENGINE)


def _storable(channel: str, value: Any) -> Any:
    # An exception cannot be rebuilt; LangGraph reads it as text.
    if channel == ERROR and isinstance(value, BaseException):
        return safe_repr(value)
    return value
