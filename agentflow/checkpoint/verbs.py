"""Changes of a thread as a whole, each in one transaction and under the thread's lock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from agentflow.checkpoint.deltas import delta_channels, read_history
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.pending import inlined
from agentflow.checkpoint.planning import fence
from agentflow.checkpoint.records import Place, Record, references, unpack_record, unpack_writes
from agentflow.checkpoint.rows import (
    WHOLE,
    AnyRow,
    CheckpointRow,
    Layout,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.codec import unseal
from agentflow.database.writer import Rejected
from agentflow.delta import cut_block
from agentflow.errors import ConflictError
from agentflow.types import Lease

PruneStrategy = Literal["keep_latest", "delete"]
_ALL = 1 << 62
"""Reaches beyond the end of any series."""


def lock(rows: Rows, thread: ThreadKey) -> ThreadState:
    """Lock a thread and return its state, without heads."""
    return rows.load_states({thread: ()}, lock=True)[thread][0]


def acquire_thread(rows: Rows, thread: ThreadKey, lease: Lease) -> int:
    """Take a thread for a lease: from now on only its token may write.

    Returns:
        The thread's token: the lease's own if it was taken, a higher one if not.
    """
    state = lock(rows, thread)
    if lease.token >= state.token:
        rows.set_lease(state, token=lease.token, is_leased=True)
    return max(lease.token, state.token)


def release_thread(rows: Rows, thread: ThreadKey, lease: Lease) -> None:
    """Give a thread back, if it is still held under the lease's token."""
    state = lock(rows, thread)
    if state.token == lease.token:
        rows.set_lease(state, token=state.token, is_leased=False)


def delete_thread(rows: Rows, thread: ThreadKey, lease: Lease | None) -> Rejected | None:
    """Delete a thread's checkpoints and writes; its fencing token stays."""
    state = lock(rows, thread)
    refused = fence(thread[1], lease, state)
    if refused is not None:
        return Rejected(refused)
    rows.delete(state)
    return None


def delete_runs(
    rows: Rows, encoder: Encoder, tenant: str, run_ids: Collection[str], lease: Lease | None
) -> Rejected | None:
    """Delete the checkpoints of some runs, with their writes, in all threads."""
    states = _lock_all(rows, rows.list_threads_of_runs(tenant, run_ids))
    for thread, state in states.items():
        refused = fence(thread[1], lease, state)
        if refused is not None:
            return Rejected(refused)
    for thread, state in states.items():
        _keep(rows, encoder, thread, state, lambda row: row.run_id not in run_ids)
    return None


def prune_threads(
    rows: Rows,
    encoder: Encoder,
    threads: Collection[ThreadKey],
    strategy: PruneStrategy,
    lease: Lease | None,
) -> Rejected | None:
    """Delete the checkpoints of some threads, or all but the newest of each namespace."""
    known = [thread for thread in threads if rows.find_checkpoint((*thread, ""), None) is not None]
    states = _lock_all(rows, known)
    for thread, state in states.items():
        refused = fence(thread[1], lease, state)
        if refused is not None:
            return Rejected(refused)
    for thread, state in states.items():
        if strategy == "delete":
            rows.delete(state)
            continue
        newest = {row.ns: row.seq for row in _scan(rows, state, CheckpointRow)}
        heads = set(newest.items())
        _keep(rows, encoder, thread, state, lambda row: (row.ns, row.seq) in heads)  # noqa: B023 -- called at once
    return None


def copy_thread(
    rows: Rows, source: ThreadKey, target: ThreadKey, lease: Lease | None, *, is_again: bool
) -> Rejected | None:
    """Copy all checkpoints of a thread, with their ids and writes, to a thread that has none.

    Args:
        rows: Where they are.
        source: The thread to copy.
        target: The thread to make.
        lease: Under which it is written.
        is_again: Whether this call was sent before, and may have been committed.
    """
    if rows.find_checkpoint((*source, ""), None) is None:
        return None
    states = _lock_all(rows, [source, target])
    state = states[target]
    refused = fence(target[1], lease, state)
    if refused is not None:
        return Rejected(refused)
    if there := rows.scan(state, CheckpointRow, None):
        expected = rows.scan(states[source], CheckpointRow, None)
        if is_again and [row[1:] for row in there] == [row[1:] for row in expected]:
            return None
        return Rejected(ConflictError(f"thread {target[1]!r} has checkpoints; delete it first"))
    original, number = states[source], state.number
    after = replace(state, seq=max(state.seq + 1, original.seq))
    rows.apply([ThreadChange(state, after)])
    # From here on each page is a change of its own, of the thread as it already is.
    for values in _pages(rows, original, ValueRow):
        copied = [value._replace(thread=number) for value in values]
        rows.apply([ThreadChange(after, after, values=copied)])
    for checkpoints in _pages(rows, original, CheckpointRow):
        moved = [checkpoint._replace(thread=number) for checkpoint in checkpoints]
        rows.apply([ThreadChange(after, after, checkpoints=moved)])
    for writes in _pages(rows, original, WritesRow):
        logged = [entry._replace(thread=number) for entry in writes]
        rows.apply([ThreadChange(after, after, writes=logged)])
    return None


def _lock_all(rows: Rows, threads: Collection[ThreadKey]) -> dict[ThreadKey, ThreadState]:
    if not threads:
        return {}
    found = rows.load_states(dict.fromkeys(threads, ()), lock=True)
    return {thread: state for thread, (state, _) in found.items()}


def _pages(rows: Rows, state: ThreadState, kind: type[AnyRow]) -> Iterator[list[AnyRow]]:
    page = rows.scan(state, kind, None)
    while page:
        yield page
        page = rows.scan(state, kind, page[-1])


def _scan(rows: Rows, state: ThreadState, kind: type[AnyRow]) -> Iterator[AnyRow]:
    for page in _pages(rows, state, kind):
        yield from page


def _keep(
    rows: Rows,
    encoder: Encoder,
    thread: ThreadKey,
    state: ThreadState,
    is_kept: Callable[[CheckpointRow], bool],
) -> None:
    """Delete the other checkpoints of a thread, and what only they needed."""
    kept: dict[tuple[str, str], CheckpointRow] = {}
    doomed: dict[tuple[str, str], CheckpointRow] = {}
    for row in _scan(rows, state, CheckpointRow):
        (kept if is_kept(row) else doomed)[row.ns, row.checkpoint_id] = row
    if not doomed:
        return
    change = ThreadChange(state, replace(state, seq=state.seq + 1))
    for row in kept.values():
        if row.parent_id is not None and (row.ns, row.parent_id) in doomed:
            base = _base(rows, encoder, thread, row)
            change.repeated.append(row._replace(parent_writes=None, base=base))
    for row in doomed.values():
        # What a deleted checkpoint carries of one that stays goes into the log.
        parent = (row.ns, row.parent_id or "")
        if row.parent_writes is not None and parent in kept:
            data = inlined(
                rows, encoder.codec, state.number, row.parent_writes, _place(thread, row)
            )
            change.writes.append(WritesRow(state.number, row.ns, parent[1], row.seq, data))
    rows.apply([change])
    kept |= {(row.ns, row.checkpoint_id): row for row in change.repeated}
    needed = _needed(encoder, thread, kept)
    cut = ThreadChange(
        change.after, change.after, replaced=_cut(rows, encoder, change.after, needed)
    )
    rows.apply([cut])
    rows.remove(change.after, list(doomed.values()), needed)


def _cut(
    rows: Rows, encoder: Encoder, state: ThreadState, needed: Mapping[int, int]
) -> list[ValueRow]:
    """Cut the elements that nobody needs off the stretches in which the others stand."""
    if not needed:
        return []
    last = rows.list_stretches(
        {(state.number, series, reach - 1) for series, reach in needed.items()}
    )
    shorter = []
    for row in last.values():
        block = cut_block(unseal(row.data, where="a list"), needed[row.series] - row.start)
        if block is not None:
            shorter.append(row._replace(data=encoder.codec.seal(block)))
    return shorter


def _needed(
    encoder: Encoder,
    thread: ThreadKey,
    kept: Mapping[tuple[str, str], CheckpointRow],
) -> dict[int, int]:
    """Say how far each series of values is needed by what is kept."""
    needed: dict[int, int] = {}

    def need(series: int, reach: int) -> None:
        needed[series] = max(reach, needed.get(series, 0))

    for row in kept.values():
        for series, reach in _reach(_open(encoder, thread, row).layout):
            need(series, reach)
        if row.parent_writes is not None:
            own = unpack_writes(encoder.codec, row.parent_writes, _place(thread, row))
            for series, start, length in references(own):
                need(series, _ALL if length == WHOLE else start + length)
    return needed


def _place(thread: ThreadKey, row: CheckpointRow) -> Place:
    return Place(thread[1], row.ns)


def _open(encoder: Encoder, thread: ThreadKey, row: CheckpointRow) -> Record:
    return unpack_record(encoder.codec, row, _place(thread, row))


def _reach(layout: Layout) -> Iterator[tuple[int, int]]:
    for _, stored in layout.values():
        if stored is not None and not isinstance(stored, bytes):
            for part in stored:
                yield part.series, _ALL if part.length == WHOLE else part.length


def _base(rows: Rows, encoder: Encoder, thread: ThreadKey, row: CheckpointRow) -> bytes | None:
    """Return what the delta channels of a checkpoint need of its ancestors."""
    channels = delta_channels(_open(encoder, thread, row).metadata)
    if not channels:
        return None
    history = read_history(rows, encoder, (*thread, row.ns), row.checkpoint_id, channels)
    return encoder.codec.dumps(dict(history), where=_place(thread, row).of("the base"))
