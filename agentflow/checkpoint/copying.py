"""Copying a thread, and sealing its rows for another one or by another key.

In one transaction, under the locks of the threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agentflow.checkpoint.fencing import fence
from agentflow.checkpoint.offload import note, reseal_value
from agentflow.checkpoint.records import (
    Place,
    hash_of,
    pack_record,
    unpack_record,
)
from agentflow.checkpoint.rows import (
    AnchorRow,
    AnyRow,
    CheckpointRow,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.codec import Codec, is_apart
from agentflow.database.writer import Rejected
from agentflow.errors import ConflictError
from agentflow.types import Lease


def copy_thread(
    rows: Rows,
    codec: Codec,
    source: ThreadKey,
    target: ThreadKey,
    lease: Lease | None,
    *,
    is_again: bool,
) -> Rejected | None:
    """Copy all checkpoints of a thread, with their ids and writes, to a thread that has none.

    What is stored is bound to its thread, so that all of it is sealed anew, and hashed anew.

    Args:
        rows: Where they are.
        codec: How they are stored.
        source: The thread to copy.
        target: The thread to make.
        lease: Under which it is written.
        is_again: Whether this call was sent before, and may have been committed.
    """
    if rows.find_checkpoint((*source, ""), None) is None:
        return None
    states = _lock_all(rows, source, target)
    state = states[target]
    refused = fence(target[1], lease, state)
    if refused is not None:
        return Rejected(refused)
    if there := rows.scan(state, CheckpointRow, None):
        expected = rows.scan(states[source], CheckpointRow, None)
        if is_again and [row[1:8] for row in there] == [row[1:8] for row in expected]:
            return None
        return Rejected(ConflictError(f"thread {target[1]!r} has checkpoints; delete it first"))
    original, number = states[source], state.number
    after = replace(state, seq=max(state.seq + 1, original.seq))
    rows.apply([ThreadChange(state, after)])
    # From here on each page is a change of its own, of the thread as it already is.
    copier = Copier(codec, source, target, number)
    for values in pages(rows, original, ValueRow):
        change = ThreadChange(after, after)
        change.values = [copier.value(rows, row, change) for row in values]
        rows.apply([change])
    for anchors in pages(rows, original, AnchorRow):
        rows.apply([ThreadChange(after, after, anchors=list(map(copier.anchor, anchors)))])
    for checkpoints in pages(rows, original, CheckpointRow):
        rows.apply(
            [ThreadChange(after, after, checkpoints=list(map(copier.checkpoint, checkpoints)))]
        )
    for writes in pages(rows, original, WritesRow):
        rows.apply([ThreadChange(after, after, writes=list(map(copier.writes, writes)))])
    return None


class Copier:
    """Seals the rows of a thread for another one; checkpoints come in the order of their numbers.

    Source and target may be the same: the rows are then sealed by the current key.
    """

    def __init__(self, codec: Codec, source: ThreadKey, target: ThreadKey, number: int) -> None:
        """Make rows of `target`, which has this number."""
        self._codec = codec
        self._source, self._target = source, target
        self._number = number
        self._hashes: dict[tuple[str, str], bytes] = {}

    def value(self, rows: Rows, row: ValueRow, change: ThreadChange) -> ValueRow:
        """Return a stretch of a value, and note in a change in which object it is."""
        before, after = self._places("")
        sealed = reseal_value(self._codec, rows, before, after, row, before.of("a value"))
        made = row._replace(thread=self._number, data=sealed.data)
        note(change, sealed, made, self._codec.tier)
        if is_apart(row.data) and not sealed.object:
            change.released.append((row.series, row.start))
        return made

    def anchor(self, row: AnchorRow) -> AnchorRow:
        """Return an anchor; what it names was never part of the target, and keeps its hash."""
        before, after = self._places(row.ns)
        context = (row.checkpoint_id, row.seq)
        old = before.context_of_anchor(*context)
        self._hashes[row.ns, row.checkpoint_id] = self._codec.unseal(
            row.data, old, where=before.of("an anchor")
        )
        data = self._again(row.data, old, after.context_of_anchor(*context), "an anchor")
        return row._replace(thread=self._number, data=data)

    def writes(self, row: WritesRow) -> WritesRow:
        """Return writes of the log."""
        before, after = self._places(row.ns)
        context = (row.checkpoint_id, row.seq)
        data = self._again(
            row.data,
            before.context_of_writes(*context),
            after.context_of_writes(*context),
            "writes",
        )
        return row._replace(thread=self._number, data=data)

    def checkpoint(self, row: CheckpointRow) -> CheckpointRow:
        """Return a checkpoint, which follows the target's checkpoint before it."""
        before, after = self._places(row.ns)
        record = unpack_record(self._codec, row, before)
        parent_hash = record.parent_hash
        if row.parent_id is not None and parent_hash is not None:
            parent_hash = self._hashes.get((row.ns, row.parent_id), parent_hash)
        carried, base = row.parent_writes, row.base
        if carried is not None:
            place = (row.seq, row.checkpoint_id)
            old, new = before.context_of_carried(*place), after.context_of_carried(*place)
            carried = self._again(carried, old, new, "writes")
        if base is not None:
            old = before.context_of_base(row.checkpoint_id)
            base = self._again(base, old, after.context_of_base(row.checkpoint_id), "the base")
        covered = hash_of(self._codec, after, row, record.head, record.layout, parent_hash)
        made = row._replace(
            thread=self._number, hash=self._codec.hash(covered), parent_writes=carried, base=base
        )
        self._hashes[row.ns, row.checkpoint_id] = made.hash
        data = pack_record(
            self._codec, after, made, record.head, record.layout, record.calls, parent_hash
        )
        return made._replace(data=data)

    def _places(self, ns: str) -> tuple[Place, Place]:
        return Place(*self._source, ns), Place(*self._target, ns)

    def _again(self, data: bytes, before: bytes, after: bytes, what: str) -> bytes:
        where = Place(*self._source, "").of(what)
        return self._codec.seal(self._codec.unseal(data, before, where=where), after)


def pages(rows: Rows, state: ThreadState, kind: type[AnyRow]) -> Iterator[list[AnyRow]]:
    """Yield the rows of one kind that a thread has, a page at a time."""
    page = rows.scan(state, kind, None)
    while page:
        yield page
        page = rows.scan(state, kind, page[-1])


def _lock_all(rows: Rows, *threads: ThreadKey) -> dict[ThreadKey, ThreadState]:
    found = rows.load_states(dict.fromkeys(threads, ()), lock=True)
    return {thread: state for thread, (state, _) in found.items()}
