"""How long threads and their checkpoints are kept, and the sweep that deletes the others.

A sweep looks at all threads of a tenant, page by page, and lets be what something may still happen
to: a thread whose head has work left, or that a run holds. What it deletes, `pruning` deletes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from langgraph.checkpoint.serde.types import INTERRUPT, TASKS
from langgraph.constants import START

from agentflow.checkpoint.archive import archive
from agentflow.checkpoint.collection import GRACE, collect
from agentflow.checkpoint.encoding import Encoder, open_record
from agentflow.checkpoint.layout import Held
from agentflow.checkpoint.pruning import Selection, clear_retired, delete, prune
from agentflow.checkpoint.records import Record
from agentflow.checkpoint.rows import FoundCheckpoint, Rows, ThreadKey, ThreadState
from agentflow.checkpoint.steps import Ask, Read, Steps
from agentflow.errors import (
    BlockedTypeError,
    CodecError,
    ConflictError,
    FencedError,
    InvalidInputError,
    NotFoundError,
)
from agentflow.objects import open_objects
from agentflow.types import Duration, to_timedelta

Reason = Literal["unfinished", "held", "damaged"]
_PAGE = 100
_END = 1 << 62
"""Above every number of a checkpoint."""
_BRANCH, _JOIN = "branch:to:", "join:"
"""How LangGraph names the channels by which nodes are started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much of a thread is kept, and for how long; `None` sets no limit.

    A thread that has work left (tasks, writes that are not applied, open interrupts, a failed
    task), or that a run holds, is kept as it is.

    Raises:
        InvalidInputError: A limit is not positive, or `archive` malformed.
        UnsupportedUrlError: The scheme of `archive` is unknown.
        ObjectStoreError: The folder of `archive` is not there.
    """

    keep_last: int | None = None
    """How many checkpoints of each namespace."""
    ttl: Duration | None = None
    """How long after its newest checkpoint a thread is deleted."""
    archive: str | None = None
    """The object store, as a URL, in which a thread is archived before it is deleted."""

    def __post_init__(self) -> None:
        """Refuse what would delete what is in use."""
        if self.keep_last is not None and self.keep_last < 1:
            raise InvalidInputError("retention", ("keep_last: must be at least 1",))
        if self.ttl is not None and to_timedelta(self.ttl) <= timedelta():
            raise InvalidInputError("retention", ("ttl: must be longer than nothing",))
        if self.archive is not None:
            open_objects(self.archive)


Chooser = Callable[[Sequence[str]], Awaitable[Mapping[str, Retention]]]
"""Says how long each of some threads is kept; those left out are let be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptThread:
    """A thread of which something was deleted, or would be."""

    thread_id: str
    checkpoints: int
    """How many."""
    is_deleted: bool
    """Whether that is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """What a sweep has deleted; or would, if it was a dry run."""

    dry_run: bool
    threads: int
    """How many were looked at."""
    swept: tuple[SweptThread, ...]
    spared: Mapping[Reason, int]
    """How many threads were let be: something may still happen to them, or they cannot be read."""
    objects: int = 0
    """How many objects, to which nothing refers any more, were removed from the object tier."""
    object_bytes: int = 0
    """Their bytes."""

    @property
    def checkpoints(self) -> int:
        """How many checkpoints."""
        return sum(thread.checkpoints for thread in self.swept)


def sweep(
    encoder: Encoder,
    tenant: str,
    thread_ids: Iterable[str] | None,
    now: datetime,
    *,
    dry_run: bool,
    grace: Duration = GRACE,
) -> Steps[SweepReport]:
    """Go through a tenant's threads; each page of ids is asked about first.

    A sweep of all threads also removes the objects that nothing needs, of whatever tenant.
    """
    swept: list[SweptThread] = []
    spared: dict[Reason, int] = {}
    seen, after = 0, ""
    given = None if thread_ids is None else sorted(set(thread_ids))
    while page := (yield Read(partial(_page, tenant, given, after))):
        retentions: Mapping[str, Retention] = yield Ask(page)
        for thread_id in page:
            if thread_id not in retentions:
                continue
            one = _Thread(encoder, (tenant, thread_id), retentions[thread_id], now)
            outcome: SweptThread | Reason | None
            try:
                outcome = yield from one.sweep(dry_run=dry_run)
            except CodecError:
                # It is as it was, or as after some of its batches; the others must not wait for it.
                outcome = "damaged"
            if isinstance(outcome, SweptThread):
                swept.append(outcome)
            elif outcome is not None:
                spared[outcome] = spared.get(outcome, 0) + 1
        seen, after = seen + len(page), page[-1]
    if not dry_run:
        yield from clear_retired()
    tier = encoder.codec.tier if given is None else None
    collected = yield from collect(tier, now, to_timedelta(grace), dry_run=dry_run)
    return SweepReport(
        dry_run=dry_run,
        threads=seen,
        swept=tuple(swept),
        spared=spared,
        objects=collected.objects,
        object_bytes=collected.size,
    )


def _page(tenant: str, given: Sequence[str] | None, after: str, rows: Rows) -> Sequence[str]:
    if given is None:
        return rows.list_thread_ids(tenant, after, _PAGE)
    return [thread_id for thread_id in given if thread_id > after][:_PAGE]


@dataclass(frozen=True, slots=True)
class _Look:
    """A thread in which nothing is going on."""

    state: ThreadState
    newest: datetime | None
    """When its newest checkpoint was made; `None` if nobody can say."""


@dataclass(frozen=True, slots=True)
class _Thread:
    """One thread and how long it is kept."""

    encoder: Encoder
    key: ThreadKey
    retention: Retention
    now: datetime

    def sweep(self, *, dry_run: bool) -> Steps[SweptThread | Reason | None]:
        look = yield Read(self._look)
        if not isinstance(look, _Look):
            reason: Reason | None = look
            return reason
        if self._is_over(look.newest):
            newest = yield from self._newest(look)
            if self._is_over(newest):
                return (yield from self._delete(look, dry_run=dry_run))
        if self.retention.keep_last is None:
            return None
        if dry_run:
            count = yield from self._count(look, self.retention.keep_last)
        else:
            selection = Selection(keep_last=self.retention.keep_last)
            count = yield from prune(self.encoder, self.key, selection, None, self._is_idle)
        return self._swept(count, is_deleted=False) if count else None

    def _delete(self, look: _Look, *, dry_run: bool) -> Steps[SweptThread | Reason]:
        count = yield from self._count(look, 0)
        if not dry_run:
            try:
                is_gone = yield from self._remove(look.state)
            except FencedError:
                return "held"
            if not is_gone:
                return "unfinished"
        return self._swept(count, is_deleted=True)

    def _remove(self, looked_at: ThreadState) -> Steps[bool]:
        """Delete, once it is archived if it has to be; say whether that was still right."""
        if self.retention.archive is not None:
            store, codec = open_objects(self.retention.archive), self.encoder.codec
            version = looked_at.version
            try:
                yield from archive(codec, self.key, store, None, keep=True, version=version)
            except (ConflictError, NotFoundError):
                return False
        # A run may have been submitted to it since all of its page were asked about.
        if self.key[1] not in (yield Ask([self.key[1]])):
            return False

        def is_same(_: Rows, state: ThreadState) -> bool:
            """If nothing has changed since, it has still ended."""
            return (state.number, state.version) == (looked_at.number, looked_at.version)

        return (yield from delete(self.key, None, guard=is_same))

    def _swept(self, count: int, *, is_deleted: bool) -> SweptThread:
        return SweptThread(thread_id=self.key[1], checkpoints=count, is_deleted=is_deleted)

    def _look(self, rows: Rows) -> _Look | Reason | None:
        found = rows.find_checkpoint((*self.key, ""), None)
        if found is None:
            return None
        if found.thread.is_leased:
            return "held"
        if not isinstance(found, FoundCheckpoint):
            # A subgraph's checkpoints without those of the graph: one that has only begun.
            return "unfinished" if rows.list_namespaces(found.thread.number, None, 1) else None
        record = open_record(self.encoder.codec, found)
        if has_work_left(rows, self.encoder, found, record):
            return "unfinished"
        return _Look(found.thread, _time_of(record))

    def _is_idle(self, rows: Rows, state: ThreadState) -> bool:
        del state
        return isinstance(self._look(rows), _Look)

    def _is_over(self, newest: datetime | None) -> bool:
        if self.retention.ttl is None or newest is None:
            return False
        return newest + to_timedelta(self.retention.ttl) <= self.now

    def _newest(self, look: _Look) -> Steps[datetime | None]:
        """Return when the newest checkpoint of any namespace was made."""
        newest, after = look.newest, None
        while found := (yield Read(partial(self._times, look.state, after))):
            times, after = found
            if newest is None or None in times:
                return None
            newest = max(newest, *times)
        return newest

    def _times(
        self, state: ThreadState, after: str | None, rows: Rows
    ) -> tuple[list[datetime | None], str] | None:
        names = rows.list_namespaces(state.number, after, _PAGE)
        heads = (rows.find_checkpoint((*self.key, ns), None) for ns in names)
        times = [
            _time_of(open_record(self.encoder.codec, head))
            for head in heads
            if isinstance(head, FoundCheckpoint)
        ]
        return (times, names[-1]) if names else None

    def _count(self, look: _Look, keep_last: int) -> Steps[int]:
        """Count what would go."""
        count, after = 0, None
        while found := (yield Read(partial(_count, look.state, keep_last, after))):
            some, after = found
            count += some
        return count


def _count(
    state: ThreadState, keep_last: int, after: str | None, rows: Rows
) -> tuple[int, str] | None:
    names = rows.list_namespaces(state.number, after, _PAGE)
    count = 0
    for ns in names:
        limit = rows.find_newest(state.number, ns, keep_last) if keep_last else _END
        count += rows.count_older(state.number, ns, limit) if limit is not None else 0
    return (count, names[-1]) if names else None


def _time_of(record: Record) -> datetime | None:
    try:
        time = datetime.fromisoformat(record.body["ts"])
    except (KeyError, TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def has_work_left(rows: Rows, encoder: Encoder, found: FoundCheckpoint, record: Record) -> bool:
    """Whether a graph that goes on from a head would have something to do, or has failed there.

    Judged by the checkpoint alone, since the graph is not at hand. LangGraph starts a node if one
    of its channels has a value of a version that the node has not seen. Which channels these are
    shows in their names, or in what a node that has run has seen.

    Any write that is bound to a head counts: an interrupt, an error, or what a task has finished of
    a superstep that is not applied yet. There `StateSnapshot.next` may be empty (ADR 5).
    """
    if record.calls or any(rows.list_writes([found]).values()):
        return True
    body = record.body
    if body.get("pending_sends"):
        return True
    versions_seen: Mapping[str, Mapping[str, Any]] = body.get("versions_seen") or {}
    for channel, held in record.layout.items():
        if held.stored is None:
            continue
        if channel == TASKS:
            if _is_filled(rows, encoder, found, channel, held):
                return True
            continue
        seen = [
            node_seen[channel]
            for node, node_seen in versions_seen.items()
            if node != INTERRUPT and channel in node_seen
        ]
        is_new = any(version != held.version for version in seen)
        if channel.startswith(_JOIN):
            if (is_new or not seen) and _is_filled(rows, encoder, found, channel, held):
                return True
        elif is_new or (not seen and (channel == START or channel.startswith(_BRANCH))):
            return True
    return False


def _is_filled(
    rows: Rows, encoder: Encoder, found: FoundCheckpoint, channel: str, held: Held
) -> bool:
    """Whether there are sends to follow, or all the nodes that a join waits for have ended."""
    thread, stored = found.row.thread, held.stored
    parts = stored if isinstance(stored, tuple) else ()
    stretches = rows.list_values((thread, part) for part in parts)
    try:
        value = encoder.read_value(found, channel, held, stretches)[0]
    except BlockedTypeError:
        # There is something in it.
        return True
    if channel == TASKS:
        return bool(value)
    # A join waits for the nodes before the colon; with `defer`, it also notes whether all is over.
    names = value[0] if isinstance(value, tuple) else value
    return len(names) > channel.count("+")
