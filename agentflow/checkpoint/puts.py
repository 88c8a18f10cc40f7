"""What is put: serialized, but for what depends on the state of its thread.

`encoding` makes it in the caller's thread; `planning` decides in the writer's what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from agentflow.checkpoint.records import Call
from agentflow.checkpoint.rows import HeadKey
from agentflow.checkpoint.stamps import Seen
from agentflow.codec import Codec
from agentflow.delta import Grown, KnownList
from agentflow.types import Lease

INLINE = 128
"""Bytes up to which a value stands in the row of each checkpoint that has it."""


class WholeList(NamedTuple):
    """A list that is stored from its first element."""

    block: bytes
    length: int
    digest: bytes


class GrownList(NamedTuple):
    """A list that continues the one of an earlier checkpoint."""

    since: str
    """That checkpoint's id."""
    growth: Grown


NewValue = bytes | WholeList | GrownList
"""A changed channel's value, serialized."""


def size_of(value: NewValue) -> int:
    """Return the bytes of a value."""
    if isinstance(value, bytes):
        return len(value)
    return len(value.growth.block if isinstance(value, GrownList) else value.block)


@dataclass(slots=True, kw_only=True)
class PlannedWrites:
    """The writes of one task."""

    key: HeadKey
    lease: Lease | None
    codec: Codec
    checkpoint_id: str
    call: Call
    size: int
    """Bytes of what it brings, before compression."""


@dataclass(slots=True, kw_only=True)
class PlannedCheckpoint:
    """A checkpoint, serialized but for what depends on the state of its thread."""

    key: HeadKey
    ns: str
    """The last part of its key."""
    lease: Lease | None
    codec: Codec
    checkpoint_id: str
    parent_id: str | None
    attempt: str
    run_id: str | None
    step: int | None
    head: bytes
    """Serialized, as `records` describes it."""
    versions: Mapping[str, Any]
    """Of all channels."""
    changed: frozenset[str]
    values: Mapping[str, NewValue]
    """Of the changed channels; one without a value is empty from now on."""
    kept: frozenset[str]
    """The other channels that have a value, which something that is stored must have."""
    lists: Mapping[str, tuple[Any, KnownList]]
    """What its successor needs to know of its lists."""
    source: str | None
    """The checkpoint from which lists have grown."""
    seen: Seen | None
    found_nothing: bool
    """Whether it comes from a graph that looked and found its namespace empty."""
    size: int
    """Bytes of what it brings, before compression."""
    was_sent: bool = False
    """Whether it was part of a commit before, whose outcome is not known."""


Planned = PlannedWrites | PlannedCheckpoint
