"""Deciding what becomes of puts: who may write a thread, and what may follow its head.

A `ThreadPlan` takes the puts of one thread in order, refuses those that must not be, and collects
what the others change; where their values go is for `placement` to say. It starts from a known
state of the thread; the backend applies the change only if that state still holds, so nothing that
is decided here can be overtaken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from agentflow.checkpoint.fencing import fence
from agentflow.checkpoint.layout import Layout
from agentflow.checkpoint.pending import inlined
from agentflow.checkpoint.placement import Placement
from agentflow.checkpoint.puts import Planned, PlannedCheckpoint, PlannedWrites
from agentflow.checkpoint.records import (
    Call,
    Place,
    Written,
    hash_of,
    pack_record,
    pack_writes,
    unpack_record,
    unpack_writes,
)
from agentflow.checkpoint.rows import (
    CheckpointRow,
    FoundCheckpoint,
    Head,
    Query,
    Rows,
    ThreadChange,
    ThreadState,
    WritesRow,
)
from agentflow.checkpoint.stamps import Seen
from agentflow.errors import ConflictError

_MAX_HEADS = 64
"""How many namespaces of a thread are remembered."""


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

    def chain(self) -> None:
        """Compute its hash, once all that it covers is known."""
        put = self.put
        covered = hash_of(put.codec, Place(*put.key), put, put.head, self.layout, self.parent_hash)
        self.hash = put.codec.hash(covered)

    def row(self, thread: int) -> CheckpointRow:
        """Return its row, sealed."""
        put = self.put
        row = CheckpointRow(
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
        self._next = count(state.seq + 1).__next__
        """Gives numbers of the thread, each to one thing."""
        self._heads = dict(state.heads)
        self._drafts: dict[tuple[str, str], _Draft] = {}
        self._pending: dict[tuple[str, str], list[PlannedWrites]] = {}
        self._moved: list[WritesRow] = []
        self._placement: Placement | None = None
        """Of values, once there are any."""

    def add(self, put: Planned) -> Exception | None:
        """Take a put into the plan, or say why it is refused."""
        refused = fence(put.key[1], put.lease, self._before)
        if refused is not None:
            return refused
        if isinstance(put, PlannedWrites):
            self._pending.setdefault((put.key[2], put.checkpoint_id), []).append(put)
            return None
        if put.was_sent and (stored := self._written(put)) is not None:
            self._drop_carried(put, stored)
            return None
        if not self._may_follow(put):
            return conflict(put.key[1])
        return self._advance(put)

    def change(self) -> ThreadChange | None:
        """End the plan; return what it changes, if it changes anything."""
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
        # The number that is taken here goes to nothing: the plan is over.
        before, placed, last = self._before, self._placement, self._next() - 1
        after = ThreadState(number, before.token, before.is_leased, last, heads)
        if placed is None:
            return ThreadChange(before, after, writes=writes)
        return ThreadChange(
            before,
            after,
            [draft.row(number) for draft in self._drafts.values() if not draft.was_there],
            [draft.row(number) for draft in self._drafts.values() if draft.was_there],
            placed.values,
            placed.replaced,
            placed.dropped,
            writes,
            objects=placed.objects,
            confirm=placed.confirm if placed.objects else None,
        )

    def _placing(self) -> Placement:
        if self._placement is None:
            self._placement = Placement(self._rows, self._before.number, self._next)
        return self._placement

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
        known, set_apart = blocks or {}, self._placing().set_apart
        calls: list[Call] = []
        for put in puts:
            task_id, path, items = put.call
            written = [
                (index, channel, set_apart(put, _shared(value, known)))
                for index, channel, value in items
            ]
            calls.append((task_id, path, written))
        return calls

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
        if put.parent_id is None:
            return True
        if self._placing().layout_of(put, head, put.parent_id) is not None:
            return True
        # A copy of what was loaded has the same parent, which may have been pruned.
        found = self._rows.find_checkpoint(put.key, seen.checkpoint_id)
        return isinstance(found, FoundCheckpoint) and found.row.parent_id == put.parent_id

    def _written(self, put: PlannedCheckpoint) -> CheckpointRow | None:
        """Return what is stored of this very put, which has come again, if it is stored."""
        found = self._rows.find_checkpoint(put.key, put.checkpoint_id)
        if not isinstance(found, FoundCheckpoint) or found.row.attempt != put.attempt:
            return None
        stored = unpack_record(put.codec, found.row, Place(*put.key))
        is_same = [stored.body, stored.metadata] == put.codec.deserialize(put.head)
        return found.row if is_same else None

    def _drop_carried(self, put: PlannedCheckpoint, stored: CheckpointRow) -> None:
        """Drop the writes that came again with a put which carries them since it was stored."""
        parent = (put.ns, put.parent_id or "")
        pending = self._pending.pop(parent, [])
        if pending and stored.parent_writes is not None:
            place = Place(*put.key)
            calls = unpack_writes(
                put.codec,
                stored.parent_writes,
                place.of(f"the writes before checkpoint {put.checkpoint_id!r}"),
                place.context_of_carried(stored.seq, put.checkpoint_id),
            )
            carried = [_places_of(call) for call in calls]
            pending = [each for each in pending if _places_of(each.call) not in carried]
        if pending:
            self._pending[parent] = pending

    def _advance(self, put: PlannedCheckpoint) -> Exception | None:
        head = self._heads[put.ns]
        if self._is_taken(put, head):
            return conflict(put.key[1])
        placement = self._placing()
        layout = placement.lay_out(put, head)
        if layout is None:
            return conflict(put.key[1])
        is_again = head is not None and head.checkpoint_id == put.checkpoint_id
        seq = self._next()
        follows = head is not None and not is_again and head.checkpoint_id == put.parent_id
        superseded = self._pending.pop((put.ns, put.parent_id or ""), None) if follows else None
        draft = _Draft(put, head.seq if is_again and head is not None else seq, layout)
        if superseded:
            draft.superseded = superseded
            context = Place(*put.key).context_of_carried(draft.seq, put.checkpoint_id)
            draft.parent_writes = self._pack(superseded, context, placement.blocks)
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


def _places_of(call: Call) -> tuple[str, str, list[tuple[int, str]]]:
    """Return what a call has written, but for the values."""
    task_id, path, items = call
    return task_id, path, [(index, channel) for index, channel, _ in items]


def _shared(written: Written, blocks: Mapping[bytes, tuple[int, int, int]]) -> Written:
    place = blocks.get(written) if isinstance(written, bytes) else None
    return written if place is None else list(place)
