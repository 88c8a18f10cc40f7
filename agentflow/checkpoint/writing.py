"""Writing checkpoints to the tables, under the rules of one writer.

`PutCheckpoint`, `PutWrites` and the operations on leases are run by the database's writer, many at
a time, under a lock on the rows of their threads. Who may write is decided here, in the same
transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.checkpoint.reading import (
    Channels,
    Head,
    HeadKey,
    ThreadKey,
    in_namespace,
    load_channels,
    load_heads,
    pack_channels,
    unpack_channels,
)
from agentflow.database.statements import insert_new, replace
from agentflow.database.tables import checkpoints, heads, threads, writes
from agentflow.database.writer import Operation, Rejected
from agentflow.errors import ConflictError, FencedError
from agentflow.failpoints import failpoint
from agentflow.types import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an invocation saw when it loaded; it comes back with everything the invocation puts."""

    ns: str
    head_seq: int
    checkpoint_id: str
    load_id: str = field(compare=False)
    """Names the load, and with it the invocation; two loads of the same are equal otherwise."""


class _ThreadOperation(Operation):
    """An operation on one thread, ordered after the one before it."""

    def __init__(self, thread: ThreadKey, lease: Lease | None) -> None:
        super().__init__()
        self.thread = thread
        self.lease = lease
        self.previous: Future[Any] | None = None
        """The operation of the same thread before this one."""

    @property
    def token(self) -> int:
        """The fencing token that goes into the row; 0 without a lease."""
        return self.lease.token if self.lease else 0

    def failed_before(self) -> Exception | None:
        """Return why the operation before this one failed, if it did.

        A checkpoint without the writes that led to it would lose work, so one failure fails all
        that follows.
        """
        if self.previous is None or not self.previous.done() or self.previous.cancelled():
            return None
        error = self.previous.exception()
        return error if isinstance(error, Exception) else None


class CheckpointOperation(_ThreadOperation):
    """A put of a checkpoint, or of writes; both run in one batch, in order."""

    resendable = True

    @property
    def family(self) -> type[Operation]:
        """Puts of both kinds are decided together."""
        return CheckpointOperation

    @classmethod
    def run(cls, connection: Connection, operations: Sequence[CheckpointOperation]) -> list[Any]:
        """Write what may be written, in order, and say for each what became of it."""
        del cls
        return _Batch(connection, operations).run()


class PutWrites(CheckpointOperation):
    """Writes of one task, bound to a checkpoint; all of them become durable or none."""

    patient = True

    def __init__(
        self,
        thread: ThreadKey,
        lease: Lease | None,
        *,
        rows: list[dict[str, Any]],
    ) -> None:
        """Hold finished rows of the `writes` table, but for the token."""
        super().__init__(thread, lease)
        self.rows = rows
        self.size = sum(len(row["value"]) + 200 for row in rows)


class PutCheckpoint(CheckpointOperation):
    """One checkpoint, which becomes the head of its namespace."""

    def __init__(
        self,
        thread: ThreadKey,
        lease: Lease | None,
        *,
        row: dict[str, Any],
        channels: Channels,
        unresolved: Mapping[str, Any],
        read_versions: Callable[[bytes], Mapping[str, Any]],
        seen: Seen | None,
        is_invocation: bool,
    ) -> None:
        """Hold a row of the `checkpoints` table but for number and token.

        Args:
            thread: Tenant and thread id.
            lease: The lease under which it is written.
            row: The row's columns.
            channels: Values of changed channels, and where the others are held.
            unresolved: Unchanged channels whose holder is not known here, with their versions; the
                writer looks for them in the database.
            read_versions: Reads the channel versions out of a row's body.
            seen: What the invocation had loaded.
            is_invocation: Whether it comes from a running graph, not from a caller of the saver.
        """
        super().__init__(thread, lease)
        self.row = row
        self.was_sent = False
        """Whether it was part of a transaction before; its commit may have happened."""
        self.channels = channels
        self.unresolved = unresolved
        self.read_versions = read_versions
        self.seen = seen
        self.is_invocation = is_invocation
        inline = sum(len(value) for value in channels.values() if isinstance(value, bytes))
        self.size = inline + len(row["body"]) + len(row["metadata"]) + 400

    @property
    def head_key(self) -> HeadKey:
        """The namespace that it belongs to."""
        return (*self.thread, self.row["ns"])


@dataclass(slots=True)
class Thread:
    """Who may write a thread, and how far it is."""

    token: int
    is_leased: bool
    seq: int


@dataclass
class _Batch:
    """The state of one batch while it is decided and written."""

    connection: Connection
    operations: Sequence[CheckpointOperation]
    threads: dict[ThreadKey, Thread] = field(default_factory=dict)
    heads: dict[HeadKey, Head] = field(default_factory=dict)
    failed: dict[Future[Any], Exception] = field(default_factory=dict)
    pending: dict[tuple[HeadKey, str], PutCheckpoint] = field(default_factory=dict)
    """Puts that were accepted in this batch, by namespace and id."""

    def run(self) -> list[Any]:
        keys = sorted({operation.thread for operation in self.operations})
        self.threads = lock_threads(self.connection, keys)
        puts = [op for op in self.operations if isinstance(op, PutCheckpoint)]
        self.heads = load_heads(self.connection, {op.head_key for op in puts})
        outcomes = [self._decide(operation) for operation in self.operations]
        accepted = zip(self.operations, outcomes, strict=True)
        self._write([op for op, out in accepted if isinstance(op, PutWrites) and out is None])
        self._write_checkpoints(list(self.pending.values()))
        return outcomes

    def _decide(self, operation: CheckpointOperation) -> Any:
        error = self._refusal(operation)
        if error is not None:
            self.failed[operation.future] = error
            return Rejected(error)
        if isinstance(operation, PutCheckpoint) and not self._is_written(operation):
            self._advance(operation)
        return None

    def _refusal(self, operation: CheckpointOperation) -> Exception | None:
        earlier = operation.failed_before()
        if earlier is None and operation.previous is not None:
            earlier = self.failed.get(operation.previous)
        if earlier is not None:
            return earlier
        thread = self.threads[operation.thread]
        fenced = fence(operation.thread[1], operation.lease, thread)
        if fenced is not None:
            return fenced
        if (
            isinstance(operation, PutCheckpoint)
            and not self._may_follow(operation)
            and not self._is_written(operation)
        ):
            return ConflictError(
                f"thread {operation.thread[1]!r} has moved on since this invocation loaded it; "
                "load it again and repeat the call"
            )
        return None

    def _may_follow(self, put: PutCheckpoint) -> bool:
        head = self.heads.get(put.head_key)
        row = put.row
        if head is None:
            return True
        if row["parent_id"] == head.checkpoint_id:
            return True
        same_attempt = row["attempt"] == head.attempt
        if row["checkpoint_id"] == head.checkpoint_id and same_attempt:
            return True
        # Parallel calls of one subgraph share its namespace; the last put wins, as in LangGraph.
        if row["ns"] and same_attempt:
            return True
        seen = put.seen
        if seen is None:
            # A caller who puts by hand, without a parent, starts a new line on purpose. A graph
            # that found the thread empty has lost a race.
            return row["parent_id"] is None and not put.is_invocation
        return seen.ns == row["ns"] and seen.head_seq == head.seq

    def _is_written(self, put: PutCheckpoint) -> bool:
        """Whether this very put is stored: the reply to its commit was lost, and it came again."""
        if not put.was_sent:
            return False
        row = put.row
        query = sa.select(sa.literal(1)).where(
            *in_namespace(checkpoints, put.head_key),
            checkpoints.c.checkpoint_id == row["checkpoint_id"],
            checkpoints.c.attempt == row["attempt"],
            checkpoints.c.content_hash == row["content_hash"],
        )
        return self.connection.execute(query).first() is not None

    def _advance(self, put: PutCheckpoint) -> None:
        head = self.heads.get(put.head_key)
        row = put.row
        if head is not None and head.checkpoint_id == row["checkpoint_id"]:
            row["seq"] = head.seq
            self._merge_into(put)
        else:
            thread = self.threads[put.thread]
            thread.seq += 1
            row["seq"] = thread.seq
        self.heads[put.head_key] = Head(row["checkpoint_id"], row["seq"], row["attempt"])
        self.pending[(put.head_key, row["checkpoint_id"])] = put

    def _merge_into(self, put: PutCheckpoint) -> None:
        """Keep the values of the row that is put again, where the new put does not repeat them."""
        own_id = put.row["checkpoint_id"]
        earlier = self.pending.get((put.head_key, own_id))
        if earlier is not None:
            stored = earlier.channels
        else:
            stored = load_channels(self.connection, put.head_key, [own_id]).get(own_id, {})
        for channel, held in stored.items():
            if put.channels.get(channel) == own_id or channel in put.unresolved:
                put.channels[channel] = held
        put.unresolved = {c: v for c, v in put.unresolved.items() if c not in put.channels}

    def _write(self, operations: Sequence[PutWrites]) -> None:
        rows = [{**row, "token": op.token} for op in operations for row in op.rows]
        # Per row, not per call: of a task's ordinary writes the first stands, of the special ones
        # (error, interrupt, resume: negative index) the last.
        first = [row for row in rows if row["idx"] >= 0]
        last = [row for row in rows if row["idx"] < 0]
        if first:
            insert_new(self.connection, writes, first)
        if last:
            replace(self.connection, writes, last)

    def _write_checkpoints(self, puts: Sequence[PutCheckpoint]) -> None:
        if not puts:
            return
        for put in puts:
            put.was_sent = True
            if put.unresolved:
                put.channels.update(find_holders(self.connection, put))
        failpoint("checkpoint.before_insert")
        replace(
            self.connection,
            checkpoints,
            [
                {**put.row, "token": put.token, "channels": pack_channels(put.channels)}
                for put in puts
            ],
        )
        failpoint("checkpoint.after_insert")
        moved = {put.head_key: self.heads[put.head_key] for put in puts}
        replace(
            self.connection,
            heads,
            [
                {
                    "tenant": tenant,
                    "thread_id": thread_id,
                    "ns": ns,
                    "checkpoint_id": head.checkpoint_id,
                    "seq": head.seq,
                    "attempt": head.attempt,
                }
                for (tenant, thread_id, ns), head in moved.items()
            ],
        )
        self.connection.execute(
            _ADVANCE,
            [
                {"b_tenant": key[0], "b_thread": key[1], "b_seq": self.threads[key].seq}
                for key in sorted({put.thread for put in puts})
            ],
        )


_LOCK = (
    sa.select(threads)
    .where(
        sa.tuple_(threads.c.tenant, threads.c.thread_id).in_(sa.bindparam("keys", expanding=True))
    )
    .order_by(threads.c.tenant, threads.c.thread_id)
    .with_for_update()
)
_ADVANCE = (
    sa.update(threads)
    .where(threads.c.tenant == sa.bindparam("b_tenant"))
    .where(threads.c.thread_id == sa.bindparam("b_thread"))
    .values(seq=sa.bindparam("b_seq"))
)


def fence(thread_id: str, lease: Lease | None, state: Thread) -> FencedError | None:
    """Say why a write with this lease may not touch a thread in that state; `None` if it may."""
    if lease is None:
        return FencedError(thread_id, None, state.token) if state.is_leased else None
    if lease.thread_id != thread_id or lease.token != state.token or not state.is_leased:
        return FencedError(thread_id, lease.token, state.token)
    return None


def lock_threads(connection: Connection, keys: Sequence[ThreadKey]) -> dict[ThreadKey, Thread]:
    """Lock the rows of these threads, in sorted order, making those that do not exist yet."""
    found = _select_threads(connection, keys)
    missing = [key for key in keys if key not in found]
    if missing:
        insert_new(
            connection,
            threads,
            [
                {"tenant": tenant, "thread_id": thread_id, "token": 0, "is_leased": False, "seq": 0}
                for tenant, thread_id in missing
            ],
        )
        found |= _select_threads(connection, missing)
    return found


def _select_threads(connection: Connection, keys: Sequence[ThreadKey]) -> dict[ThreadKey, Thread]:
    rows = connection.execute(_LOCK, {"keys": keys})
    return {
        (tenant, thread_id): Thread(token, is_leased, seq)
        for tenant, thread_id, token, is_leased, seq in rows
    }


def find_holders(connection: Connection, put: PutCheckpoint) -> Channels:
    """Find where channels are held that a put names without having loaded them.

    Only a caller that puts without ever having read the thread comes here. The newest checkpoint
    that has the channel at that version knows the holder.
    """
    holders: Channels = {}
    query = (
        sa.select(checkpoints.c.checkpoint_id, checkpoints.c.body, checkpoints.c.channels)
        .where(*in_namespace(checkpoints, put.head_key))
        .order_by(checkpoints.c.seq.desc())
    )
    for row in connection.execute(query):
        if len(holders) == len(put.unresolved):
            break
        stored = put.read_versions(row.body)
        channels = unpack_channels(row.channels)
        for channel, version in put.unresolved.items():
            if channel in holders or stored.get(channel) != version or channel not in channels:
                continue
            held = channels[channel]
            holders[channel] = row.checkpoint_id if isinstance(held, bytes) else held
    return holders


class AcquireThread(_ThreadOperation):
    """Take a thread for a lease: from now on only its token may write.

    The outcome is the thread's token: the lease's own if it was taken, a higher one if not.
    """

    resendable = True

    @classmethod
    def run(cls, connection: Connection, operations: Sequence[AcquireThread]) -> list[Any]:
        """Raise the token of each thread, if the lease's is not behind it."""
        outcomes = []
        for operation in operations:
            assert operation.lease is not None
            state = lock_threads(connection, [operation.thread])[operation.thread]
            token = operation.lease.token
            if token >= state.token:
                _set_thread(connection, operation.thread, token=token, is_leased=True)
            outcomes.append(max(token, state.token))
        return outcomes


class ReleaseThread(_ThreadOperation):
    """Give a thread back, so that calls without a lease may write it again."""

    resendable = True

    @classmethod
    def run(cls, connection: Connection, operations: Sequence[ReleaseThread]) -> list[Any]:
        """Release each thread that is still held under the given token."""
        for operation in operations:
            assert operation.lease is not None
            state = lock_threads(connection, [operation.thread])[operation.thread]
            if state.token == operation.lease.token:
                _set_thread(connection, operation.thread, token=state.token, is_leased=False)
        return [None] * len(operations)


class DeleteThread(_ThreadOperation):
    """Delete a thread's checkpoints and writes; its fencing token stays."""

    resendable = True

    @classmethod
    def run(cls, connection: Connection, operations: Sequence[DeleteThread]) -> list[Any]:
        """Delete each thread that may be written."""
        outcomes: list[Any] = []
        for operation in operations:
            state = lock_threads(connection, [operation.thread])[operation.thread]
            thread_id = operation.thread[1]
            refused = fence(thread_id, operation.lease, state)
            if refused is not None:
                outcomes.append(Rejected(refused))
                continue
            for table in (checkpoints, heads, writes):
                connection.execute(
                    sa.delete(table).where(
                        table.c.tenant == operation.thread[0], table.c.thread_id == thread_id
                    )
                )
            outcomes.append(None)
        return outcomes


def _set_thread(connection: Connection, key: ThreadKey, *, token: int, is_leased: bool) -> None:
    connection.execute(
        sa.update(threads)
        .where(threads.c.tenant == key[0], threads.c.thread_id == key[1])
        .values(token=token, is_leased=is_leased)
    )
