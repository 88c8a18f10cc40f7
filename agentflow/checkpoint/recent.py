"""What an attempt has just read of its thread, for when it reads the same again.

An attempt looks at its thread before it begins, at the questions that stand there, and LangGraph
does once more. Nothing can have changed in between: the lease keeps others from writing, and what
is written under it is known here. Rows are kept and not what becomes of them: whoever reads them
gets objects of his own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, Self

from agentflow.checkpoint.layout import Part
from agentflow.checkpoint.rows import (
    FoundCheckpoint,
    FoundThread,
    HeadKey,
    Logged,
    ThreadState,
    ValueRow,
)

_MAX_BYTES = 1024 * 1024
"""More than this is not worth being held for as long as an attempt takes."""

Found = FoundCheckpoint | FoundThread | None
Values = dict[tuple[int, int], list[ValueRow]]
Writes = Mapping[tuple[int, str, str], list[Logged]]
Stretches = dict[tuple[int, int, int], ValueRow]


class CheckpointRows(Protocol):
    """The part of `Rows` that reading a checkpoint takes."""

    def find_checkpoint(self, key: HeadKey, checkpoint_id: str | None) -> Found:
        """See `Rows`."""

    def list_values(self, wanted: Iterable[tuple[int, Part]]) -> Values:
        """See `Rows`."""

    def list_writes(self, rows: Sequence[FoundCheckpoint]) -> Writes:
        """See `Rows`."""

    def list_stretches(self, wanted: Collection[tuple[int, int, int]]) -> Stretches:
        """See `Rows`."""


class NotNotedError(Exception):
    """Something is asked that was not noted."""


class RecentRead:
    """Notes what rows answer while one checkpoint is read, and can answer the same again."""

    def __init__(self, rows: CheckpointRows | None = None) -> None:
        """Ask `rows`, or nobody."""
        self._rows = rows
        self._key: HeadKey | None = None
        self._found: Found = None
        self._values: Values | None = None
        self._writes: Writes = {}
        self._stretches: Stretches | None = None

    @classmethod
    def of_head(cls, key: HeadKey, head: FoundCheckpoint, writes: Writes) -> Self | None:
        """Note the head of a namespace, which was found, and its writes; no values of other rows.

        `None` if it is too large to be kept.
        """
        read = cls()
        read._key, read._found, read._writes = key, head, writes
        return read if read.end() else None

    @property
    def checkpoint_id(self) -> str | None:
        """The id of the checkpoint that was noted."""
        found = self._found
        return found.row.checkpoint_id if isinstance(found, FoundCheckpoint) else None

    def find_checkpoint(self, key: HeadKey, checkpoint_id: str | None) -> Found:
        """See `Rows`."""
        if self._rows is not None:
            self._key, self._found = key, self._rows.find_checkpoint(key, checkpoint_id)
        return self._found

    def list_values(self, wanted: Iterable[tuple[int, Part]]) -> Values:
        """See `Rows`."""
        if self._rows is not None:
            self._values = self._rows.list_values(wanted)
        if self._values is None:
            raise NotNotedError
        return self._values

    def list_writes(self, rows: Sequence[FoundCheckpoint]) -> Writes:
        """See `Rows`."""
        if self._rows is not None:
            self._writes = self._rows.list_writes(rows)
        return self._writes

    def list_stretches(self, wanted: Collection[tuple[int, int, int]]) -> Stretches:
        """See `Rows`."""
        if self._rows is not None:
            self._stretches = self._rows.list_stretches(wanted)
        if self._stretches is None:
            raise NotNotedError
        return self._stretches

    def end(self) -> bool:
        """Ask nobody any more; say whether it is worth keeping."""
        self._rows = None
        if not isinstance(self._found, FoundCheckpoint):
            return False
        row = self._found.row
        stretches = [each for rows in (self._values or {}).values() for each in rows]
        logged = [each for rows in self._writes.values() for each in rows]
        size = len(row.data) + len(row.parent_writes or b"") + len(row.base or b"")
        size += sum(len(each.data) for each in (*stretches, *(self._stretches or {}).values()))
        return size + sum(len(each.data) for each in logged) <= _MAX_BYTES

    def is_of(self, key: HeadKey, checkpoint_id: str | None, state: ThreadState) -> bool:
        """Whether this is what reading a checkpoint of a thread in this state would find."""
        found = self._found
        if self._key != key or not isinstance(found, FoundCheckpoint):
            return False
        is_asked = checkpoint_id in {None, found.row.checkpoint_id}
        is_head = found.row.seq == found.head_seq
        return is_asked and is_head and found.thread.version == state.version
