"""Taking an answer back out of a thread, so that its question stands there as it did before.

The task that asked gets back to where it waited: what it wrote, raised and asked since is gone. So
do the tasks around it, if it stands in a subgraph. No other task of the superstep is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from langgraph.checkpoint.serde.types import INTERRUPT, RESUME

from agentflow.checkpoint.fencing import lock_to_write
from agentflow.checkpoint.records import (
    Call,
    Place,
    Written,
    pack_record,
    pack_writes,
    unpack_record,
    unpack_writes,
)
from agentflow.checkpoint.rows import (
    CheckpointRow,
    FoundCheckpoint,
    Rows,
    ThreadChange,
    ThreadKey,
    WritesRow,
)
from agentflow.codec import Codec
from agentflow.database.writer import Rejected
from agentflow.errors import ConflictError
from agentflow.types import Lease

_Item = tuple[int, str, Written]
_NULL_TASK = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """Which answer is taken back."""

    ns: str
    checkpoint_id: str
    task_id: str
    interrupt_id: str
    answers: int
    """How many answers the task had before this one."""


def retract(
    rows: Rows, codec: Codec, thread: ThreadKey, lease: Lease | None, wanted: Retraction
) -> Rejected | None:
    """Make a question open again, in one change of the thread; again it changes nothing."""
    before = lock_to_write(rows, thread, lease)
    if isinstance(before, Rejected):
        return before
    found = rows.find_checkpoint((*thread, wanted.ns), None)
    if not isinstance(found, FoundCheckpoint) or found.row.checkpoint_id != wanted.checkpoint_id:
        return Rejected(
            ConflictError(
                f"thread {thread[1]!r} has moved on since that question was answered; fork the run "
                "from a checkpoint before it"
            )
        )
    after = replace(before, seq=before.seq + 1)
    # An entry without writes: every number of a thread stands for something that is there.
    key = (wanted.checkpoint_id, after.seq)
    empty = pack_writes(codec, [], Place(*thread, wanted.ns).context_of_writes(*key))
    note = WritesRow(before.number, wanted.ns, *key, empty)
    rows.apply([ThreadChange(before, after, writes=[note])])
    for ns, task_id in [(wanted.ns, wanted.task_id), *_around(wanted.ns)]:
        head = rows.find_checkpoint((*thread, ns), None)
        if isinstance(head, FoundCheckpoint):
            is_asking = ns == wanted.ns
            _Rewriter(codec, Place(*thread, ns), task_id, wanted, is_asking=is_asking).run(
                rows, head
            )
    return None


def _around(ns: str) -> Iterator[tuple[str, str]]:
    """Yield the tasks inside of which a namespace is, from the inside out."""
    while ns:
        outer, _, segment = ns.rpartition("|")
        # A subgraph that keeps its state across calls has no task in its name; what its caller has
        # of it is an interrupt at most, and is judged by that.
        yield outer, segment.partition(":")[2]
        ns = outer


class _Rewriter:
    """Leaves out of the writes of one checkpoint what a task has done since it asked."""

    def __init__(
        self, codec: Codec, place: Place, task_id: str, wanted: Retraction, *, is_asking: bool
    ) -> None:
        self._codec = codec
        # To look at: what a question shows may be of classes that are not known here.
        self._lenient = codec.readable_anywhere()
        self._place = place
        self._task_id = task_id
        self._wanted = wanted
        self._is_asking = is_asking

    def run(self, rows: Rows, found: FoundCheckpoint) -> None:
        codec, place, row = self._codec, self._place, found.row
        record = unpack_record(codec, row, place)
        if (calls := self._without(record.calls)) != record.calls:
            data = pack_record(
                codec,
                place,
                row,
                record.head,
                record.layout,
                calls,
                record.parent_hash,
                like=row.data,
            )
            made: list[CheckpointRow] = [row._replace(data=data)]
            rows.rewrite(made)
        key = (row.thread, row.ns, row.checkpoint_id)
        changed = []
        where = place.of(f"writes of checkpoint {row.checkpoint_id!r}")
        for seq, carrier, data in rows.list_writes([found]).get(key, ()):
            assert not carrier, "a head has no successor"
            context = place.context_of_writes(row.checkpoint_id, seq)
            logged = unpack_writes(codec, data, where, context)
            if (calls := self._without(logged)) != logged:
                changed.append(WritesRow(*key, seq, pack_writes(codec, calls, context)))
        rows.rewrite(changed)

    def _without(self, calls: list[Call]) -> list[Call]:
        left: list[Call] = []
        for call in calls:
            task_id, path, items = call
            if task_id == _NULL_TASK and self._is_asking:
                kept = [item for item in items if item[1] != RESUME]
            elif task_id == self._task_id or (not self._task_id and self._names_it(items)):
                kept = [stays for item in items if (stays := self._kept(item)) is not None]
            else:
                kept = items
            if kept == items:
                left.append(call)
            elif kept:
                left.append((task_id, path, kept))
        return left

    def _kept(self, item: _Item) -> _Item | None:
        """Return what stays of a write of the task."""
        index, channel, written = item
        if channel == INTERRUPT:
            return item if self._asks_it(written) else None
        if channel != RESUME:
            return None
        if not self._is_asking:
            return item  # answers to questions of its own
        answers = self._value(written)
        before = list(answers if isinstance(answers, (list, tuple)) else [answers])
        if len(before) <= self._wanted.answers:
            return item
        del before[self._wanted.answers :]
        return (index, channel, self._codec.serialize(before)) if before else None

    def _names_it(self, items: list[_Item]) -> bool:
        return any(channel == INTERRUPT and self._asks_it(value) for _, channel, value in items)

    def _asks_it(self, written: Written) -> bool:
        asked = self._value(written)
        every = asked if isinstance(asked, (list, tuple)) else [asked]
        return any(getattr(each, "id", None) == self._wanted.interrupt_id for each in every)

    def _value(self, written: Written) -> Any:
        # Answers and questions are never shared with the values of channels.
        assert isinstance(written, bytes)
        return self._lenient.deserialize(written, where=self._place.of("writes"))
