"""LangGraph's calls as serialized puts, and rows as LangGraph's tuples.

Serializing happens in the thread that calls the saver, before anything is queued: what is stored is
the value as it was then, whatever the caller does with the object afterwards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

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

from agentflow.checkpoint.layout import WHOLE, Held, Layout, Part
from agentflow.checkpoint.offload import open_value
from agentflow.checkpoint.pending import Write
from agentflow.checkpoint.puts import (
    INLINE,
    GrownList,
    NewValue,
    PlannedCheckpoint,
    PlannedWrites,
    WholeList,
    size_of,
)
from agentflow.checkpoint.records import Place, Record, Written, column_text, unpack_record
from agentflow.checkpoint.rows import FoundCheckpoint, HeadKey, ThreadKey, ValueRow
from agentflow.checkpoint.stamps import KEY, Seen, Stamp, read_seen
from agentflow.codec import Codec, digest_of
from agentflow.delta import (
    KnownList,
    count_block,
    cut_block,
    grown,
    hash_block,
    new_hasher,
    whole,
)
from agentflow.delta import loaded as remembered
from agentflow.errors import HashMismatchError, MissingBlobError, SerializationError
from agentflow.types import Lease, new_id

_REPLAY = "__pregel_replay_state"
_MAX_STEP = 2**31
_KNOWN_LIMIT = 1024
_KNOWN_BYTES = 256 * 1024 * 1024
"""How much of lists is kept alive after the graphs that made them have ended."""
_ELEMENT_BYTES = 64
"""What an element takes beside its content, roughly."""

Stretches = Mapping[tuple[int, int], Sequence[ValueRow]]
"""The sealed stretches of values, by thread number and series."""


Lists = dict[str, tuple[Any, KnownList]]
"""The lists of a checkpoint by channel, each with its version."""


class _Known(NamedTuple):
    """The lists of one checkpoint, by channel, each with its version."""

    lists: Lists
    size: int
    """Bytes, roughly."""


class KnownLists:
    """The lists of checkpoints that may get a successor; bounded, safe from any thread."""

    def __init__(self) -> None:
        """Start empty."""
        self.reset()

    def reset(self) -> None:
        """Forget everything; in the child of a fork, where the lock may be taken for ever."""
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[HeadKey, str], _Known] = OrderedDict()
        self._size = 0

    def remember(self, key: HeadKey, checkpoint_id: str, lists: Lists) -> None:
        """Keep the lists of a checkpoint, and drop the oldest ones if there are too many."""
        sizes = (each.size + _ELEMENT_BYTES * len(each.items) for _, each in lists.values())
        known = _Known(lists, sum(sizes))
        with self._lock:
            self._drop((key, checkpoint_id))
            self._known[key, checkpoint_id] = known
            self._size += known.size
            while len(self._known) > _KNOWN_LIMIT or self._size > _KNOWN_BYTES:
                self._drop(next(iter(self._known)))

    def recall(self, key: HeadKey, checkpoint_id: str) -> Lists:
        """Return the lists of a checkpoint that are kept."""
        known = self._known.get((key, checkpoint_id))
        return known.lists if known else {}

    def forget(self, key: HeadKey, checkpoint_id: str) -> None:
        """Drop the lists of a checkpoint."""
        place = (key, checkpoint_id)
        if place in self._known:
            with self._lock:
                self._drop(place)

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

    def __init__(
        self,
        codec: Codec,
        known: KnownLists,
        *,
        verify_deltas: bool,
        is_marked: Callable[[Checkpoint], bool],
    ) -> None:
        """Serialize with `codec`.

        Args:
            codec: How values are stored.
            known: The lists that may grow.
            verify_deltas: Whether growing lists are compared as a whole each time.
            is_marked: Whether a node comes next after which the state has to be stored.
        """
        self.codec = codec
        self._serialize = codec.serializer.dumps
        self._redact = codec.redact
        self._known = known
        self._verify = verify_deltas
        self._is_marked = is_marked

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
        for position, (channel, given) in enumerate(writes):
            value = given if self._redact is None else self._redact(f"channel:{channel}", given)
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
        return self.codec.serialize(value, where=Place(*key).of_channel(channel))

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
        if self._redact is not None:
            merged = self._redact("metadata", merged)
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
            step=_column_step(metadata.get("step")),
            head=head,
            # Copied: the engine goes on counting in the same dictionary.
            versions=dict(checkpoint["channel_versions"]),
            changed=frozenset(new_versions),
            values=values,
            kept=frozenset(checkpoint["channel_values"]) - frozenset(new_versions),
            lists=lists,
            source=source,
            seen=seen,
            found_nothing=seen is None and _looked(config),
            size=len(head) + sum(map(size_of, values.values())),
        )

    def _head(self, body: dict[str, Any], metadata: Any, key: HeadKey) -> bytes:
        try:
            return self._serialize([body, metadata])
        except SerializationError:
            place = Place(*key)
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
            if self._redact is not None:
                value = self._redact(f"channel:{channel}", value)
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
        after = whole(items, block, dumps)
        return WholeList(block, len(items), after.hasher.digest()), after

    def read(self, found: FoundCheckpoint, parts: Loaded) -> CheckpointTuple:
        """Decode a stored checkpoint, and stamp it with what the reader saw."""
        row = found.row
        values = self._read_values(found, parts)
        body, metadata = parts.record.body, parts.record.metadata
        checkpoint = cast("Checkpoint", {**body, "id": row.checkpoint_id, "channel_values": values})
        step = metadata.get("step")
        seen = Seen(
            ns=row.ns,
            head_seq=found.head_seq,
            checkpoint_id=row.checkpoint_id,
            load_id=new_id(),
            step=step if isinstance(step, int) else None,
            is_marked=self._is_marked(checkpoint),
        )
        configurable = {
            "thread_id": found.thread_id,
            "checkpoint_ns": row.ns,
            KEY: Stamp(seen),
        }
        parent = row.parent_id
        return CheckpointTuple(
            config={"configurable": {**configurable, "checkpoint_id": row.checkpoint_id}},
            checkpoint=checkpoint,
            metadata=cast("CheckpointMetadata", metadata),
            parent_config=(
                {"configurable": {**configurable, "checkpoint_id": parent}} if parent else None
            ),
            pending_writes=list(parts.writes),
        )

    def _read_values(self, found: FoundCheckpoint, loaded: Loaded) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lists: Lists = {}
        for channel, held in loaded.record.layout.items():
            if held.stored is None:
                continue
            values[channel], known = self.read_value(found, channel, held, loaded.stretches)
            if known is not None:
                lists[channel] = (held.version, known)
        if lists and found.row.seq == found.head_seq:
            key = (found.tenant, found.thread_id, found.row.ns)
            self._known.remember(key, found.row.checkpoint_id, lists)
        return values

    def read_value(
        self, found: FoundCheckpoint, channel: str, held: Held, stretches: Stretches
    ) -> tuple[Any, KnownList | None]:
        """Decode a stored value, and note a list, so that its successor only adds.

        Raises:
            HashMismatchError: It is not what its checkpoint was hashed with.
            MissingBlobError: Not all of it is there.
            ObjectStoreError: An object that it is in could not be read.
        """
        row = found.row
        place = Place(found.tenant, found.thread_id, row.ns)
        where = place.of(f"channel {channel!r} of checkpoint {row.checkpoint_id!r}")
        stored = held.stored
        assert stored is not None
        if isinstance(stored, bytes):
            return self.codec.deserialize(stored, where=where), None
        rows = [stretches.get((row.thread, part.series), ()) for part in stored]
        if stored[0].length != WHOLE:
            value, known = self._join(place, stored, rows, where)
            digest = known.hasher.digest()
        else:
            if not rows[0]:
                raise MissingBlobError(where)
            block = open_value(self.codec, place, rows[0][0], where)
            value, known = self.codec.deserialize(block, where=where), None
            digest = digest_of(block)
        if digest != held.digest:
            raise HashMismatchError(where)
        return value, known

    def _join(
        self, place: Place, parts: Sequence[Part], rows: Sequence[Sequence[ValueRow]], where: str
    ) -> tuple[list[Any], KnownList]:
        """Put a list together from its stretches."""
        joined: list[Any] = []
        hasher = new_hasher()
        size = 0
        for part, stretches in zip(parts, rows, strict=True):
            taken = 0
            for row in stretches:
                if taken >= part.length:
                    break
                if row.start != taken:
                    raise MissingBlobError(where)
                block = open_value(self.codec, place, row, where)
                if taken + count_block(block) > part.length:
                    # The series goes on without this list, in the same stretch.
                    block = cut_block(block, part.length - taken) or block
                elements = self.codec.deserialize(block, where=where)
                hash_block(hasher, block, len(elements))
                joined += elements
                size += len(block)
                taken += len(elements)
            if taken < part.length:
                raise MissingBlobError(where)

        def dumps(value: Any) -> bytes:
            return self.codec.serialize(value, where=where)

        return joined, remembered(joined, hasher, len(parts), size, dumps)


class Loaded(NamedTuple):
    """What belongs to a checkpoint's row, ready to be decoded."""

    record: Record
    stretches: Stretches
    writes: Sequence[Write]


def open_record(codec: Codec, found: FoundCheckpoint) -> Record:
    """Verify and open a checkpoint's row."""
    return unpack_record(codec, found.row, Place(found.tenant, found.thread_id, found.row.ns))


def parts_of(found: FoundCheckpoint, layout: Layout) -> list[tuple[int, Part]]:
    """List where a checkpoint's values are kept, but for those in its row."""
    return [
        (found.row.thread, part)
        for _, stored, _ in layout.values()
        if stored is not None and not isinstance(stored, bytes)
        for part in stored
    ]


def safe_repr(error: BaseException) -> str:
    """Return an exception's text, also if its own `repr` raises."""
    try:
        return repr(error)
    except Exception:  # noqa: BLE001 -- user code
        return f"{type(error).__name__}(<no text: its repr raises>)"


def _looked(config: RunnableConfig) -> bool:
    """Whether a put comes from a graph, which looks for the newest checkpoint first.

    LangGraph completes the configuration of whatever it does for a graph. Within a replay it looks
    for what a subgraph had at that time, and what the namespace has had since does not matter.
    """
    return "recursion_limit" in config and not config["configurable"].get(_REPLAY)


def _column_step(step: Any) -> int | None:
    """Return a step from metadata as a column has it; what is no step is in the metadata only."""
    is_step = isinstance(step, int) and not isinstance(step, bool) and abs(step) < _MAX_STEP
    return step if is_step else None


def _storable(channel: str, value: Any) -> Any:
    # An exception cannot be rebuilt; LangGraph reads it as text.
    if channel == ERROR and isinstance(value, BaseException):
        return safe_repr(value)
    return value
