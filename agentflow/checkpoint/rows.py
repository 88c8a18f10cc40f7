"""The rows port: what a backend has to do to keep checkpoints.

LangGraph's rules stand above it, in `planning`; a backend only keeps rows and applies changes to
threads, each as a whole and only if the thread is still what the change was made from. There are
six kinds of rows:

- a *thread*: its fencing token, whether a lease holds it, and its sequence number, which every
  change of the thread raises. Equal token, lease and number mean that nothing has changed;
- a *checkpoint*: one row for each, which also carries the writes that it supersedes;
- a *value*: something too large to stand in the row of each checkpoint that has it. Values belong
  to a series: a list that grows is one series of stretches, anything else a series of one;
- *writes*: what tasks have written for a checkpoint that has no successor yet, as a log;
- an *anchor*: the hash of a deleted checkpoint that something kept follows;
- an *object*: where a value is whose row only refers to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, TypeVar

from agentflow.checkpoint.layout import Layout, Part

ThreadKey = tuple[str, str]
"""Tenant and thread id."""

HeadKey = tuple[str, str, str]
"""Tenant, thread id and checkpoint namespace."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest checkpoint of a namespace."""

    checkpoint_id: str
    seq: int
    attempt: str
    layout: Layout
    hash: bytes


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
    hash: bytes
    """Covers the checkpoint, its values and the hash of its parent."""
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


class AnchorRow(NamedTuple):
    """A checkpoint that was deleted, or is about to be, although something kept follows it.

    The one without namespace and id is a note that values may be left which nobody needs.
    """

    thread: int
    ns: str
    checkpoint_id: str
    seq: int
    data: bytes
    """Its hash."""


class ObjectRow(NamedTuple):
    """A value that is kept in an object; the row outlives the value until the object is collected.

    It names the object in clear, which the value's own row does too, but sealed.
    """

    thread: int
    series: int
    start: int
    object: str
    """Its name."""


class Link(NamedTuple):
    """What can be known of a checkpoint without reading what it holds."""

    ns: str
    seq: int
    checkpoint_id: str
    parent_id: str | None
    run_id: str | None
    hash: bytes
    carries: bool
    """Whether it carries writes of its parent."""
    size: int
    """Bytes of what it holds."""


class DeadValue(NamedTuple):
    """Stretches of a series that nobody needs: those that begin in this range."""

    series: int
    start: int
    last: int


RETIRED = "\x7fretired"
"""The tenant of threads that were deleted as a whole and are not yet gone row by row.

What they hold is readable by nobody, and verified by nobody.
"""

AnyRow = TypeVar("AnyRow", CheckpointRow, ValueRow, WritesRow, AnchorRow, ObjectRow)


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
    anchors: list[AnchorRow] = field(default_factory=list)
    objects: list[ObjectRow] = field(default_factory=list)
    """Where values are, as `refer` has it."""
    released: list[tuple[int, int]] = field(default_factory=list)
    """Values that are in no object any more, by series and start."""
    confirm: Callable[[], None] | None = None
    """Called before the commit, with collection locked out; it raises if an object is gone."""


class Logged(NamedTuple):
    """Writes of a checkpoint, from the log or carried by the checkpoint after it."""

    seq: int
    """Of the row that has them."""
    carrier: str
    """The id of the checkpoint that carries them; empty for the log."""
    data: bytes


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


class DeletionVerbs(ABC):
    """The verbs of `Rows` by which what is no longer needed is found and deleted."""

    @abstractmethod
    def list_threads_of_runs(self, tenant: str, run_ids: Collection[str]) -> list[ThreadKey]:
        """List the threads that have checkpoints of these runs."""

    @abstractmethod
    def list_thread_ids(self, tenant: str, after: str, limit: int) -> list[str]:
        """List a tenant's threads that were ever written, by id, behind one."""

    @abstractmethod
    def list_namespaces(self, thread: int, after: str | None, limit: int) -> list[str]:
        """List the namespaces in which a thread has checkpoints, in the database's order."""

    @abstractmethod
    def find_newest(self, thread: int, ns: str, place: int) -> int | None:
        """Return the number of a namespace's newest checkpoint (place 1), or one before it."""

    @abstractmethod
    def count_older(self, thread: int, ns: str, seq: int) -> int:
        """Count the checkpoints of a namespace with a number below this one."""

    @abstractmethod
    def list_links(
        self,
        thread: int,
        ns: str,
        *,
        limit: int,
        after: int | None = None,
        below: int | None = None,
        run_ids: Collection[str] | None = None,
    ) -> list[Link]:
        """Read a page of a namespace's links: behind a number upwards, or else downwards.

        Args:
            thread: The thread's number.
            ns: The namespace.
            limit: At most so many.
            after: The page begins behind this number, and goes up.
            below: The page begins below this number, and goes down.
            run_ids: Only those of these runs.
        """

    @abstractmethod
    def find_links(self, thread: int, ns: str, ids: Collection[str]) -> list[Link]:
        """Read the links of some checkpoints, as far as they are there."""

    @abstractmethod
    def find_anchor(self, thread: int, ns: str, checkpoint_id: str) -> AnchorRow | None:
        """Read an anchor."""

    @abstractmethod
    def remove(
        self, thread: int, checkpoints: Collection[Link], anchors: Collection[AnchorRow] = ()
    ) -> None:
        """Delete some checkpoints of a locked thread with their logged writes, and anchors.

        Whoever calls this raises the thread's number in the same transaction.
        """

    @abstractmethod
    def list_series(
        self, thread: int, after: int, through: int, limit: int
    ) -> list[tuple[int, int]]:
        """List a thread's series of values by number, each with the start of its last stretch."""

    @abstractmethod
    def remove_values(
        self, thread: int, dead: Sequence[DeadValue], *, limit: int, max_bytes: int
    ) -> bool:
        """Delete dead stretches, at most so many and so large; say whether none is left."""

    @abstractmethod
    def remove_some(self, thread: int, *, limit: int, max_bytes: int) -> bool:
        """Delete rows of a thread whatever they are; say whether none is left."""

    @abstractmethod
    def retire(self, thread: ThreadState) -> None:
        """Give the name, the token and the lease of a locked thread to a new one without rows.

        What the old one holds belongs to `RETIRED` from then on. The number goes on where it was.
        """

    @abstractmethod
    def find_retired(self) -> int | None:
        """Return the number of a retired thread, if there is one."""

    @abstractmethod
    def forget_retired(self, thread: int) -> None:
        """Delete the row of a retired thread that holds nothing any more."""


class ObjectVerbs(ABC):
    """The verbs of `Rows` that are about the objects in which values are."""

    @abstractmethod
    def refer(
        self, objects: Sequence[ObjectRow], released: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        """Note in which objects values are, and lock out collection until the transaction ends.

        Args:
            objects: A value that was in another object is in that one no more.
            released: Values that are in none any more, by thread, series and start.
        """

    @abstractmethod
    def find_space(self, *, make: bool) -> tuple[str, bool] | None:
        """Return the folder of this database in its object tier, and whether there was one.

        Args:
            make: Make one where there is none.
        """

    @abstractmethod
    def has_objects(self, thread: int) -> bool:
        """Whether values of a thread are, or lately were, in objects."""

    @abstractmethod
    def exclude_referrers(self) -> None:
        """Lock out `refer` until the transaction ends."""

    @abstractmethod
    def list_abandoned(self, limit: int) -> list[ObjectRow]:
        """List references of which the value is gone or elsewhere, and not yet noted when."""

    @abstractmethod
    def abandon(self, rows: Sequence[ObjectRow], at: datetime) -> None:
        """Note since when references are abandoned, of those that still are."""

    @abstractmethod
    def forget_objects(self, before: datetime, limit: int) -> bool:
        """Delete references that were abandoned before a time; say whether none is left."""

    @abstractmethod
    def find_needed(self, names: Sequence[str], since: datetime) -> set[str]:
        """Return which objects are referred to, or were at a time or later."""


class Rows(DeletionVerbs, ObjectVerbs):
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
    def list_values(
        self, wanted: Iterable[tuple[int, Part]]
    ) -> dict[tuple[int, int], list[ValueRow]]:
        """Read the stretches of some parts, each as thread number and part.

        Returns:
            By thread number and series: the stretches in order, as far as the highest length
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
    ) -> dict[tuple[int, str, str], list[Logged]]:
        """Read the writes of some checkpoints that are not in their own rows.

        These are the logged ones, and those that their successors carry.

        Returns:
            By thread number, namespace and checkpoint id, in no particular order.
        """

    @abstractmethod
    def list_threads(
        self, tenant: str | None, thread_id: str | None, after: int, limit: int
    ) -> list[tuple[ThreadKey, ThreadState]]:
        """Read a page of threads by number, behind a number; `None` does not narrow."""

    @abstractmethod
    def count_checkpoints(self, tenant: str | None, thread_id: str | None) -> int:
        """Count checkpoints; `None` does not narrow."""

    @abstractmethod
    def count_by_namespace(self, thread: ThreadKey) -> dict[str, int]:
        """Count the checkpoints of a thread."""

    @abstractmethod
    def sweep(
        self, between: tuple[int, int], kind: type[AnyRow], after: AnyRow | None, limit: int
    ) -> list[AnyRow]:
        """Read a page of rows of one kind by thread, namespace and number, after a row.

        Args:
            between: Numbers of threads: behind the first, up to the second.
            kind: The kind.
            after: The last row of the page before.
            limit: How many rows a page has.
        """

    @abstractmethod
    def list_line(self, key: HeadKey, checkpoint_id: str, limit: int) -> list[FoundCheckpoint]:
        """Read a checkpoint and its ancestors, the newest first, as far as they are there."""

    @abstractmethod
    def scan(self, thread: ThreadState, kind: type[AnyRow], after: AnyRow | None) -> list[AnyRow]:
        """Read a page of a thread's rows of one kind, by namespace and number, after a row."""

    @abstractmethod
    def rewrite(self, rows: Sequence[AnyRow]) -> None:
        """Put rows, all of one kind, in the place of those with the same keys."""

    @abstractmethod
    def set_lease(self, thread: ThreadKey, token: int, *, is_leased: bool) -> ThreadState | None:
        """Take a thread for a token, or give it back, and return its state without heads.

        It is taken unless its token is higher. It is given back only if the token is its own; else
        nothing happens, and nothing need be returned.
        """

    def take_at_head(
        self, thread: ThreadKey, token: int
    ) -> tuple[ThreadState, FoundCheckpoint | None, Mapping[tuple[int, str, str], list[Logged]]]:
        """Take a thread as `set_lease` does, and find the head of its own namespace.

        Returns:
            The thread's state, the head, and the head's writes as `list_writes` has them.
        """
        state = self.set_lease(thread, token, is_leased=True)
        assert state is not None  # only one that is given back may have none
        found = self.find_checkpoint((*thread, ""), None)
        if not isinstance(found, FoundCheckpoint):
            return state, None, {}
        return state, found, self.list_writes([found])

    @abstractmethod
    def raise_tokens(self, by: int) -> None:
        """Raise the tokens of all threads."""
