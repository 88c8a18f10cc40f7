"""The writes of tasks that are bound to a checkpoint, as LangGraph wants to have them.

They are kept in three places: with their checkpoint, with the one that superseded it, and in a log.
What a task wrote and a list then took in is kept once, among the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langgraph.checkpoint.base import writes_sort_key

from agentflow.checkpoint.layout import WHOLE
from agentflow.checkpoint.offload import open_value
from agentflow.checkpoint.recent import CheckpointRows
from agentflow.checkpoint.records import (
    Call,
    Place,
    Record,
    Written,
    pack_writes,
    references,
    unpack_writes,
)
from agentflow.checkpoint.rows import FoundCheckpoint, Logged, Rows, ValueRow
from agentflow.codec import Codec, is_apart
from agentflow.delta import slice_block
from agentflow.errors import MissingBlobError

Write = tuple[str, str, Any]
"""Task id, channel and value."""


def load_writes(
    rows: CheckpointRows, codec: Codec, found: Sequence[tuple[FoundCheckpoint, Record]]
) -> list[list[Write]]:
    """Read the writes of each of these checkpoints, ordered by task path, task id and index.

    Of what a task wrote more than once at one index, the first ordinary write stands, and the last
    special one (error, interrupt, resume: negative index).
    """
    logged = rows.list_writes([each for each, _ in found])
    opened = [_open(codec, each, record, logged) for each, record in found]
    shared = {
        (each.row.thread, series, start)
        for (each, _), calls in zip(found, opened, strict=True)
        for series, start, _ in references(calls)
    }
    stretches = rows.list_stretches(shared) if shared else {}
    return [
        _decode(codec, each, calls, stretches)
        for (each, _), calls in zip(found, opened, strict=True)
    ]


def _open(
    codec: Codec,
    found: FoundCheckpoint,
    record: Record,
    logged: Mapping[tuple[int, str, str], Sequence[Logged]],
) -> list[Call]:
    """Return the calls in the order in which they became durable."""
    row = found.row
    place = Place(found.tenant, found.thread_id, row.ns)
    calls = list(record.calls)
    where = place.of(f"writes of checkpoint {row.checkpoint_id!r}")
    for seq, carrier, data in sorted(logged.get((row.thread, row.ns, row.checkpoint_id), ())):
        context = (
            place.context_of_carried(seq, carrier)
            if carrier
            else place.context_of_writes(row.checkpoint_id, seq)
        )
        calls += unpack_writes(codec, data, where, context)
    return calls


def _decode(
    codec: Codec,
    found: FoundCheckpoint,
    calls: Sequence[Call],
    stretches: Mapping[tuple[int, int, int], ValueRow],
) -> list[Write]:
    kept: dict[tuple[str, int], tuple[str, str, Any]] = {}
    for task_id, task_path, items in calls:
        for index, channel, written in items:
            if index < 0 or (task_id, index) not in kept:
                kept[task_id, index] = (task_path, channel, written)
    place = Place(found.tenant, found.thread_id, found.row.ns)
    # Sorted here, since databases collate text differently and the order decides what reducers do.
    order = sorted(kept, key=lambda key: writes_sort_key(kept[key][0], *key))
    writes: list[Write] = []
    row_id = found.row.checkpoint_id
    for key in order:
        _, channel, written = kept[key]
        where = place.of(f"a write to channel {channel!r} of checkpoint {row_id!r}")
        if isinstance(written, bytes):
            value = codec.deserialize(written, where=where)
        else:
            row = stretches.get((found.row.thread, *written[:2]))
            value = _shared(codec, place, row, written, where)
        writes.append((key[0], channel, value))
    return writes


def _shared(
    codec: Codec, place: Place, row: ValueRow | None, written: list[int], where: str
) -> Any:
    """Take what was written out of the value that has it."""
    _, start, length = written
    if row is not None:
        value = codec.deserialize(open_value(codec, place, row, where), where=where)
        if length == WHOLE:
            return value
        elements = value[start - row.start :][:length]
        if len(elements) == length:
            return elements
    raise MissingBlobError(where)


def inlined(
    rows: Rows,
    codec: Codec,
    thread: int,
    place: Place,
    checkpoint_id: str,
    sealed: bytes,
    before: bytes,
    after: bytes,
) -> bytes:
    """Return writes with what they share with values in them, for a row of their own.

    What is shared is there as long as the checkpoint that carries the writes, and no longer; but
    what is in an object stays there.

    Args:
        rows: Where the values are.
        codec: How they are stored.
        thread: The thread's number.
        place: Where the writes belong.
        checkpoint_id: The checkpoint to which they are bound.
        sealed: The writes.
        before: Their context so far.
        after: Their context from now on.
    """
    where = place.of(f"writes of checkpoint {checkpoint_id!r}")
    calls = unpack_writes(codec, sealed, where, before)
    shared = {(thread, series, start) for series, start, _ in references(calls)}
    stretches = rows.list_stretches(shared) if shared else {}

    def own(written: Written) -> Written:
        if isinstance(written, bytes):
            return written
        series, start, length = written
        row = stretches.get((thread, series, start))
        if row is None:
            raise MissingBlobError(where)
        if is_apart(row.data):
            # As large as it is, it stays what it is: pruning knows that the log refers to such.
            return written
        block = open_value(codec, place, row, where)
        return block if length == WHOLE else slice_block(block, start - row.start, length)

    return pack_writes(
        codec,
        [
            (task_id, path, [(index, channel, own(written)) for index, channel, written in items])
            for task_id, path, items in calls
        ],
        after,
    )
