"""Deleting the values of a thread that nothing needs any more, after checkpoints were deleted.

What no checkpoint refers to is never referred to again: references are only copied from checkpoints
that are there, and every deletion of a checkpoint raises the thread's number, which undoes plans
that were made from it. So values are marked without a lock, page by page, while the thread goes on.
Only what is cut off the end of a list is changed in place, and only if nothing else has changed the
thread since it was marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from agentflow.checkpoint import steps
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.fencing import lock_to_write
from agentflow.checkpoint.layout import WHOLE
from agentflow.checkpoint.offload import note, open_value, seal_value
from agentflow.checkpoint.records import (
    Call,
    Place,
    Record,
    references,
    unpack_record,
    unpack_writes,
)
from agentflow.checkpoint.rows import (
    AnchorRow,
    CheckpointRow,
    DeadValue,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    WritesRow,
)
from agentflow.checkpoint.steps import Change, Read, Steps
from agentflow.codec import is_apart
from agentflow.database.writer import Rejected
from agentflow.delta import cut_block
from agentflow.types import Lease

T = TypeVar("T")
_MIN_WINDOW, _MAX_WINDOW = 512, 65_536
"""How many series are marked at a time: as many as checkpoints have to be read for it."""
_ALL = 1 << 62
"""Reaches beyond the end of any series."""


@dataclass(slots=True)
class _Window:
    """Some series, and some anchors, that may not be needed any more."""

    series: Sequence[tuple[int, int]]
    """With the starts of their last stretches."""
    anchors: Sequence[AnchorRow]
    needed: dict[int, int] = field(default_factory=dict)
    """How far each series is needed."""
    parents: set[tuple[str, str]] = field(default_factory=set)
    """Which of the anchors something follows."""

    def mark(self, encoder: Encoder, thread: ThreadKey, rows: Sequence[CheckpointRow]) -> None:
        """Note what checkpoints need."""
        anchored = {(anchor.ns, anchor.checkpoint_id) for anchor in self.anchors}
        for row in rows:
            parent = (row.ns, row.parent_id or "")
            if parent in anchored:
                self.parents.add(parent)
            self._need(_reach(encoder, thread, row))

    def mark_log(self, encoder: Encoder, thread: ThreadKey, rows: Sequence[WritesRow]) -> None:
        """Note what writes of the log need: what is, or was, in objects, and nothing else."""
        for row in rows:
            place = Place(*thread, row.ns)
            context = place.context_of_writes(row.checkpoint_id, row.seq)
            where = place.of(f"writes of checkpoint {row.checkpoint_id!r}")
            self._need(_shared(unpack_writes(encoder.codec, row.data, where, context)))

    def _need(self, reached: Iterable[tuple[int, int]]) -> None:
        first, last = (self.series[0][0], self.series[-1][0]) if self.series else (1, 0)
        for series, reach in reached:
            if first <= series <= last:
                self.needed[series] = max(reach, self.needed.get(series, 0))

    def dead(self) -> list[DeadValue]:
        return [
            DeadValue(series, self.needed.get(series, 0), last)
            for series, last in self.series
            if last >= self.needed.get(series, 0)
        ]

    def ends(self) -> list[tuple[int, int]]:
        """Return how far lists are needed, of which the last stretch may hold more."""
        return [(series, reach) for series, reach in self.needed.items() if reach < _ALL]

    def idle(self) -> list[AnchorRow]:
        return [
            anchor
            for anchor in self.anchors
            if anchor.checkpoint_id and (anchor.ns, anchor.checkpoint_id) not in self.parents
        ]


def _reach(encoder: Encoder, thread: ThreadKey, row: CheckpointRow) -> Iterator[tuple[int, int]]:
    """Say which series a checkpoint needs, and how far."""
    place = Place(*thread, row.ns)
    record: Record = unpack_record(encoder.codec, row, place)
    for _, stored, _ in record.layout.values():
        if stored is not None and not isinstance(stored, bytes):
            for part in stored:
                yield part.series, _ALL if part.length == WHOLE else part.length
    yield from _shared(record.calls)
    if row.parent_writes is not None:
        context = place.context_of_carried(row.seq, row.checkpoint_id)
        where = place.of(f"writes of checkpoint {row.parent_id!r}")
        yield from _shared(unpack_writes(encoder.codec, row.parent_writes, where, context))


def _shared(calls: Iterable[Call]) -> Iterator[tuple[int, int]]:
    """Say which series writes need, and how far."""
    for series, start, length in references(calls):
        yield series, _ALL if length == WHOLE else start + length


def collect(encoder: Encoder, thread: ThreadKey, lease: Lease | None) -> Steps[None]:
    """Delete the values and anchors of a thread that nothing needs, if a note says so."""
    begun = yield Read(partial(_begin, thread))
    if begun is None:
        return
    state, note = begun
    seq: int | None = state.seq
    series, anchor, size = 0, None, _MIN_WINDOW
    while True:
        window = yield Read(partial(_open_window, state, series, anchor, size))
        if not window.series and not window.anchors:
            break
        read = yield from _mark_all(encoder, thread, state, window)
        size = max(_MIN_WINDOW, min(read, _MAX_WINDOW))
        for dead in _chunks(window.dead()):
            while not (yield Change(partial(_bury, thread, lease, state, dead), thread)):
                pass
        for ends in _chunks(window.ends()):
            seq = yield Change(partial(_shorten, encoder, thread, lease, seq, ends), thread)
        if idle := window.idle():
            seq = yield Change(partial(_forget_anchors, thread, lease, seq, idle), thread)
        series = window.series[-1][0] if window.series else series
        anchor = window.anchors[-1] if window.anchors else anchor
    if seq is not None:
        yield Change(partial(_remove_note, thread, lease, note), thread)


def _mark_all(
    encoder: Encoder, thread: ThreadKey, state: ThreadState, window: _Window
) -> Steps[int]:
    """Note what is needed of a window; return how many rows were read for it."""
    after, logged, read = None, None, 0
    while page := (yield Read(partial(_mark, encoder, thread, state, window, after))):
        after, count = page
        read += count
    # Behind the checkpoints, since writes move from these into the log and not back.
    while page := (yield Read(partial(_mark_log, encoder, thread, state, window, logged))):
        logged, count = page
        read += count
    return read


def _begin(thread: ThreadKey, rows: Rows) -> tuple[ThreadState, AnchorRow] | None:
    found = rows.find_checkpoint((*thread, ""), None)
    note = None if found is None else rows.find_anchor(found.thread.number, "", "")
    return None if found is None or note is None else (found.thread, note)


def _open_window(
    state: ThreadState, series: int, anchor: AnchorRow | None, size: int, rows: Rows
) -> _Window:
    # What is put from now on has higher numbers.
    return _Window(
        rows.list_series(state.number, series, state.seq, size),
        rows.scan(state, AnchorRow, anchor),
    )


def _mark(
    encoder: Encoder,
    thread: ThreadKey,
    state: ThreadState,
    window: _Window,
    after: CheckpointRow | None,
    rows: Rows,
) -> tuple[CheckpointRow, int] | None:
    page = rows.scan(state, CheckpointRow, after)
    window.mark(encoder, thread, page)
    return (page[-1]._replace(data=b"", parent_writes=None, base=None), len(page)) if page else None


def _mark_log(
    encoder: Encoder,
    thread: ThreadKey,
    state: ThreadState,
    window: _Window,
    after: WritesRow | None,
    rows: Rows,
) -> tuple[WritesRow, int] | None:
    page = rows.scan(state, WritesRow, after)
    window.mark_log(encoder, thread, page)
    return (page[-1]._replace(data=b""), len(page)) if page else None


def _bury(
    thread: ThreadKey,
    lease: Lease | None,
    marked: ThreadState,
    dead: Sequence[DeadValue],
    rows: Rows,
) -> Rejected | bool:
    """Delete dead stretches; say whether all of them are gone."""
    state = lock_to_write(rows, thread, lease)
    if isinstance(state, Rejected):
        return state
    if state.number != marked.number:
        return True
    return rows.remove_values(
        state.number, dead, limit=steps.BATCH_ROWS, max_bytes=steps.BATCH_BYTES
    )


def _shorten(
    encoder: Encoder,
    thread: ThreadKey,
    lease: Lease | None,
    seq: int | None,
    ends: Sequence[tuple[int, int]],
    rows: Rows,
) -> Rejected | int | None:
    """Cut the elements that nobody needs off the stretches in which the others stand.

    Args:
        encoder: How they are stored.
        thread: The thread.
        lease: Under which it is changed.
        seq: The thread's number when it was marked; a list may have gone on since.
        ends: Series, and how far each is needed.
        rows: Where they are.

    Returns:
        The thread's number from now on; `None` if it is another one than it was.
    """
    state = lock_to_write(rows, thread, lease)
    if isinstance(state, Rejected):
        return state
    if state.seq != seq:
        return None
    place, codec = Place(*thread, ""), encoder.codec
    change = ThreadChange(state, replace(state, seq=state.seq + 1))
    last = rows.list_stretches({(state.number, series, reach - 1) for series, reach in ends})
    needed = dict(ends)
    for row in last.values():
        whole = open_value(codec, place, row, place.of("a list"))
        block = cut_block(whole, needed[row.series] - row.start)
        if block is None:
            continue
        sealed = seal_value(codec, rows, place, row.series, row.start, block)
        if is_apart(row.data) and not sealed.object:
            change.released.append((row.series, row.start))
        change.replaced.append(row._replace(data=sealed.data))
        note(change, sealed, row, codec.tier)
    if not change.replaced:
        return seq
    rows.apply([change])
    return change.after.seq


def _forget_anchors(
    thread: ThreadKey,
    lease: Lease | None,
    seq: int | None,
    idle: Sequence[AnchorRow],
    rows: Rows,
) -> Rejected | int | None:
    """Delete anchors that nothing follows, if nothing has changed since that was found out."""
    state = lock_to_write(rows, thread, lease)
    if isinstance(state, Rejected):
        return state
    if state.seq != seq:
        return None
    rows.remove(state.number, (), idle)
    return seq


def _remove_note(
    thread: ThreadKey, lease: Lease | None, note: AnchorRow, rows: Rows
) -> Rejected | None:
    """Delete the note, unless something was deleted since it was read."""
    state = lock_to_write(rows, thread, lease)
    if isinstance(state, Rejected):
        return state
    if rows.find_anchor(state.number, "", "") == note:
        rows.remove(state.number, (), [note])
    return None


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for begin in range(0, len(items), steps.BATCH_ROWS):
        yield items[begin : begin + steps.BATCH_ROWS]
