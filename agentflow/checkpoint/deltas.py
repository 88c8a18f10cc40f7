"""What LangGraph's delta channels have had along a line of checkpoints.

A `DeltaChannel` stores its value only now and then; at any other checkpoint it is made from the
nearest stored value before it and the writes since then. Where a line was cut by deleting older
checkpoints, the first one that is left has the history of what was before it as its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from langgraph.checkpoint.base import DeltaChannelHistory

from agentflow.checkpoint.encoding import Encoder, open_record
from agentflow.checkpoint.layout import Held
from agentflow.checkpoint.pending import Write, load_writes
from agentflow.checkpoint.records import Place, Record, cut_chain
from agentflow.checkpoint.rows import FoundCheckpoint, HeadKey, Rows
from agentflow.errors import HashMismatchError

_PAGE = 200
_COUNTERS: Final = "counters_since_delta_snapshot"


class _Ancestor(NamedTuple):
    found: FoundCheckpoint
    record: Record
    writes: Sequence[Write]


def delta_channels(metadata: Mapping[str, Any]) -> list[str]:
    """Return the delta channels of a checkpoint, by what LangGraph notes in its metadata."""
    return list(metadata.get(_COUNTERS) or ())


def read_history(
    rows: Rows, encoder: Encoder, key: HeadKey, checkpoint_id: str, channels: Sequence[str]
) -> dict[str, DeltaChannelHistory]:
    """Collect what LangGraph needs to make the values of delta channels at a checkpoint.

    The writes of the checkpoint itself are not part of it: they belong to its next superstep.

    Raises:
        HashMismatchError: A checkpoint on the way is not there any more.
    """
    collected = _Collected(rows, encoder, Place(*key), channels)
    ancestor: _Ancestor | None = None
    for number, ancestor in enumerate(_line(rows, encoder, key, checkpoint_id)):
        if number:
            collected.add(ancestor)
        if ancestor.found.row.base is not None:
            collected.add_base(ancestor.found.row.checkpoint_id, ancestor.found.row.base)
            break
        if not collected.missing:
            break
    else:
        if ancestor is not None and collected.missing:
            _check_beginning(rows, ancestor)
    return collected.history()


def _check_beginning(rows: Rows, first: _Ancestor) -> None:
    """Refuse a line whose first checkpoint had a parent that was not deleted by agentflow."""
    row, place = (
        first.found.row,
        Place(first.found.tenant, first.found.thread_id, first.found.row.ns),
    )
    if row.parent_id is None or first.record.parent_hash is None:
        return
    if rows.find_anchor(row.thread, row.ns, row.parent_id) is None:
        where = place.of(f"checkpoint {row.checkpoint_id!r}")
        raise HashMismatchError(where, cut_chain(row.parent_id))


class _Collected:
    """The writes and stored values found so far, the newest first."""

    def __init__(self, rows: Rows, encoder: Encoder, place: Place, channels: Sequence[str]) -> None:
        self._rows = rows
        self._encoder = encoder
        self._place = place
        self._writes: dict[str, list[Any]] = {channel: [] for channel in channels}
        self._seeds: dict[str, Any] = {}
        self.missing = set(channels)
        """Channels of which no stored value was found."""

    def add(self, ancestor: _Ancestor) -> None:
        for write in reversed(ancestor.writes):
            if write[1] in self.missing:
                self._writes[write[1]].append(write)
        for channel in tuple(self.missing):
            held = ancestor.record.layout.get(channel)
            if held is not None and held.stored is not None:
                self._seeds[channel] = self._value(ancestor.found, held, channel)
                self.missing.discard(channel)

    def add_base(self, checkpoint_id: str, base: bytes) -> None:
        context = self._place.context_of_base(checkpoint_id)
        where = self._place.of(f"the base of checkpoint {checkpoint_id!r}")
        before = self._encoder.codec.loads(base, context=context, where=where)
        for channel in self.missing & before.keys():
            self._writes[channel] += reversed(before[channel]["writes"])
            if "seed" in before[channel]:
                self._seeds[channel] = before[channel]["seed"]

    def history(self) -> dict[str, DeltaChannelHistory]:
        found: dict[str, DeltaChannelHistory] = {}
        for channel, writes in self._writes.items():
            found[channel] = {"writes": list(reversed(writes))}
            if channel in self._seeds:
                found[channel]["seed"] = self._seeds[channel]
        return found

    def _value(self, found: FoundCheckpoint, held: Held, channel: str) -> Any:
        thread = found.row.thread
        parts = held.stored if isinstance(held.stored, tuple) else ()
        stretches = self._rows.list_values((thread, part) for part in parts)
        return self._encoder.read_value(found, channel, held, stretches)[0]


def _line(rows: Rows, encoder: Encoder, key: HeadKey, checkpoint_id: str) -> Iterator[_Ancestor]:
    """Yield a checkpoint and its ancestors, the newest first."""
    start: str | None = checkpoint_id
    while start is not None:
        page = rows.list_line(key, start, _PAGE)
        pairs = [(found, open_record(encoder.codec, found)) for found in page]
        writes = load_writes(rows, encoder.codec, pairs)
        for (found, record), own in zip(pairs, writes, strict=True):
            yield _Ancestor(found, record, own)
        start = page[-1].row.parent_id if len(page) == _PAGE else None
