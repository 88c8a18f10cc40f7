"""Checkpoints and writes as sealed rows, and back.

Encoding happens in the thread that calls the saver, before anything is queued: what is stored is
the value as it was then, whatever the caller does with the object afterwards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

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

from agentflow.checkpoint.reading import Channels, HeadKey, StoredCheckpoint, ThreadKey
from agentflow.checkpoint.writing import PutCheckpoint, PutWrites, Seen
from agentflow.codec import Codec, digest
from agentflow.types import Lease, new_id

# LangGraph hands the configurable keys of a loaded checkpoint back with each put of the invocation,
# and keeps keys that start with two underscores out of the metadata.
_SEEN = "__agentflow_seen"
# LangGraph's engine marks the configuration of what it runs with keys of its own.
_ENGINE = "__pregel_"
_KNOWN_LIMIT = 4096

Holders = dict[str, tuple[Any, str | None]]
"""Channel to its version and the checkpoint that holds its value, `None` if it has none."""


class HolderCache:
    """Where the values of recently seen checkpoints are held; bounded, safe from any thread."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[HeadKey, str], Holders] = OrderedDict()

    def remember(self, key: HeadKey, checkpoint_id: str, holders: Holders) -> None:
        """Keep the holders of a checkpoint, and drop the oldest entry if there are too many."""
        with self._lock:
            self._known[key, checkpoint_id] = holders
            self._known.move_to_end((key, checkpoint_id))
            if len(self._known) > _KNOWN_LIMIT:
                self._known.popitem(last=False)

    def recall(self, key: HeadKey, checkpoint_id: str | None) -> Holders | None:
        """Return the holders of a checkpoint, if they are kept."""
        with self._lock:
            return None if checkpoint_id is None else self._known.get((key, checkpoint_id))

    def forget_thread(self, thread: ThreadKey) -> None:
        """Drop everything about a thread."""
        with self._lock:
            for known in [entry for entry in self._known if entry[0][:2] == thread]:
                del self._known[known]


class Encoder:
    """Makes operations out of LangGraph's calls, and LangGraph's tuples out of rows."""

    def __init__(self, codec: Codec, cache: HolderCache) -> None:
        """Seal values with `codec`."""
        self._codec = codec
        self._cache = cache

    def make_writes(
        self,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> PutWrites:
        """Encode the writes of one task."""
        rows = [
            {
                "tenant": key[0],
                "thread_id": key[1],
                "ns": key[2],
                "checkpoint_id": config["configurable"]["checkpoint_id"],
                "task_id": task_id,
                "idx": WRITES_IDX_MAP.get(channel, position),
                "task_path": task_path,
                "channel": channel,
                "value": self._dump_write(channel, value, key),
            }
            for position, (channel, value) in enumerate(writes)
        ]
        return PutWrites(key[:2], lease, rows=rows)

    def _dump_write(self, channel: str, value: Any, key: HeadKey) -> bytes:
        if channel == ERROR and isinstance(value, BaseException):
            # An exception cannot be rebuilt; LangGraph reads it as text.
            value = safe_repr(value)
        return self._codec.dumps(value, where=_place(channel, key))

    def make_checkpoint(
        self,
        key: HeadKey,
        lease: Lease | None,
        attempt: str,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> PutCheckpoint:
        """Encode a checkpoint; only the values of changed channels go with it."""
        configurable = config["configurable"]
        parent_id = configurable.get("checkpoint_id") or None
        seen = read_seen(config, key[2])
        values = checkpoint["channel_values"]
        body = {name: value for name, value in checkpoint.items() if name != "channel_values"}
        channels, unresolved = self._resolve(key, checkpoint, new_versions, parent_id, seen)
        for channel in new_versions:
            if channel in values and channel in checkpoint["channel_versions"]:
                channels[channel] = self._codec.dumps(values[channel], where=_place(channel, key))
        stored_body = self._codec.dumps(body, where=_place("the checkpoint itself", key))
        stored_metadata = self._codec.dumps(
            get_checkpoint_metadata(config, metadata), where=_place("metadata", key)
        )
        inline = [value for _, value in sorted(channels.items()) if isinstance(value, bytes)]
        row = {
            "tenant": key[0],
            "thread_id": key[1],
            "ns": key[2],
            "checkpoint_id": checkpoint["id"],
            "parent_id": parent_id,
            "attempt": attempt,
            "run_id": _run_id(config, metadata),
            "step": metadata.get("step"),
            "body": stored_body,
            "metadata": stored_metadata,
            "content_hash": digest(b"".join([stored_body, stored_metadata, *inline])),
        }
        if not unresolved:
            self._cache.remember(key, checkpoint["id"], _holders(checkpoint, channels))
        return PutCheckpoint(
            key[:2],
            lease,
            row=row,
            channels=channels,
            unresolved=unresolved,
            read_versions=self._read_versions,
            seen=seen,
            is_invocation=any(name.startswith(_ENGINE) for name in configurable),
        )

    def _resolve(
        self,
        key: HeadKey,
        checkpoint: Checkpoint,
        new_versions: ChannelVersions,
        parent_id: str | None,
        seen: Seen | None,
    ) -> tuple[Channels, dict[str, Any]]:
        """Say which checkpoints hold the values of the channels that did not change."""
        sources = [
            known
            for source in (parent_id, seen.checkpoint_id if seen else None, checkpoint["id"])
            if (known := self._cache.recall(key, source)) is not None
        ]
        channels: Channels = {}
        unresolved: dict[str, Any] = {}
        for channel, version in checkpoint["channel_versions"].items():
            if channel in new_versions:
                continue
            for known in sources:
                if channel in known and known[channel][0] == version:
                    holder = known[channel][1]
                    if holder is not None:
                        channels[channel] = holder
                    break
            else:
                unresolved[channel] = version
        return channels, unresolved

    def _read_versions(self, body: bytes) -> Mapping[str, Any]:
        versions: Mapping[str, Any] = self._codec.loads(body)["channel_versions"]
        return versions

    def read(self, tenant: str, stored: StoredCheckpoint) -> CheckpointTuple:
        """Verify and decode a stored checkpoint, and stamp it with what the reader saw."""
        key = (tenant, stored.thread_id, stored.ns)
        load = self._codec.loads
        body = load(stored.body, where=_place("the checkpoint itself", key))
        values = {
            channel: load(value, where=_place(channel, key))
            for channel, value in stored.values.items()
        }
        configurable = {
            "thread_id": stored.thread_id,
            "checkpoint_ns": stored.ns,
            _SEEN: Seen(
                ns=stored.ns,
                head_seq=stored.head_seq,
                checkpoint_id=stored.checkpoint_id,
                load_id=new_id(),
            ),
        }
        parent = stored.parent_id
        checkpoint = cast(Checkpoint, {**body, "channel_values": values})
        self._cache.remember(key, stored.checkpoint_id, _holders(checkpoint, stored.channels))
        return CheckpointTuple(
            config={"configurable": {**configurable, "checkpoint_id": stored.checkpoint_id}},
            checkpoint=checkpoint,
            metadata=load(stored.metadata, where=_place("metadata", key)),
            parent_config=(
                {"configurable": {**configurable, "checkpoint_id": parent}} if parent else None
            ),
            pending_writes=[
                (task_id, channel, load(value, where=_place(channel, key)))
                for task_id, channel, value in stored.writes
            ],
        )


def safe_repr(error: BaseException) -> str:
    """Return an exception's text, also if its own `repr` raises."""
    try:
        return repr(error)
    except Exception:  # noqa: BLE001 -- user code
        return f"{type(error).__name__}(<no text: its repr raises>)"


def _holders(checkpoint: Checkpoint, channels: Channels) -> Holders:
    """Say for each channel of a checkpoint at which version it is and where its value is held."""
    holders: Holders = {}
    for channel, version in checkpoint["channel_versions"].items():
        held = channels.get(channel)
        holders[channel] = (version, checkpoint["id"] if isinstance(held, bytes) else held)
    return holders


def read_seen(config: RunnableConfig, ns: str) -> Seen | None:
    """Return what the invocation behind a call saw when it loaded this namespace, if it did."""
    stamp = config["configurable"].get(_SEEN)
    return stamp if isinstance(stamp, Seen) and stamp.ns == ns else None


def _run_id(config: RunnableConfig, metadata: CheckpointMetadata) -> str | None:
    run_id = metadata.get("run_id") or config.get("metadata", {}).get("run_id")
    return str(run_id) if run_id else None


def _place(part: str, key: HeadKey) -> str:
    ns = f", namespace {key[2]!r}" if key[2] else ""
    return f"channel {part!r} of thread {key[1]!r}{ns}"
