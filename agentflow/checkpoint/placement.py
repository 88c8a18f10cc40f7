"""Deciding where the values of checkpoints are kept, and what is stored for that.

A small value stands in its checkpoint's row, and a large one is a row of its own. A list is a
series of stretches: what was added to it goes behind them, and short stretches are put together.
What has not changed is only referred to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from langgraph.constants import START

from agentflow.apart import is_large
from agentflow.checkpoint.layout import WHOLE, Held, Layout, Part, Stored, closed, cut
from agentflow.checkpoint.offload import confirm, open_value, seal_value
from agentflow.checkpoint.puts import (
    INLINE,
    GrownList,
    NewValue,
    Planned,
    PlannedCheckpoint,
    PlannedWrites,
    WholeList,
)
from agentflow.checkpoint.records import Place, Written, unpack_record
from agentflow.checkpoint.rows import FoundCheckpoint, Head, ObjectRow, Query, Rows, ValueRow
from agentflow.codec import digest_of, is_apart
from agentflow.delta import joined
from agentflow.objects import ObjectTier

_TIER = 16
"""Each time a list has grown by so many elements, its last stretches are put together."""


class Placement:
    """Places the values of what a batch puts into one thread."""

    def __init__(self, rows: Rows, thread: int, next_number: Callable[[], int]) -> None:
        """Begin without any.

        Args:
            rows: Where they go.
            thread: The thread's number.
            next_number: Gives each series its number in the thread.
        """
        self._rows = rows
        self._thread = thread
        self._next = next_number
        self._made: dict[tuple[str, str], Layout] = {}
        """Layouts of this batch, by namespace and checkpoint."""
        self._stored: dict[tuple[str, str], Layout | None] = {}
        """Layouts that were read."""
        self._tier: ObjectTier | None = None
        """Where the objects are, once there are any."""
        self.values: list[ValueRow] = []
        self.replaced: list[ValueRow] = []
        self.dropped: list[tuple[int, int]] = []
        self.objects: list[ObjectRow] = []
        self.blocks: dict[bytes, tuple[int, int, int]] = {}
        """Where the blocks of the checkpoint that was laid out last are put."""

    def lay_out(self, put: PlannedCheckpoint, head: Head | None) -> Layout | None:
        """Say where each channel's value is kept; `None` if what the put builds on is gone."""
        values, replaced = len(self.values), len(self.replaced)
        dropped, objects = len(self.dropped), len(self.objects)
        self.blocks = {}
        layout = self._lay_out(put, head)
        if layout is None:
            del self.values[values:], self.replaced[replaced:]
            del self.dropped[dropped:], self.objects[objects:]
            return None
        self._made[put.ns, put.checkpoint_id] = layout
        return layout

    def layout_of(self, put: PlannedCheckpoint, head: Head | None, source: str) -> Layout | None:
        """Return the layout of a checkpoint of the put's namespace, if it is there."""
        if head is None:
            return None
        if head.checkpoint_id == source:
            return head.layout
        place = (put.ns, source)
        if source == put.checkpoint_id and place not in self._made and not put.was_sent:
            # Nothing has this id yet, but for one that was put by another attempt.
            return None
        if place in self._made:
            return self._made[place]
        if place not in self._stored:
            found = self._rows.find_checkpoint((*put.key[:2], put.ns), source)
            self._stored[place] = (
                unpack_record(put.codec, found.row, Place(*put.key)).layout
                if isinstance(found, FoundCheckpoint)
                else None
            )
        return self._stored[place]

    def set_apart(self, put: PlannedWrites, written: Written) -> Written:
        """Make a value of its own of a write that has to be in an object."""
        if not isinstance(written, bytes) or not is_large(put.codec, written):
            return written
        series = self._next()
        row = self._sealed(put, series, 0, written)
        if not is_apart(row.data):
            return written
        self.values.append(row)
        return [series, 0, WHOLE]

    def confirm(self) -> None:
        """See that the objects are still there."""
        assert self._tier is not None
        confirm(self._tier, (row.object for row in self.objects))

    def _lay_out(self, put: PlannedCheckpoint, head: Head | None) -> Layout | None:
        layout: dict[str, Held] = {}
        missing: dict[str, Any] = {}
        for channel, version in put.versions.items():
            value = put.values.get(channel)
            if value is not None:
                stored = self._keep(put, head, channel, value)
                if stored is None:
                    return None
                digest = None if isinstance(stored, bytes) else _digest(value)
                layout[channel] = Held(version, stored, digest)
            elif channel in put.changed:
                layout[channel] = Held(version, None)
            elif (held := self._held(put, head, channel, version)) is not None:
                layout[channel] = held
            else:
                missing[channel] = version
        if missing:
            found = self._search(put, head, missing)
            if not put.kept.isdisjoint(missing.keys() - found.keys()):
                return None
            layout.update(found)
            layout.update({c: Held(v, None) for c, v in missing.items() if c not in found})
        return layout

    def _keep(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, value: NewValue
    ) -> Stored | None:
        if isinstance(value, bytes):
            # An input is gone after one step, and stands best beside the writes made of it.
            if len(value) <= INLINE or (channel == START and not is_large(put.codec, value)):
                return value
            series = self._next()
            self._put_block(put, series, 0, value, WHOLE)
            return (Part(series, WHOLE, is_open=False),)
        if isinstance(value, GrownList):
            return self._continue(put, head, channel, value)
        series = self._next()
        self._put_block(put, series, 0, value.block, value.length)
        return (Part(series, value.length, is_open=True),)

    def _put_block(
        self, put: PlannedCheckpoint, series: int, start: int, block: bytes, length: int
    ) -> None:
        self.values.append(self._sealed(put, series, start, block))
        self.blocks[block] = (series, start, length)

    def _sealed(self, put: Planned, series: int, start: int, block: bytes) -> ValueRow:
        place, number = Place(*put.key), self._thread
        sealed = seal_value(put.codec, self._rows, place, series, start, block)
        if sealed.object:
            self._tier = put.codec.tier
            self.objects.append(ObjectRow(number, series, start, sealed.object))
        return ValueRow(number, series, start, sealed.data)

    def _append(self, put: PlannedCheckpoint, last: Part, block: bytes, length: int) -> Part:
        """Put elements behind a series, and its last stretches together if they are many."""
        start, after = last.length, last.length + length
        appended = Part(last.series, after, is_open=True)
        tier = start // _TIER
        is_alone = not any(row.series == last.series for row in self.values)
        small = (
            self._rows.list_tail(self._thread, last.series, tier * _TIER)
            if after // _TIER > tier and is_alone
            else []
        )
        # What is in an object is large enough.
        if len(small) <= 1 or any(is_apart(row.data) for row in small):
            self._put_block(put, last.series, start, block, length)
            return appended
        place = Place(*put.key)
        starts = [row.start for row in small]
        opened = (open_value(put.codec, place, row, place.of("a list")) for row in small)
        blocks = [*opened, block]
        lengths = [end - begin for begin, end in pairwise([*starts, start, after])]
        self.replaced.append(self._sealed(put, last.series, starts[0], joined(blocks, lengths)))
        self.dropped += [(row.series, row.start) for row in small[1:]]
        self.blocks[block] = (last.series, start, length)
        return appended

    def _continue(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, value: GrownList
    ) -> Stored | None:
        """Put a list's new elements behind the stored ones."""
        base = self.layout_of(put, head, value.since)
        held = base.get(channel) if base is not None else None
        if held is None or held.stored is None or isinstance(held.stored, bytes):
            return None
        kept, block, count = value.growth.kept, value.growth.block, value.growth.count
        parts = cut(held.stored, kept)
        # Only the newest checkpoint may go on in place: what follows an older one is a branch, and
        # the series may have gone on without it.
        may_append = head is not None and head.checkpoint_id == value.since
        if not may_append:
            parts = [part._replace(is_open=False) for part in parts]
        if sum(part.length for part in parts) != kept:
            return None
        if count == kept:
            return tuple(parts)
        if parts and parts[-1].is_open:
            parts.append(self._append(put, parts.pop(), block, count - kept))
        else:
            parts = [part._replace(is_open=False) for part in parts]
            series = self._next()
            self._put_block(put, series, 0, block, count - kept)
            parts.append(Part(series, count - kept, is_open=True))
        return tuple(parts)

    def _held(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, version: Any
    ) -> Held | None:
        """Find the unchanged value of a channel in what the put comes from."""
        seen_id = put.seen.checkpoint_id if put.seen is not None else None
        # Its own id first: a checkpoint that is put again repeats only what changed in between.
        for source in dict.fromkeys((put.checkpoint_id, put.parent_id, seen_id)):
            layout = self.layout_of(put, head, source) if source is not None else None
            held = layout.get(channel) if layout is not None else None
            if held is not None and held.version == version:
                if head is not None and source == head.checkpoint_id:
                    return held
                return held._replace(stored=closed(held.stored))
        return None

    def _search(
        self, put: PlannedCheckpoint, head: Head | None, missing: Mapping[str, Any]
    ) -> dict[str, Held]:
        """Find values by their versions anywhere in the namespace, the newest first.

        Only a caller that puts without ever having read the thread comes here.
        """
        found: dict[str, Held] = {}
        for layout in self._all_layouts(put) if head is not None else ():
            if len(found) == len(missing):
                break
            for channel in missing.keys() - found.keys():
                held = layout.get(channel)
                if held is not None and held.version == missing[channel]:
                    found[channel] = held._replace(stored=closed(held.stored))
        return found

    def _all_layouts(self, put: PlannedCheckpoint) -> Iterator[Layout]:
        yield from reversed(self._made.values())
        query = Query(tenant=put.key[0], thread_id=put.key[1], ns=put.ns)
        while page := self._rows.list_checkpoints(query):
            for found in page:
                yield unpack_record(put.codec, found.row, Place(*put.key)).layout
            query = replace(query, after=page[-1].row.seq)


def _digest(value: NewValue) -> bytes:
    if isinstance(value, GrownList):
        return value.growth.digest
    return value.digest if isinstance(value, WholeList) else digest_of(value)
