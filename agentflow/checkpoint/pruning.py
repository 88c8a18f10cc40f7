"""Deleting checkpoints in small batches, each of which leaves the thread whole.

A batch is a transaction of its own under the thread's lock and touches a bounded number of rows and
bytes. In a namespace the rows that are kept are looked at first: one whose parent is to go gets
what its delta channels had there (its base) and the parent's hash (an anchor). Then the others go,
the newest first, so that none is ever there without its parent. Rows that came meanwhile are looked
at under the same lock before anything is deleted; so whatever a running graph has made of a
checkpoint that goes, it is cut off from it first.

Values go last (`marking.py`). A note in the database says that this is to be done, so that whoever
calls again after a crash finishes it.

A whole thread is deleted by giving its name to an empty one, and its rows later.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial

from agentflow.checkpoint import steps
from agentflow.checkpoint.deltas import delta_channels, read_history
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.fencing import fence, lock, lock_to_write
from agentflow.checkpoint.layout import closed
from agentflow.checkpoint.marking import collect
from agentflow.checkpoint.pending import inlined
from agentflow.checkpoint.records import (
    Place,
    pack_record,
    reseal,
    unpack_record,
)
from agentflow.checkpoint.rows import (
    AnchorRow,
    CheckpointRow,
    FoundCheckpoint,
    Link,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    WritesRow,
)
from agentflow.checkpoint.steps import Change, Read, Steps
from agentflow.database.writer import Rejected
from agentflow.errors import FencedError
from agentflow.failpoints import failpoint
from agentflow.types import Lease

_DETACHED = 4
"""Checkpoints that one transaction cuts off from their parents at most."""
_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which checkpoints of each namespace go."""

    keep_last: int | None = None
    """All but so many."""
    run_ids: frozenset[str] | None = None
    """Those of these runs."""


Guard = Callable[[Rows, ThreadState], bool]
"""Whether a locked thread may still be changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress:
    """How far a namespace is done."""

    number: int
    """The thread's, which another one of its name would not have."""
    ns: str
    limit: int
    """What has this number or a higher one is kept."""
    checked: int
    """The number up to which the rows that are kept do not need those that go."""
    below: int
    """What goes and has this number or a higher one is gone."""
    removed: int = 0


def prune(
    encoder: Encoder,
    thread: ThreadKey,
    selection: Selection,
    lease: Lease | None,
    guard: Guard | None = None,
) -> Steps[int]:
    """Delete some checkpoints of a thread; return how many there were."""
    removed, after = 0, None
    while places := (yield Read(partial(_survey, thread, selection, after))):
        for place in places:
            progress = place
            while progress is not None and not isinstance(progress, int):
                batch = _Batch(encoder, thread, selection, lease, guard, progress)
                if progress.below == place.below:
                    # Histories of delta channels may be long: they are read without the lock.
                    prepared = yield Read(batch.prepare)
                    batch = replace(batch, prepared=prepared)
                progress = yield Change(batch.run, thread)
            removed += progress or 0
        after = places[-1].ns
    try:
        yield from collect(encoder, thread, lease)
    except FencedError:
        # Whoever gives a guard wants a thread that is held to be let be.
        if guard is None:
            raise
    yield from clear_retired()
    return removed


def delete(
    thread: ThreadKey,
    lease: Lease | None,
    on_deleted: Callable[[], None] | None = None,
    guard: Guard | None = None,
) -> Steps[bool]:
    """Delete a thread with all that it has, at once; say whether the guard let it be."""
    is_done = yield Change(partial(_delete, thread, lease, guard), thread)
    if on_deleted is not None:
        on_deleted()
    yield from clear_retired()
    return bool(is_done)


def check_leases(threads: Collection[ThreadKey], lease: Lease | None) -> Steps[None]:
    """Refuse before anything is deleted if one of the threads is held by a run."""
    for thread in threads:
        yield Change(partial(_check, thread, lease), thread)


def clear_retired() -> Steps[None]:
    """Delete the rows of threads that were deleted as a whole, by whomever."""
    while (yield Read(lambda rows: rows.find_retired())) is not None:
        yield Change(_clear)


def _check(thread: ThreadKey, lease: Lease | None, rows: Rows) -> Rejected | None:
    state = lock_to_write(rows, thread, lease)
    return state if isinstance(state, Rejected) else None


def _delete(
    thread: ThreadKey, lease: Lease | None, guard: Guard | None, rows: Rows
) -> Rejected | bool:
    state = lock_to_write(rows, thread, lease)
    if isinstance(state, Rejected):
        return state
    if guard is not None and not guard(rows, state):
        return False
    _discard(rows, state)
    return True


def _discard(rows: Rows, state: ThreadState) -> None:
    """Delete all of a locked thread: its rows, or its name if these are too many."""
    if rows.remove_some(state.number, limit=steps.BATCH_ROWS, max_bytes=steps.BATCH_BYTES):
        rows.apply([ThreadChange(state, replace(state, seq=state.seq + 1))])
    else:
        rows.retire(state)


def _clear(rows: Rows) -> None:
    number = rows.find_retired()
    if number is not None and rows.remove_some(
        number, limit=steps.BATCH_ROWS, max_bytes=steps.BATCH_BYTES
    ):
        rows.forget_retired(number)


def _survey(
    thread: ThreadKey, selection: Selection, after: str | None, rows: Rows
) -> list[_Progress]:
    """Find the next namespaces that have something to delete, and what is to stay of them."""
    found = rows.find_checkpoint((*thread, ""), None)
    if found is None:
        return []
    number, horizon = found.thread.number, found.thread.seq + 1
    places: list[_Progress] = []
    while not places and (names := rows.list_namespaces(number, after, _PAGE)):
        for ns in names:
            limit, checked = horizon, -1
            if selection.keep_last is not None:
                oldest = rows.find_newest(number, ns, selection.keep_last)
                if oldest is None:
                    continue
                limit, checked = oldest, oldest - 1
            if rows.list_links(number, ns, below=limit, run_ids=selection.run_ids, limit=1):
                places.append(
                    _Progress(number=number, ns=ns, limit=limit, checked=checked, below=limit)
                )
        after = names[-1]
    return places


@dataclass(frozen=True, slots=True)
class _Batch:
    """One transaction of `prune`."""

    encoder: Encoder
    thread: ThreadKey
    selection: Selection
    lease: Lease | None
    guard: Guard | None
    progress: _Progress
    prepared: tuple[int, Mapping[str, bytes | None]] | None = None
    """Bases of checkpoints by id, and the thread's number for which they hold."""

    def prepare(self, rows: Rows) -> tuple[int, Mapping[str, bytes | None]] | None:
        """Make the bases that `run` is going to need, if nothing changes until then."""
        found = rows.find_checkpoint((*self.thread, ""), None)
        if found is None or found.thread.number != self.progress.number:
            return None
        bases: dict[str, bytes | None] = {}
        for link, _ in self._to_detach(rows)[0]:
            there = rows.find_checkpoint((*self.thread, link.ns), link.checkpoint_id)
            if isinstance(there, FoundCheckpoint):
                base = _base(rows, self.encoder, self.thread, there.row)
                bases[link.checkpoint_id] = base
        return found.thread.seq, bases

    def run(self, rows: Rows) -> Rejected | _Progress | int:
        """Do a part; return how far it is now, or how many are gone if that was the last one."""
        progress, state = self.progress, lock(rows, self.thread)
        is_other = state.number != progress.number
        if is_other or (self.guard is not None and not self.guard(rows, state)):
            return progress.removed
        refused = fence(self.thread[1], self.lease, state)
        if refused is not None:
            return Rejected(refused)
        change = ThreadChange(state, replace(state, seq=state.seq + 1))
        checked, is_checked = self._detach(rows, change)
        if not is_checked:
            if change.repeated:
                rows.apply([change])
            return replace(progress, checked=checked)
        doomed = self._next(rows)
        if not doomed:
            if change.repeated:
                rows.apply([change])
            return progress.removed
        self._move_writes(rows, doomed, change)
        self._close_head(rows, doomed, change)
        change.anchors.append(_note(self.encoder, self.thread, change.after))
        rows.remove(progress.number, doomed, [AnchorRow(progress.number, "", "", 0, b"")])
        if rows.list_namespaces(progress.number, None, 1):
            rows.apply([change])
        else:
            _discard(rows, state)
        failpoint("checkpoint.pruned_batch")
        removed = progress.removed + len(doomed)
        return replace(progress, checked=checked, below=doomed[-1].seq, removed=removed)

    def _is_doomed(self, link: Link) -> bool:
        run_ids = self.selection.run_ids
        return link.seq < self.progress.limit and (run_ids is None or link.run_id in run_ids)

    def _detach(self, rows: Rows, change: ThreadChange) -> tuple[int, bool]:
        """Cut what is kept off from what goes; say up to which number, and whether that is all."""
        pairs, checked, is_all = self._to_detach(rows)
        for link, parent in pairs:
            self._detach_one(rows, link, parent, change)
        return checked, is_all

    def _to_detach(self, rows: Rows) -> tuple[list[tuple[Link, Link]], int, bool]:
        """Find the next checkpoints to cut off, each with its parent."""
        number, ns = self.progress.number, self.progress.ns
        links = rows.list_links(number, ns, after=self.progress.checked, limit=_PAGE)
        kept = [link for link in links if not self._is_doomed(link)]
        parents = {link.parent_id for link in kept if link.parent_id is not None}
        found = rows.find_links(number, ns, parents)
        going = {link.checkpoint_id: link for link in found if self._is_doomed(link)}
        pairs: list[tuple[Link, Link]] = []
        for link in kept:
            if link.parent_id not in going:
                continue
            if len(pairs) == _DETACHED:
                return pairs, link.seq - 1, False
            pairs.append((link, going[link.parent_id]))
        return pairs, (links[-1].seq if links else self.progress.checked), len(links) < _PAGE

    def _detach_one(self, rows: Rows, link: Link, parent: Link, change: ThreadChange) -> None:
        row, place = self._row(rows, link), self._place()
        data = self._inlined(rows, row, parent.checkpoint_id)
        if data is not None:
            change.writes.append(WritesRow(row.thread, row.ns, parent.checkpoint_id, row.seq, data))
        seq, bases = self.prepared or (-1, {})
        if seq == change.before.seq and row.checkpoint_id in bases:
            base = bases[row.checkpoint_id]
        else:
            base = _base(rows, self.encoder, self.thread, row)
        bare = row._replace(parent_writes=None, base=base)
        change.repeated.append(reseal(self.encoder.codec, place, row, bare))
        context = place.context_of_anchor(parent.checkpoint_id, parent.seq)
        sealed = self.encoder.codec.seal(parent.hash, context)
        change.anchors.append(
            AnchorRow(row.thread, row.ns, parent.checkpoint_id, parent.seq, sealed)
        )

    def _next(self, rows: Rows) -> list[Link]:
        """Choose what this batch deletes, the newest first."""
        progress, limit = self.progress, self.progress.limit
        if self.selection.keep_last is not None:
            # Somebody else may have deleted what was to stay.
            oldest = rows.find_newest(progress.number, progress.ns, self.selection.keep_last)
            limit = 0 if oldest is None else min(limit, oldest)
        links = rows.list_links(
            progress.number,
            progress.ns,
            below=min(progress.below, limit),
            run_ids=self.selection.run_ids,
            limit=steps.BATCH_ROWS,
        )
        size = 0
        for place, link in enumerate(links):
            size += link.size
            if place and size > steps.BATCH_BYTES:
                return links[:place]
        return links

    def _move_writes(self, rows: Rows, doomed: Sequence[Link], change: ThreadChange) -> None:
        """Put what they carry of checkpoints that stay, or go later, into the log."""
        number, ns = self.progress.number, self.progress.ns
        carried = {
            link.parent_id: link for link in doomed if link.carries and link.parent_id is not None
        }
        gone = {link.checkpoint_id for link in doomed}
        for parent in rows.find_links(number, ns, carried.keys() - gone):
            link = carried[parent.checkpoint_id]
            data = self._inlined(rows, self._row(rows, link), parent.checkpoint_id)
            if data is not None:
                change.writes.append(WritesRow(number, ns, parent.checkpoint_id, link.seq, data))

    def _close_head(self, rows: Rows, doomed: Sequence[Link], change: ThreadChange) -> None:
        """See that a head that becomes one again does not continue lists that went on after it."""
        number, ns = self.progress.number, self.progress.ns
        newest = rows.list_links(number, ns, limit=len(doomed) + 1)
        if newest[0].seq != doomed[0].seq:
            return
        gone = {link.seq for link in doomed}
        head = next((link for link in newest if link.seq not in gone), None)
        if head is None:
            return
        done = {row.seq: row for row in change.repeated}
        row, place = done.get(head.seq) or self._row(rows, head), self._place()
        record = unpack_record(self.encoder.codec, row, place)
        layout = {
            channel: held._replace(stored=closed(held.stored))
            for channel, held in record.layout.items()
        }
        codec, facts = self.encoder.codec, (record.head, layout, record.calls, record.parent_hash)
        data = pack_record(codec, place, row, *facts, like=row.data)
        done[head.seq] = row._replace(data=data)
        change.repeated[:] = done.values()

    def _inlined(self, rows: Rows, row: CheckpointRow, parent_id: str) -> bytes | None:
        """Return what a checkpoint carries of its parent, for the log."""
        if row.parent_writes is None:
            return None
        place = self._place()
        return inlined(
            rows,
            self.encoder.codec,
            row.thread,
            place,
            parent_id,
            row.parent_writes,
            place.context_of_carried(row.seq, row.checkpoint_id),
            place.context_of_writes(parent_id, row.seq),
        )

    def _row(self, rows: Rows, link: Link) -> CheckpointRow:
        found = rows.find_checkpoint((*self.thread, link.ns), link.checkpoint_id)
        assert isinstance(found, FoundCheckpoint), "the thread is locked"
        return found.row

    def _place(self) -> Place:
        return Place(*self.thread, self.progress.ns)


def _base(rows: Rows, encoder: Encoder, thread: ThreadKey, row: CheckpointRow) -> bytes | None:
    """Return what the delta channels of a checkpoint need of its ancestors."""
    place = Place(*thread, row.ns)
    channels = delta_channels(unpack_record(encoder.codec, row, place).metadata)
    if not channels:
        return None
    history = read_history(rows, encoder, (*thread, row.ns), row.checkpoint_id, channels)
    context = place.context_of_base(row.checkpoint_id)
    return encoder.codec.dumps(dict(history), context=context, where=place.of("the base"))


def _note(encoder: Encoder, thread: ThreadKey, state: ThreadState) -> AnchorRow:
    """Make the note that values may be left which nobody needs."""
    context = Place(*thread, "").context_of_anchor("", state.seq)
    return AnchorRow(state.number, "", "", state.seq, encoder.codec.seal(b"", context))
