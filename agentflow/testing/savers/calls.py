"""How the suites call a saver, and how they look at what they get back.

Most tests put checkpoints with one channel `x` whose version and value are the checkpoint's id, so
that a checkpoint that came back with something else shows at once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    Checkpoint,
    CheckpointTuple,
    empty_checkpoint,
)

from agentflow.checkpoint import Saver
from agentflow.serializer import Serializer
from agentflow.types import FencingToken, Lease

AnySaver: TypeAlias = BaseCheckpointSaver[Any]

_SERIALIZER = Serializer(unknown="refuse")
_TICKS = 10**7
"""A UUID of version 6 counts in units of 100 ns."""


def at(checkpoint_id: str | None = None, *, thread: str = "t", ns: str = "") -> RunnableConfig:
    """Name a place."""
    configurable: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": ns}
    if checkpoint_id is not None:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def after(loaded: RunnableConfig, checkpoint_id: str) -> RunnableConfig:
    """Name the place of an invocation that began at `loaded` and has put `checkpoint_id` since."""
    return {"configurable": {**loaded["configurable"], "checkpoint_id": checkpoint_id}}


def checkpoint(checkpoint_id: str, versions: dict[str, Any], **values: Any) -> Checkpoint:
    """Make a checkpoint."""
    return {
        **empty_checkpoint(),
        "id": checkpoint_id,
        "channel_values": values,
        "channel_versions": versions,
    }


def put(
    saver: AnySaver,
    checkpoint_id: str,
    parent: str | RunnableConfig | None = None,
    *,
    thread: str = "t",
    ns: str = "",
    changed: Any = None,
    metadata: dict[str, Any] | None = None,
) -> RunnableConfig:
    """Put a checkpoint whose one channel `x` has the version and the value of its id."""
    config = at(parent, thread=thread, ns=ns) if not isinstance(parent, dict) else parent
    value = checkpoint_id if changed is None else changed
    made = checkpoint(checkpoint_id, {"x": checkpoint_id}, x=value)
    details = cast("Any", {"source": "loop", "step": 1, **(metadata or {})})
    return saver.put(config, made, details, {"x": checkpoint_id})


def put_list(
    saver: AnySaver, checkpoint_id: str, parent: str | RunnableConfig | None, items: list[Any]
) -> RunnableConfig:
    """Put a checkpoint whose channel `x` holds a list."""
    return put(saver, checkpoint_id, parent, changed=items)


def put_line(saver: AnySaver, *names: str, thread: str = "t", ns: str = "") -> None:
    """Put checkpoints, each on the one before."""
    parent: str | None = None
    for name in names:
        put(saver, name, parent, thread=thread, ns=ns)
        parent = name


def load(saver: AnySaver, checkpoint_id: str | None = None, **place: Any) -> CheckpointTuple:
    """Load what must be there."""
    found = saver.get_tuple(at(checkpoint_id, **place))
    assert found is not None, f"no checkpoint {checkpoint_id or 'head'} at {place or 'the root'}"
    return found


def values_at(saver: AnySaver, checkpoint_id: str | None = None, **place: Any) -> dict[str, Any]:
    """Return the values of a checkpoint that must be there."""
    return load(saver, checkpoint_id, **place).checkpoint["channel_values"]


def writes_at(
    saver: AnySaver, checkpoint_id: str | None = None, **place: Any
) -> list[tuple[str, str, Any]]:
    """Return the pending writes of a checkpoint that must be there."""
    return [tuple(write) for write in load(saver, checkpoint_id, **place).pending_writes or ()]


def id_of(found: CheckpointTuple) -> str:
    """Return a checkpoint's id."""
    return found.checkpoint["id"]


def ids(found: Iterable[CheckpointTuple]) -> list[str]:
    """Return the ids of some checkpoints, in their order."""
    return [id_of(each) for each in found]


def public(config: RunnableConfig | None) -> dict[str, Any] | None:
    """Return a place without what a saver noted for itself, under keys with two underscores."""
    if config is None:
        return None
    return {k: v for k, v in config["configurable"].items() if not k.startswith("__")}


def plain(found: CheckpointTuple | None) -> tuple[Any, ...] | None:
    """Return all that a saver says about a checkpoint, so that two can be compared."""
    if found is None:
        return None
    return (
        public(found.config),
        found.checkpoint,
        found.metadata,
        public(found.parent_config),
        found.pending_writes,
    )


def dumped(values: Any) -> bytes:
    """Return the bytes of values: equal only if they are the same in content, type and order."""
    return _SERIALIZER.dumps(values)


def clock_id(seconds: float) -> str:
    """Make an id as LangGraph would on a host whose clock stands at `seconds`."""
    ticks = int(seconds * _TICKS)
    upper, lower = ticks >> 12, ticks & 0xFFF
    # Version 6 and the variant of RFC 9562; a real one has random bits at the end.
    return str(uuid.UUID(int=upper << 80 | 0x6 << 76 | lower << 64 | 0x2 << 62))


def lease(token: int, thread: str = "t") -> Lease:
    """Make a lease."""
    return Lease(tenant="", run_id="r", thread_id=thread, worker="w", token=FencingToken(token))


def acquired(saver: Saver, held: Lease) -> Saver:
    """Take the lease's thread, and return a saver that writes under it."""
    assert asyncio.run(saver.acquire(held)) == held.token
    return saver.with_lease(held)
