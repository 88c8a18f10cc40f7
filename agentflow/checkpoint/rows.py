"""The rows port: what a backend has to do to keep checkpoints.

LangGraph's rules stand above it, in `rules`; a backend only keeps rows and applies changes to
threads, each as a whole and only if the thread is still what the change was made from. There are
four kinds of rows:

- a *thread*: its fencing token, whether a lease holds it, and its sequence number, which every
  change of the thread raises. Equal token, lease and number mean that nothing has changed;
- a *checkpoint*: one row for each, which also carries the writes that it supersedes;
- a *value*: something too large to stand in the row of each checkpoint that has it. Values belong
  to a series: a list that grows is one series of stretches, anything else a series of one;
- *writes*: what tasks have written for a checkpoint that has no successor yet, as a log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

ThreadKey = tuple[str, str]
"""Tenant and thread id."""

HeadKey = tuple[str, str, str]
"""Tenant, thread id and checkpoint namespace."""

WHOLE = -1
"""The length of a part that is a value of its own and not a stretch of a list."""


class Part(NamedTuple):
    """A stretch of a stored value: the first `length` elements of a series, or all of it."""

    series: int
    length: int
    is_open: bool
    """Whether the list's next elements may be put behind it in the same series."""


Stored = bytes | tuple[Part, ...]
"""A value as its checkpoint's row has it: its serialized bytes, or where they are kept."""


class Held(NamedTuple):
    """The state of one channel in one checkpoint."""

    version: str | int | float
    stored: Stored | None
    """`None` if the channel has no value at that version."""


Layout = Mapping[str, Held]
"""Channel to its state, for all channels of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest checkpoint of a namespace."""

    checkpoint_id: str
    seq: int
    attempt: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class ThreadState:
    """What has to be known of a thread to decide who may write it, and what."""

    number: int
    """The thread's key within the database."""
    token: int
    is_leased: bool
    seq: int
    heads: Mapping[str, Head | None] = field(default_factory=dict)
    """By namespace, those that are known; `None` for one known to have no checkpoint."""

    @property
    def version(self) -> tuple[int, bool, int]:
        """What every change of the thread changes."""
        return (self.token, self.is_leased, self.seq)


class CheckpointRow(NamedTuple):
    """One checkpoint."""

    thread: int
    ns: str
    seq: int
    checkpoint_id: str
    parent_id: str | None
    attempt: str
    """Who put it: the lease's token, or an id of the saver."""
    run_id: str | None
    step: int | None
    data: bytes
    parent_writes: bytes | None = None
    """Writes bound to its parent that became durable together with it."""
    base: bytes | None = None
    """What its delta channels had at its parent, if that was deleted."""


class ValueRow(NamedTuple):
    """One stretch of a value."""

    thread: int
    series: int
    start: int
    data: bytes


class WritesRow(NamedTuple):
    """Writes of tasks, bound to a checkpoint."""

    thread: int
    ns: str
    checkpoint_id: str
    seq: int
    data: bytes


AnyRow = TypeVar("AnyRow", CheckpointRow, ValueRow, WritesRow)


@dataclass(slots=True)
class ThreadChange:
    """What becomes of one thread, from a known state; applied as a whole or not at all."""

    before: ThreadState
    after: ThreadState
    checkpoints: list[CheckpointRow] = field(default_factory=list)
    """New ones. An id that is there already is an error of the backend's."""
    repeated: list[CheckpointRow] = field(default_factory=list)
    """In place of the ones of the same ids."""
    values: list[ValueRow] = field(default_factory=list)
    replaced: list[ValueRow] = field(default_factory=list)
    """New contents of stretches that are there."""
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """Stretches to delete, by series and start."""
    writes: list[WritesRow] = field(default_factory=list)


class FoundCheckpoint(NamedTuple):
    """A checkpoint's row and what a reader needs to know of its thread."""

    tenant: str
    thread_id: str
    thread: ThreadState
    """Without heads."""
    row: CheckpointRow
    head_seq: int
    """The number of its namespace's head."""


class FoundThread(NamedTuple):
    """A thread that has no such checkpoint, for who would put the first one."""

    thread: ThreadState


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which checkpoints to list; `None` does not narrow."""

    tenant: str
    thread_id: str | None = None
    ns: str | None = None
    checkpoint_id: str | None = None
    run_id: str | None = None
    before: int | str | None = None
    """Only what has a lower number, or an id that is less, than this."""
    after: tuple[str, str, str] | int | None = None
    """Where the page before ended: a number within a thread; id, thread and namespace over all."""
    limit: int = 50


class Rows(ABC):
    """One connection to the rows; made anew for each batch or read."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Open a transaction, unless one is open: what is read with a lock stays as it is in it."""

    @abstractmethod
    def load_states(
        self, wanted: Mapping[ThreadKey, Collection[str]], *, lock: bool = False
    ) -> dict[ThreadKey, tuple[ThreadState, list[CheckpointRow]]]:
        """Read threads with the heads of some of their namespaces, making threads that are new.

        Args:
            wanted: Namespaces by thread.
            lock: Keep the threads as they are until the transaction ends.

        Returns:
            For each thread its state, still without heads, and the rows of the heads that exist.
        """

    @abstractmethod
    def apply(self, changes: Sequence[ThreadChange]) -> set[int]:
        """Apply each change whose thread is still as it was before, all in one durable commit.

        Returns:
            The numbers of the threads that were changed.
        """

    @abstractmethod
    def find_checkpoint(
        self, key: HeadKey, checkpoint_id: str | None
    ) -> FoundCheckpoint | FoundThread | None:
        """Read a checkpoint, or the head of its namespace; `None` if the thread is unknown."""

    @abstractmethod
    def list_checkpoints(self, query: Query) -> list[FoundCheckpoint]:
        """Read a page, newest first.

        Within a thread the order is that of the sequence numbers. Over all threads it is that of
        the ids, whose clocks may differ.
        """

    @abstractmethod
    def locate(self, tenant: str, thread_id: str, checkpoint_id: str) -> tuple[str, int] | None:
        """Find the namespace and the number of a thread's checkpoint, whatever its namespace."""

    @abstractmethod
    def list_values(self, wanted: Iterable[tuple[int, Part]]) -> dict[tuple[int, int], list[bytes]]:
        """Read the stretches of some parts, each as thread number and part.

        Returns:
            By thread number and series: the sealed stretches in order, as far as the highest length
            that was asked for reaches. What does not exist is left out.
        """

    @abstractmethod
    def list_stretches(
        self, wanted: Collection[tuple[int, int, int]]
    ) -> dict[tuple[int, int, int], ValueRow]:
        """Read the stretches in which elements stand, by thread number, series and position."""

    @abstractmethod
    def list_tail(self, thread: int, series: int, start: int) -> list[ValueRow]:
        """Read the stretches of a series that begin at a position or behind it, in order."""

    @abstractmethod
    def list_writes(
        self, rows: Sequence[FoundCheckpoint]
    ) -> dict[tuple[int, str, str], list[tuple[int, bytes]]]:
        """Read the writes of some checkpoints that are not in their own rows.

        These are the logged ones, and those that their successors carry.

        Returns:
            By thread number, namespace and checkpoint id: sequence number and sealed writes, in
            the order in which they became durable.
        """

    @abstractmethod
    def list_line(self, key: HeadKey, checkpoint_id: str, limit: int) -> list[FoundCheckpoint]:
        """Read a checkpoint and its ancestors, the newest first, as far as they are there."""

    @abstractmethod
    def scan(self, thread: ThreadState, kind: type[AnyRow], after: AnyRow | None) -> list[AnyRow]:
        """Read a page of a thread's rows of one kind, by namespace and number, after a row."""

    @abstractmethod
    def list_threads_of_runs(self, tenant: str, run_ids: Collection[str]) -> list[ThreadKey]:
        """List the threads that have checkpoints of these runs."""

    @abstractmethod
    def remove(
        self,
        thread: ThreadState,
        checkpoints: Collection[CheckpointRow],
        kept_values: Mapping[int, int],
    ) -> None:
        """Delete from a locked thread some checkpoints with their writes, and raise its number.

        Args:
            thread: The thread.
            checkpoints: What to delete.
            kept_values: How far the values that stay are needed, by series.
        """

    @abstractmethod
    def set_lease(self, thread: ThreadState, *, token: int, is_leased: bool) -> None:
        """Change who may write a thread that is locked."""

    @abstractmethod
    def delete(self, thread: ThreadState) -> None:
        """Delete everything of a locked thread, but for its own row, whose number is raised."""
