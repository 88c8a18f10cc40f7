"""Deciding what becomes of puts: who may write a thread, what may follow its head, what is stored.

A `ThreadPlan` takes the puts of one thread in order, refuses those that must not be, and collects
what the others change. It starts from a known state of the thread; the backend applies the change
only if that state still holds, so nothing that is decided here can be overtaken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from langgraph.constants import START

from agentflow.checkpoint.offload import confirm, open_value, seal_value
from agentflow.checkpoint.pending import inlined
from agentflow.checkpoint.records import (
    Call,
    Place,
    Written,
    hash_of,
    pack_record,
    pack_writes,
    unpack_record,
)
from agentflow.checkpoint.rows import (
    WHOLE,
    CheckpointRow,
    FoundCheckpoint,
    Head,
    HeadKey,
    Held,
    Layout,
    ObjectRow,
    Part,
    Query,
    Rows,
    Stored,
    ThreadChange,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.codec import Codec, digest_of, is_apart
from agentflow.delta import Grown, KnownList, joined
from agentflow.errors import ConflictError, FencedError
from agentflow.objects import ObjectTier
from agentflow.types import Lease

INLINE = 128
"""Bytes up to which a value stands in the row of each checkpoint that has it."""
_MAX_HEADS = 64
"""How many namespaces of a thread are remembered."""
_TIER = 16
"""Each time a list has grown by so many elements, its last stretches are put together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an invocation saw when it loaded; it comes back with everything the invocation puts."""

    ns: str
    head_seq: int
    checkpoint_id: str
    load_id: str
    """Names the load, and with it the invocation."""
    step: int | None
    is_marked: bool
    """Whether a node comes next after which the state has to be stored."""


class WholeList(NamedTuple):
    """A list that is stored from its first element."""

    block: bytes
    length: int
    digest: bytes


class GrownList(NamedTuple):
    """A list that continues the one of an earlier checkpoint."""

    since: str
    """That checkpoint's id."""
    growth: Grown


NewValue = bytes | WholeList | GrownList
"""A changed channel's value, serialized."""


def size_of(value: NewValue) -> int:
    """Return the bytes of a value."""
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
    call: Call
    size: int
    """Bytes of what it brings, before compression."""


@dataclass(slots=True, kw_only=True)
class PlannedCheckpoint:
    """A checkpoint, serialized but for what depends on the state of its thread."""

    key: HeadKey
    ns: str
    """The last part of its key."""
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
    kept: frozenset[str]
    """The other channels that have a value, which something that is stored must have."""
    lists: Mapping[str, tuple[Any, KnownList]]
    """What its successor needs to know of its lists."""
    source: str | None
    """The checkpoint from which lists have grown."""
    seen: Seen | None
    found_nothing: bool
    """Whether it comes from a graph that looked and found its namespace empty."""
    size: int
    """Bytes of what it brings, before compression."""
    was_sent: bool = False
    """Whether it was part of a commit before, whose outcome is not known."""


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


@dataclass(slots=True)
class _Draft:
    """A checkpoint's row, but for the writes that may still join it."""

    put: PlannedCheckpoint
    seq: int
    layout: Layout
    parent_hash: bytes | None = None
    hash: bytes = b""
    parent_writes: bytes | None = None
    superseded: list[PlannedWrites] = field(default_factory=list)
    """What `parent_writes` was made of, if it comes from this very batch."""
    calls: list[Call] = field(default_factory=list)
    """Writes bound to it."""
    was_there: bool = False
    """Whether it was stored before, and later writes may be in the log."""
    base: bytes | None = None
    """What its delta channels had at its parent, if that was deleted."""

    def _columns(self, thread: int = 0) -> CheckpointRow:
        put = self.put
        return CheckpointRow(
            thread,
            put.ns,
            self.seq,
            put.checkpoint_id,
            put.parent_id,
            put.attempt,
            put.run_id,
            put.step,
            b"",
            self.hash,
            self.parent_writes,
            self.base,
        )

    def chain(self) -> None:
        """Compute its hash, once all that it covers is known."""
        put = self.put
        covered = hash_of(
            put.codec, Place(*put.key), self._columns(), put.head, self.layout, self.parent_hash
        )
        self.hash = put.codec.hash(covered)

    def row(self, thread: int) -> CheckpointRow:
        put, row = self.put, self._columns(thread)
        data = pack_record(
            put.codec, Place(*put.key), row, put.head, self.layout, self.calls, self.parent_hash
        )
        return row._replace(data=data)


class ThreadPlan:
    """What a batch does to one thread."""

    def __init__(self, state: ThreadState, rows: Rows) -> None:
        """Start from `state`, whose heads cover the namespaces of all puts."""
        self._rows = rows
        self._before = state
        self._seq = state.seq
        self._heads = dict(state.heads)
        self._layouts: dict[tuple[str, str], Layout | None] = {}
        self._drafts: dict[tuple[str, str], _Draft] = {}
        self._values: list[ValueRow] = []
        self._pending: dict[tuple[str, str], list[PlannedWrites]] = {}
        self._moved: list[WritesRow] = []
        self._replaced: list[ValueRow] = []
        self._dropped: list[tuple[int, int]] = []
        self._objects: list[ObjectRow] = []
        self._tier: ObjectTier | None = None
        """Where the objects are, once there are any."""
        self._blocks: dict[bytes, tuple[int, int, int]] = {}
        """Where the blocks of the checkpoint that is being planned are put."""

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
        if not self._drafts and not self._pending:
            return None
        number = self._before.number
        writes = self._moved
        for place, puts in self._pending.items():
            draft = self._drafts.get(place)
            if draft is not None and not draft.was_there:
                draft.calls += self._calls(puts)
            else:
                seq = self._next()
                context = Place(*puts[0].key).context_of_writes(place[1], seq)
                writes.append(WritesRow(number, *place, seq, self._pack(puts, context)))
        heads = self._heads
        if len(heads) > _MAX_HEADS:
            heads = dict(list(heads.items())[-_MAX_HEADS:])
        before = self._before
        return ThreadChange(
            before,
            ThreadState(number, before.token, before.is_leased, self._seq, heads),
            [draft.row(number) for draft in self._drafts.values() if not draft.was_there],
            [draft.row(number) for draft in self._drafts.values() if draft.was_there],
            self._values,
            self._replaced,
            self._dropped,
            writes,
            objects=self._objects,
            confirm=self._confirm if self._objects else None,
        )

    def _confirm(self) -> None:
        assert self._tier is not None
        confirm(self._tier, (row.object for row in self._objects))

    def _pack(
        self,
        puts: Sequence[PlannedWrites],
        context: bytes,
        blocks: Mapping[bytes, tuple[int, int, int]] | None = None,
    ) -> bytes:
        """Pack writes; what is among the blocks already is only referred to."""
        return pack_writes(puts[0].codec, self._calls(puts, blocks), context)

    def _calls(
        self,
        puts: Sequence[PlannedWrites],
        blocks: Mapping[bytes, tuple[int, int, int]] | None = None,
    ) -> list[Call]:
        if not blocks and puts[0].codec.tier is None:
            return [put.call for put in puts]
        known = blocks or {}
        calls: list[Call] = []
        for put in puts:
            task_id, path, items = put.call
            written = [
                (index, channel, self._set_apart(put, _shared(value, known)))
                for index, channel, value in items
            ]
            calls.append((task_id, path, written))
        return calls

    def _set_apart(self, put: PlannedWrites, written: Written) -> Written:
        """Make a value of its own of a write that has to be in an object."""
        if not isinstance(written, bytes) or not _is_large(put.codec, written):
            return written
        series = self._next()
        row = self._sealed(put, series, 0, written)
        if not is_apart(row.data):
            return written
        self._values.append(row)
        return [series, 0, WHOLE]

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _may_follow(self, put: PlannedCheckpoint) -> bool:
        head = self._heads[put.ns]
        if head is None:
            # Whoever had loaded something has had it deleted under its hands.
            return put.seen is None
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
            return put.parent_id is None and not put.found_nothing
        return put.seen.head_seq == head.seq and self._is_branch(put, put.seen, head)

    def _is_branch(self, put: PlannedCheckpoint, seen: Seen, head: Head) -> bool:
        """Whether what a put branches from is still there."""
        if put.parent_id is None or self._layout(put, head, put.parent_id) is not None:
            return True
        # A copy of what was loaded has the same parent, which may have been pruned.
        found = self._rows.find_checkpoint(put.key, seen.checkpoint_id)
        return isinstance(found, FoundCheckpoint) and found.row.parent_id == put.parent_id

    def _is_written(self, put: PlannedCheckpoint) -> bool:
        """Whether this very put is stored: the reply to its commit was lost, and it came again."""
        found = self._rows.find_checkpoint(put.key, put.checkpoint_id)
        if not isinstance(found, FoundCheckpoint) or found.row.attempt != put.attempt:
            return False
        stored = unpack_record(put.codec, found.row, Place(*put.key))
        is_same: bool = [stored.body, stored.metadata] == put.codec.deserialize(put.head)
        return is_same

    def _advance(self, put: PlannedCheckpoint) -> Exception | None:
        head = self._heads[put.ns]
        if self._is_taken(put, head):
            return conflict(put.key[1])
        lists: tuple[list[Any], ...] = (
            self._values,
            self._replaced,
            self._dropped,
            self._objects,
        )
        before = [len(each) for each in lists]
        self._blocks = {}
        layout = self._lay_out(put, head)
        if layout is None:
            for each, length in zip(lists, before, strict=True):
                del each[length:]
            return conflict(put.key[1])
        is_again = head is not None and head.checkpoint_id == put.checkpoint_id
        seq = self._next()
        follows = head is not None and not is_again and head.checkpoint_id == put.parent_id
        superseded = self._pending.pop((put.ns, put.parent_id or ""), None) if follows else None
        draft = _Draft(put, head.seq if is_again and head is not None else seq, layout)
        if superseded:
            draft.superseded = superseded
            context = Place(*put.key).context_of_carried(draft.seq, put.checkpoint_id)
            draft.parent_writes = self._pack(superseded, context, self._blocks)
        if is_again:
            self._keep_writes(draft, is_head=True)
        elif head is not None and not follows:
            self._come_again(draft)
        if draft.parent_hash is None and put.parent_id is not None:
            draft.parent_hash = self._parent_hash(put, head)
        draft.chain()
        self._drafts[put.ns, put.checkpoint_id] = draft
        # The newest last, so that the ones forgotten first are the oldest.
        self._heads.pop(put.ns, None)
        self._heads[put.ns] = Head(put.checkpoint_id, draft.seq, put.attempt, layout, draft.hash)
        return None

    def _is_taken(self, put: PlannedCheckpoint, head: Head | None) -> bool:
        """Whether its id names another checkpoint; of those that are stored the database knows."""
        if head is not None and head.checkpoint_id == put.checkpoint_id:
            return head.attempt != put.attempt
        before = self._drafts.get((put.ns, put.checkpoint_id))
        if before is not None and (not put.ns or before.put.attempt != put.attempt):
            return True
        if not put.ns or head is None or put.parent_id == head.checkpoint_id:
            return False
        # Parallel calls of a subgraph come back to what is not the head any more.
        is_there = before is not None or self._stored_draft(put) is not None
        return is_there and self._is_followed(put)

    def _is_followed(self, put: PlannedCheckpoint) -> bool:
        """Whether something was made from a checkpoint, which may not change from then on."""
        parents = (d.put.parent_id for (ns, _), d in self._drafts.items() if ns == put.ns)
        if put.checkpoint_id in parents:
            return True
        query = Query(tenant=put.key[0], thread_id=put.key[1], ns=put.ns)
        while page := self._rows.list_checkpoints(query):
            for found in page:
                if put.checkpoint_id in (found.row.parent_id, found.row.checkpoint_id):
                    return found.row.parent_id == put.checkpoint_id
            query = replace(query, after=page[-1].row.seq)
        return False

    def _parent_hash(self, put: PlannedCheckpoint, head: Head | None) -> bytes | None:
        """Return the hash of a put's parent; `None` if nobody has ever seen that one."""
        if head is not None and head.checkpoint_id == put.parent_id:
            return head.hash
        before = self._drafts.get((put.ns, put.parent_id or ""))
        if before is not None:
            return before.hash
        found = self._rows.find_checkpoint(put.key, put.parent_id)
        if isinstance(found, FoundCheckpoint):
            return found.row.hash
        if put.seen is None:
            return None
        # A copy of what was loaded has the same parent, which may have been deleted.
        found = self._rows.find_checkpoint(put.key, put.seen.checkpoint_id)
        if isinstance(found, FoundCheckpoint) and found.row.parent_id == put.parent_id:
            return unpack_record(put.codec, found.row, Place(*put.key)).parent_hash
        return None

    def _come_again(self, draft: _Draft) -> None:
        """Look what a branch is made from, and whether it is there already."""
        put = draft.put
        if put.ns:
            # Of parallel calls of a subgraph, each may put its last checkpoint again.
            self._keep_writes(draft, is_head=False)
        if put.seen is not None and put.seen.checkpoint_id != put.parent_id:
            seen = self._rows.find_checkpoint(put.key, put.seen.checkpoint_id)
            if isinstance(seen, FoundCheckpoint) and seen.row.parent_id == put.parent_id:
                draft.base = self._base_of(put, seen.row)

    @staticmethod
    def _base_of(put: PlannedCheckpoint, copied: CheckpointRow) -> bytes | None:
        if copied.base is None:
            return None
        place = Place(*put.key)
        context = place.context_of_base(copied.checkpoint_id)
        base = put.codec.unseal(
            copied.base, context, where=place.of(f"the base of checkpoint {copied.checkpoint_id!r}")
        )
        return put.codec.seal(base, place.context_of_base(put.checkpoint_id))

    def _keep_writes(self, draft: _Draft, *, is_head: bool) -> None:
        """Keep the writes that the same checkpoint already had or carried."""
        put = draft.put
        before = self._drafts.get((put.ns, put.checkpoint_id)) or self._stored_draft(put)
        if before is None:
            return
        draft.calls, draft.was_there, draft.base = before.calls, before.was_there, before.base
        if is_head and before.put.parent_id == put.parent_id:
            draft.parent_hash = before.parent_hash
            draft.parent_writes, draft.superseded = before.parent_writes, before.superseded
        elif before.parent_writes is not None and before.put.parent_id is not None:
            # It is not the next one after its parent any more.
            parent = (put.ns, before.put.parent_id)
            if before.superseded:
                self._pending.setdefault(parent, [])[:0] = before.superseded
                return
            number, place, seq = self._before.number, Place(*put.key), self._next()
            data = inlined(
                self._rows,
                put.codec,
                number,
                place,
                before.put.parent_id,
                before.parent_writes,
                place.context_of_carried(before.seq, put.checkpoint_id),
                place.context_of_writes(before.put.parent_id, seq),
            )
            self._moved.append(WritesRow(number, *parent, seq, data))

    def _stored_draft(self, put: PlannedCheckpoint) -> _Draft | None:
        """Return what is stored of the same checkpoint of the same attempt."""
        found = self._rows.find_checkpoint(put.key, put.checkpoint_id)
        if not isinstance(found, FoundCheckpoint) or found.row.attempt != put.attempt:
            return None
        row = found.row
        record = unpack_record(put.codec, row, Place(*put.key))
        return _Draft(
            replace(put, parent_id=row.parent_id),
            row.seq,
            {},
            parent_hash=record.parent_hash,
            parent_writes=row.parent_writes,
            calls=record.calls,
            was_there=True,
            base=row.base,
        )

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
                layout[channel] = Held(version, stored, _digest(value, stored))
            elif channel in put.changed:
                layout[channel] = Held(version, None)
            elif (held := self._held(put, head, channel, version)) is not None:
                layout[channel] = held
            else:
                missing[channel] = version
        if missing:
            found = self._search(put, missing)
            if not put.kept.isdisjoint(missing.keys() - found.keys()):
                return None
            layout.update(found)
            layout.update({c: Held(v, None) for c, v in missing.items() if c not in found})
        return layout

    def _store(
        self, put: PlannedCheckpoint, head: Head | None, channel: str, value: NewValue
    ) -> Stored | None:
        if isinstance(value, GrownList):
            return self._continue(put, head, channel, value)
        if isinstance(value, WholeList):
            series = self._next()
            self._put_block(put, series, 0, value.block, value.length)
            return (Part(series, value.length, is_open=True),)
        # An input is gone after one step, and stands best beside the writes that are made of it.
        if len(value) <= INLINE or (channel == START and not _is_large(put.codec, value)):
            return value
        series = self._next()
        self._put_block(put, series, 0, value, WHOLE)
        return (Part(series, WHOLE, is_open=False),)

    def _put_block(
        self, put: PlannedCheckpoint, series: int, start: int, block: bytes, length: int
    ) -> None:
        self._values.append(self._sealed(put, series, start, block))
        self._blocks[block] = (series, start, length)

    def _sealed(self, put: Planned, series: int, start: int, block: bytes) -> ValueRow:
        place, number = Place(*put.key), self._before.number
        sealed = seal_value(put.codec, self._rows, place, series, start, block)
        if sealed.object:
            self._tier = put.codec.tier
            self._objects.append(ObjectRow(number, series, start, sealed.object))
        return ValueRow(number, series, start, sealed.data)

    def _append(self, put: PlannedCheckpoint, last: Part, block: bytes, length: int) -> Part:
        """Put elements behind a series, and its last stretches together if they are many."""
        start, after = last.length, last.length + length
        appended = Part(last.series, after, is_open=True)
        tier = start // _TIER
        is_alone = not any(row.series == last.series for row in self._values)
        small = (
            self._rows.list_tail(self._before.number, last.series, tier * _TIER)
            if after // _TIER > tier and is_alone
            else []
        )
        # What is in an object is large enough.
        if len(small) <= 1 or any(is_apart(row.data) for row in small):
            self._put_block(put, last.series, start, block, length)
            return appended
        place = Place(*put.key)
        starts = [row.start for row in small]
        opened = (open_value(put.codec, place, row, place.of("a list")) for row in small)
        blocks = [*opened, block]
        lengths = [end - begin for begin, end in pairwise([*starts, start, after])]
        self._replaced.append(self._sealed(put, last.series, starts[0], joined(blocks, lengths)))
        self._dropped += [(row.series, row.start) for row in small[1:]]
        self._blocks[block] = (last.series, start, length)
        return appended

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
        # Only the newest checkpoint may go on in place: what follows an older one is a branch, and
        # the series may have gone on without it.
        may_append = head is not None and head.checkpoint_id == value.since
        if not may_append:
            parts = [part._replace(is_open=False) for part in parts]
        if sum(part.length for part in parts) != kept:
            return None
        if count == kept:
            return tuple(parts)
        if parts and parts[-1].is_open:
            parts.append(self._append(put, parts.pop(), block, count - kept))
        else:
            parts = [part._replace(is_open=False) for part in parts]
            series = self._next()
            self._put_block(put, series, 0, block, count - kept)
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
                return held._replace(stored=closed(held.stored))
        return None

    def _layout(self, put: PlannedCheckpoint, head: Head | None, source: str) -> Layout | None:
        if head is None:
            return None
        if head.checkpoint_id == source:
            return head.layout
        place = (put.ns, source)
        if source == put.checkpoint_id and place not in self._drafts and not put.was_sent:
            # Nothing has this id yet, but for one that was put by another attempt.
            return None
        if place in self._drafts:
            return self._drafts[place].layout
        if place not in self._layouts:
            found = self._rows.find_checkpoint((*put.key[:2], put.ns), source)
            self._layouts[place] = (
                unpack_record(put.codec, found.row, Place(*put.key)).layout
                if isinstance(found, FoundCheckpoint)
                else None
            )
        return self._layouts[place]

    def _search(self, put: PlannedCheckpoint, missing: Mapping[str, Any]) -> dict[str, Held]:
        """Find values by their versions anywhere in the namespace, the newest first.

        Only a caller that puts without ever having read the thread comes here.
        """
        found: dict[str, Held] = {}
        for layout in self._all_layouts(put) if self._heads[put.ns] is not None else ():
            if len(found) == len(missing):
                break
            for channel in missing.keys() - found.keys():
                held = layout.get(channel)
                if held is not None and held.version == missing[channel]:
                    found[channel] = held._replace(stored=closed(held.stored))
        return found

    def _all_layouts(self, put: PlannedCheckpoint) -> Iterator[Layout]:
        yield from (draft.layout for draft in reversed(self._drafts.values()))
        query = Query(tenant=put.key[0], thread_id=put.key[1], ns=put.ns)
        while page := self._rows.list_checkpoints(query):
            for found in page:
                yield unpack_record(put.codec, found.row, Place(*put.key)).layout
            query = replace(query, after=page[-1].row.seq)


def _digest(value: NewValue, stored: Stored) -> bytes | None:
    if isinstance(stored, bytes):
        return None
    if isinstance(value, GrownList):
        return value.growth.digest
    return value.digest if isinstance(value, WholeList) else digest_of(value)


def _is_large(codec: Codec, value: bytes) -> bool:
    """Whether a value may have to be in an object."""
    return codec.tier is not None and len(value) > codec.tier.offload_from


def _shared(written: Written, blocks: Mapping[bytes, tuple[int, int, int]]) -> Written:
    place = blocks.get(written) if isinstance(written, bytes) else None
    return written if place is None else list(place)


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
