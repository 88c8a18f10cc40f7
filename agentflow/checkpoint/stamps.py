"""What an invocation saw when it loaded, as LangGraph carries it from a load to the puts.

LangGraph hands the configurable keys of a loaded checkpoint back with each put of the invocation,
and keeps keys that start with two underscores out of the metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from langchain_core.runnables import RunnableConfig

KEY = "__agentflow_seen"
_PARTS = ("head_seq", "checkpoint_id", "ns", "load_id", "step", "is_marked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an invocation saw when it loaded; it comes back with everything the invocation puts."""

    ns: str
    head_seq: int
    checkpoint_id: str
    load_id: str
    """Names the load, and with it the invocation."""
    step: int | None
    is_marked: bool
    """Whether a node comes next after which the state has to be stored."""


class Stamp(str):
    """A `Seen` as text, since configurations are sent to clients as JSON.

    Two loads of the same checkpoint at the same head are equal, as loads of other savers are.
    """

    seen: Seen

    __slots__ = ("seen",)

    def __new__(cls, seen: Seen) -> Self:
        """Write down what was seen."""
        parts = [getattr(seen, name) for name in _PARTS]
        stamp = super().__new__(cls, json.dumps(parts))
        stamp.seen = seen
        return stamp

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Stamp):
            return self._without_load() == other._without_load()
        return super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self._without_load())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Stamp, (self.seen,))

    def _without_load(self) -> tuple[Any, ...]:
        return (self.seen.head_seq, self.seen.checkpoint_id, self.seen.ns)


def read_seen(config: RunnableConfig, ns: str) -> Seen | None:
    """Return what the invocation behind a call saw when it loaded this namespace, if it did."""
    stamp = config["configurable"].get(KEY)
    if stamp is None:
        return None
    seen = stamp.seen if isinstance(stamp, Stamp) else _parsed(stamp)
    return seen if seen is not None and seen.ns == ns else None


def _parsed(text: Any) -> Seen | None:
    """Read a stamp that was away as JSON; what is not one counts as none."""
    try:
        parts = dict(zip(_PARTS, json.loads(text), strict=True))
    except (TypeError, ValueError):
        return None
    is_text = all(isinstance(parts[name], str) for name in ("checkpoint_id", "ns", "load_id"))
    return Seen(**parts) if is_text and isinstance(parts["head_seq"], int) else None
