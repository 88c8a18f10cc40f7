"""Deciding what becomes of puts: who may write a thread, what may follow its head, what is stored.

A `ThreadPlan` takes the puts of one thread in order, refuses those that must not be, and collects
what the others change. It starts from a known state of the thread; the backend applies the change
only if that state still holds, so nothing that is decided here can be overtaken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from agentflow.checkpoint.records import Place, pack_record, pack_writes, unpack_record
from agentflow.checkpoint.rows import (
    WHOLE,
    CheckpointRow,
    FoundCheckpoint,
    Head,
    HeadKey,
    Held,
    Layout,
    Part,
    Query,
    Rows,
    Stored,
    ThreadChange,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.codec import Codec
from agentflow.delta import Grown, KnownList
from agentflow.errors import ConflictError, FencedError
from agentflow.types import Lease

INLINE = 128
"""Bytes up to which a value stands in the row of each checkpoint that has it."""
_MAX_HEADS = 64
"""How many namespaces of a thread are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an invocation saw when it loaded; it comes back with everything the invocation puts."""

    ns: str
    head_seq: int
    checkpoint_id: str
    load_id: str = field(compare=False)
    """Names the load, and with it the invocation; two loads of the same are equal otherwise."""


class WholeList(NamedTuple):
    """A list that is stored from its first element."""

    block: bytes
    length: int


class GrownList(NamedTuple):
    """A list that continues the one of an earlier checkpoint."""

    since: str
    """That checkpoint's id."""
    growth: Grown


NewValue = bytes | WholeList | GrownList
"""A changed channel's value, serialized."""


def _size(value: NewValue) -> int:
    if isinstance(value, WholeList):
        return len(value.block)
    return len(value.growth.block) if isinstance(value, GrownList) else len(value)


@dataclass(slots=True, kw_only=True)
class PlannedWrites:
    """The writes of one task."""

    key: HeadKey
    lease: Lease | None
    codec: Codec
    checkpoint_id: str
    call: bytes
    """Serialized, as `records` describes it."""

    @property
    def size(self) -> int:
        """Bytes of what it brings, before compression."""
        return len(self.call)


@dataclass(slots=True, kw_only=True)
class PlannedCheckpoint:
    """A checkpoint, serialized but for what depends on the state of its thread."""

    key: HeadKey
    lease: Lease | None
    codec: Codec
    checkpoint_id: str
    parent_id: str | None
    attempt: str
    run_id: str | None
    step: int | None
    head: bytes
    """Serialized, as `records` describes it."""
    versions: Mapping[str, Any]
    """Of all channels."""
    changed: frozenset[str]
    values: Mapping[str, NewValue]
    """Of the changed channels; one without a value is empty from now on."""
    lists: Mapping[str, tuple[Any, KnownList]]
    """What its successor needs to know of its lists."""
    source: str | None
    """The checkpoint from which lists have grown."""
    seen: Seen | None
    is_invocation: bool
    """Whether it comes from a running graph, not from a caller of the saver."""
    was_sent: bool = False
    """Whether it was part of a commit before, whose outcome is not known."""

    @property
    def ns(self) -> str:
        """Its namespace."""
        return self.key[2]

    @property
    def size(self) -> int:
        """Bytes of what it brings, before compression."""
        return len(self.head) + sum(map(_size, self.values.values()))


Planned = PlannedWrites | PlannedCheckpoint


def fence(thread_id: str, lease: Lease | None, state: ThreadState) -> FencedError | None:
    """Say why a write with this lease may not touch a thread in that state; `None` if it may."""
    if lease is None:
        return FencedError(thread_id, None, state.token) if state.is_leased else None
    if lease.thread_id != thread_id or lease.token != state.token or not state.is_leased:
        return FencedError(thread_id, lease.token, state.token)
    return None


def conflict(thread_id: str) -> ConflictError:
    """Make the error of a put that lost a race."""
    return ConflictError(
        f"thread {thread_id!r} has moved on since this invocation loaded it; "
        "load it again and repeat the call"
    )


class ThreadPlan:
    """What a batch does to one thread."""

    def __init__(self, state: ThreadState, rows: Rows) -> None:
        """Start from `state`, whose heads cover the namespaces of all puts."""
        self._rows = rows
        self._before = state
        self._seq = state.seq
        self._heads = dict(state.heads)
        self._layouts: dict[tuple[str, str], Layout | None] = {}
        self._checkpoints: dict[tuple[str, str], CheckpointRow] = {}
        self._values: list[ValueRow] = []
        self._pending: dict[tuple[str, str], list[PlannedWrites]] = {}

    def add(self, put: Planned) -> Exception | None:
        """Take a put into the plan, or say why it is refused."""
        refused = fence(put.key[1], put.lease, self._before)
        if refused is not None:
            return refused
        if isinstance(put, PlannedWrites):
            self._pending.setdefault((put.key[2], put.checkpoint_id), []).append(put)
            return None
        if put.was_sent and self._is_written(put):
            return None
        if not self._may_follow(put):
            return conflict(put.key[1])
        return self._advance(put)

    def change(self) -> ThreadChange | None:
        """Return what the plan changes, if it changes anything."""
        if not self._checkpoints and not self._pending:
            return None
        number = self._before.number
        writes = [
            WritesRow(number, ns, checkpoint_id, self._next(), _pack(calls))
            for (ns, checkpoint_id), calls in self._pending.items()
        ]
        heads = self._heads
        if len(heads) > _MAX_HEADS:
            heads = dict(list(heads.items())[-_MAX_HEADS:])
        before = self._before
        return ThreadChange(
            before,
            ThreadState(number, before.token, before.is_leased, self._seq, heads),
            list(self._checkpoints.values()),
            self._values,
            writes,
        )

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _may_follow(self, put: PlannedCheckpoint) -> bool:
        head = self._heads[put.ns]
        if head is None:
            return True
        if put.parent_id == head.checkpoint_id:
            return True
        same_attempt = put.attempt == head.attempt
        if put.checkpoint_id == head.checkpoint_id and same_attempt:
            return True
        # Parallel calls of one subgraph share its namespace; the last put wins, as in LangGraph.
        if put.ns and same_attempt:
            return True
        if put.seen is None:
            # A caller who puts by hand, without a parent, starts a new line on purpose. A graph
            # that found the thread empty has lost a race.
            return put.parent_id is None and not put.is_invocation
        return put.seen.ns == put.ns and put.seen.head_seq == head.seq

    def _is_written(self, put: PlannedCheckpoint) -> bool:
        """Whether this very put is stored: the reply to its commit was lost, and it came again."""
        found = self._rows.find_checkpoint(put.key, put.checkpoint_id)
        if not isinstance(found, FoundCheckpoint) or found.row.attempt != put.attempt:
            return False
        stored = unpack_record(put.codec, found.row, Place(*put.key[1:]))
        is_same: bool = [stored.body, stored.metadata] == put.codec.deserialize(put.head)
        return is_same

    def _advance(self, put: PlannedCheckpoint) -> Exception | None:
        head = self._heads[put.ns]
        values_before = len(self._values)
        layout = self._lay_out(put, head)
        if layout is None:
            del self._values[values_before:]
            return conflict(put.key[1])
        seq = self._next()
        is_again = head is not None and head.checkpoint_id == put.checkpoint_id
        follows = head is not None and not is_again and head.checkpoint_id == put.parent_id
        superseded = self._pending.pop((put.ns, put.parent_id or ""), None) if follows else None
        row = CheckpointRow(
            thread=self._before.number,
            ns=put.ns,
            seq=head.seq if is_again and head is not None else seq,
            checkpoint_id=put.checkpoint_id,
            parent_id=put.parent_id,
            attempt=put.attempt,
            run_id=put.run_id,
            step=put.step,
            data=pack_record(put.codec, put.head, layout),
            parent_writes=_pack(superseded)
            if superseded
            else self._carried(put, is_again=is_again),
        )
        self._checkpoints[put.ns, put.checkpoint_id] = row
        # The newest last, so that the ones forgotten first are the oldest.
        self._heads.pop(put.ns, None)
        self._heads[put.ns] = Head(put.checkpoint_id, row.seq, put.attempt, layout)
        return None

    def _carried(self, put: PlannedCheckpoint, *, is_again: bool) -> bytes | None:
        """Keep the writes that the same checkpoint already carried."""
        if not is_again:
            return None
        planned = self._checkpoints.get((put.ns, put.checkpoint_id))
        if planned is not None:
            return planned.parent_writes
        found = self._rows.find_checkpoint(put.key, put.checkpoint_id)
        return found.row.parent_writes if isinstance(found, FoundCheckpoint) else None

    def _lay_out(self, put: PlannedCheckpoint, head: Head | None) -> Layout | None:
        """Say where each channel's value is kept; `None` if what the put builds on is gone."""
        layout: dict[str, Held] = {}
        missing: dict[str, Any] = {}
        for channel, version in put.versions.items():
            value = put.values.get(channel)
            if value is not None:
                stored = self._store(put, head, channel, value)
                if stored is None:
                    return None
                layout[channel] = Held(version, stored)
            elif channel in put.changed:
                layout[channel] = Held(version, None)
            elif (held := self._held(put, head, channel, version)) is not None:
                layout[channel] = held
            else:
                missing[channel] = version
        return {**layout, **self._search(put, missing)} if missing else layout

    def _store(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, value: NewValue
    ) -> Stored | None:
        number = self._before.number
        if isinstance(value, GrownList):
            return self._continue(put, head, channel, value)
        if isinstance(value, WholeList):
            series = self._next()
            self._values.append(ValueRow(number, series, 0, put.codec.seal(value.block)))
            return (Part(series, value.length, is_open=True),)
        if len(value) <= INLINE:
            return value
        series = self._next()
        self._values.append(ValueRow(number, series, 0, put.codec.seal(value)))
        return (Part(series, WHOLE, is_open=False),)

    def _continue(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, value: GrownList
    ) -> Stored | None:
        """Put a list's new elements behind the stored ones."""
        base = self._layout(put, head, value.since)
        held = base.get(channel) if base is not None else None
        if held is None or held.stored is None or isinstance(held.stored, bytes):
            return None
        kept, block, count = value.growth.kept, value.growth.block, value.growth.count
        parts = cut(held.stored, kept)
        if sum(part.length for part in parts) != kept:
            return None
        if count == kept:
            return tuple(parts)
        number = self._before.number
        sealed = put.codec.seal(block)
        # Only the newest checkpoint may go on in place: what follows an older one is a branch, and
        # the series may have gone on without it.
        if head is not None and head.checkpoint_id == value.since and parts and parts[-1].is_open:
            last = parts.pop()
            self._values.append(ValueRow(number, last.series, last.length, sealed))
            parts.append(Part(last.series, last.length + count - kept, is_open=True))
        else:
            series = self._next()
            self._values.append(ValueRow(number, series, 0, sealed))
            parts.append(Part(series, count - kept, is_open=True))
        return tuple(parts)

    def _held(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, version: Any
    ) -> Held | None:
        """Find the unchanged value of a channel in what the put comes from."""
        seen_id = put.seen.checkpoint_id if put.seen is not None else None
        # Its own id first: a checkpoint that is put again repeats only what changed in between.
        for source in dict.fromkeys((put.checkpoint_id, put.parent_id, seen_id)):
            layout = self._layout(put, head, source) if source is not None else None
            held = layout.get(channel) if layout is not None else None
            if held is not None and held.version == version:
                if head is not None and source == head.checkpoint_id:
                    return held
                return Held(version, closed(held.stored))
        return None

    def _layout(self, put: PlannedCheckpoint, head: Head | None, source: str) -> Layout | None:
        if head is None:
            return None
        if head.checkpoint_id == source:
            return head.layout
        place = (put.ns, source)
        if source == put.checkpoint_id and place not in self._checkpoints and not put.was_sent:
            # Nothing has this id yet, but for one that was put by another attempt.
            return None
        if place not in self._layouts:
            planned = self._checkpoints.get(place)
            if planned is None:
                found = self._rows.find_checkpoint((*put.key[:2], put.ns), source)
                planned = found.row if isinstance(found, FoundCheckpoint) else None
            self._layouts[place] = (
                unpack_record(put.codec, planned, Place(*put.key[1:])).layout if planned else None
            )
        return self._layouts[place]

    def _search(self, put: PlannedCheckpoint, missing: Mapping[str, Any]) -> dict[str, Held]:
        """Find values by their versions anywhere in the namespace, the newest first.

        Only a caller that puts without ever having read the thread comes here.
        """
        found: dict[str, Held] = {}
        for row in self._all_rows(put.key) if self._heads[put.ns] is not None else ():
            if len(found) == len(missing):
                break
            layout = unpack_record(put.codec, row, Place(*put.key[1:])).layout
            for channel in missing.keys() - found.keys():
                held = layout.get(channel)
                if held is not None and held.version == missing[channel]:
                    found[channel] = Held(held.version, closed(held.stored))
        nowhere = {c: Held(v, None) for c, v in missing.items() if c not in found}
        return {**found, **nowhere}

    def _all_rows(self, key: HeadKey) -> Iterator[CheckpointRow]:
        yield from reversed(self._checkpoints.values())
        query = Query(tenant=key[0], thread_id=key[1], ns=key[2])
        while page := self._rows.list_checkpoints(query):
            yield from (found.row for found in page)
            query = replace(query, after=page[-1].row.seq)


def _pack(calls: Sequence[PlannedWrites]) -> bytes:
    return pack_writes(calls[0].codec, [call.call for call in calls])


def cut(parts: Sequence[Part], count: int) -> list[Part]:
    """Return the parts that make up the first `count` elements of a list."""
    kept: list[Part] = []
    for part in parts:
        take = min(part.length, count)
        if take <= 0:
            break
        kept.append(Part(part.series, take, part.is_open and take == part.length))
        count -= take
    return kept


def closed(stored: Stored | None) -> Stored | None:
    """Return what a branch has of a stored value: nothing may be put behind it in place."""
    if stored is None or isinstance(stored, bytes):
        return stored
    return tuple(part._replace(is_open=False) for part in stored)
