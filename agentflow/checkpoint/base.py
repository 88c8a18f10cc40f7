"""The checkpointer: LangGraph's saver contract, durable, ordered and fenced.

A `Saver` accepts each call in the order in which it is made, and what it has accepted becomes
durable in that order. Sync and async methods wait on the same futures of the database's writer.
Copies made by `with_lease` and `with_allowlist` share everything but the lease and the codec.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from sqlalchemy.engine import Connection

from agentflow.checkpoint.deltas import read_history
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.ids import check_ids, check_places, head_key, thread_key
from agentflow.checkpoint.intake import Intake
from agentflow.checkpoint.key_check import check_keys
from agentflow.checkpoint.loading import Listing, Reader
from agentflow.checkpoint.maintenance import MaintenanceVerbs
from agentflow.checkpoint.policy import Save, SavePolicy
from agentflow.checkpoint.recent import NotNotedError, RecentRead, Writes
from agentflow.checkpoint.retention import Retention
from agentflow.checkpoint.retraction import Retraction, retract
from agentflow.checkpoint.rows import (
    FoundCheckpoint,
    Head,
    HeadKey,
    Rows,
    ThreadKey,
    ThreadState,
)
from agentflow.checkpoint.runner import StepRunner
from agentflow.checkpoint.sql import on_rows, on_snapshot, open_rows
from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.errors import InvalidInputError
from agentflow.keys import KeyRing
from agentflow.types import FencingToken, Lease, TakenThread


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of a thread that was taken by a claim."""

    state: ThreadState
    recent: RecentRead | None


_WIDTH = 12
"""Digits of a new thread's versions, which are compared as text."""


class Saver(MaintenanceVerbs, BaseCheckpointSaver[str]):
    """A LangGraph checkpointer on agentflow's storage; made by `open_checkpointer`.

    Every checkpoint and every write is durable when the call that saved it returns. The calls for
    one thread become durable in the order in which they were made; if one fails, so does every
    later one of that invocation. A thread has one head for each namespace, which moves only from
    where the caller saw it: of two racing invocations one gets `ConflictError`. While a run holds a
    thread's lease, only that run may write it: others get `FencedError`.

    The synchronous methods order what they have been given. LangGraph's synchronous loop calls them
    from a pool of threads, so a call that the pool has not started yet is not ordered; use the
    asynchronous API where the order of writes within a superstep matters.
    """

    def __init__(
        self,
        database: Database,
        *,
        codec: Codec,
        tenant: str = "",
        owns_database: bool = False,
        verify_deltas: bool = False,
        save: Save = "every_step",
        retention: Retention | None = None,
    ) -> None:
        """Save into `database`.

        Args:
            database: Where the rows go.
            codec: How values are stored.
            tenant: Part of every key.
            owns_database: Whether closing the saver closes the database.
            verify_deltas: Whether growing lists are compared as a whole at each checkpoint.
            save: When the state of a running graph is stored.
            retention: What `sweep` keeps, unless it is told otherwise.

        Raises:
            InvalidInputError: The tenant's name cannot be stored, or `save` is unknown.
        """
        super().__init__()
        check_ids(tenant=tenant)
        self._database = database
        self._owns_database = owns_database
        self._tenant = tenant
        self._verify_deltas = verify_deltas
        self.retention = retention
        self._intake = Intake(database, SavePolicy(save))
        self._runner = StepRunner(database, self._intake)
        self._lease: Lease | None = None
        self._check: Callable[[], None] | None = None
        self._is_input_followed = False
        self._recent: RecentRead | None = None
        """What was read last under the lease."""
        self._use(codec)
        if codec.keys is not None:
            database.guard(partial(check_keys, codec))

    def _use(self, codec: Codec) -> None:
        self._codec = codec
        self._encoder = Encoder(
            codec,
            self._intake.known,
            verify_deltas=self._verify_deltas,
            is_marked=self._intake.is_marked,
        )
        self._reader = Reader(self._encoder, self._intake.observe)

    @property
    def keys(self) -> KeyRing | None:
        """The keys, if what is saved is encrypted."""
        return self._codec.keys

    def with_lease(
        self,
        lease: Lease,
        *,
        check: Callable[[], None] | None = None,
        taken: TakenThread | None = None,
        is_input_followed: bool = False,
    ) -> Saver:
        """Return a copy whose writes are made under `lease`.

        Args:
            lease: What the database compares with the thread's.
            check: Called before anything is accepted; raises what the caller of a put is to get.
            taken: What `take_within` found, if the thread was taken that way.
            is_input_followed: Whether `aput` returns at once with a checkpoint of an input, for
                which LangGraph waits only before the one that follows: it is durable no later than
                that. What goes wrong with it goes wrong with that, too.
        """
        clone = copy.copy(self)
        clone._lease, clone._check = lease, check
        clone._is_input_followed = is_input_followed
        clone._recent = taken.kept.recent if taken and isinstance(taken.kept, _Kept) else None
        return clone

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> Saver:
        """Return a copy that also allows the given classes, as `(module, name)`."""
        clone = copy.copy(self)
        extra = [f"{module}:{name}" for module, name, *_ in extra_allowlist]
        clone._use(self._codec.with_allowed(extra))
        return clone

    def for_tenant(self, tenant: str) -> Saver:
        """Return a copy that keeps the threads of another tenant."""
        check_ids(tenant=tenant)
        clone = copy.copy(self)
        clone._tenant = tenant
        return clone

    def readable_anywhere(self) -> Saver:
        """Return a copy that loads classes not known here as typed plain data, to look at them."""
        clone = copy.copy(self)
        clone._use(self._codec.readable_anywhere())
        return clone

    async def acquire(self, lease: Lease) -> FencingToken:
        """Take the lease's thread: only writes under its token are accepted from now on.

        Returns:
            The thread's token. If it is higher than the lease's, the thread was not taken; claim
            again with a token above it.
        """
        thread = thread_key(self._tenant, lease.thread_id)
        self._intake.store_held(thread)
        taken = self._intake.set_lease(thread, lease.token, is_leased=True)
        state: ThreadState = await self._database.settled(taken)
        self._observe_held(thread, state)
        return FencingToken(state.token)

    def _observe_held(self, thread: ThreadKey, state: ThreadState) -> None:
        # Whoever takes it is about to read it and to write it.
        heads: dict[str, Head | None] = {} if state.seq else {"": None}
        self._intake.observe(thread, replace(state, heads=heads))

    def take_within(self, connection: Connection, lease: Lease, *, is_read: bool) -> TakenThread:
        """Take a thread as `acquire` does, in the open transaction of a claim on this database.

        A thread that has seen a higher token than the lease's is taken under a higher one still.
        To be called by the database's writer; who drives the run calls `observe_taken`.

        Args:
            connection: The transaction's.
            lease: The lease that is being made.
            is_read: Whether the head is read as well, for who is about to go on from there.
        """
        thread = thread_key(self._tenant, lease.thread_id)
        self._intake.states.forget(thread)
        session = Session.inside(connection)
        try:
            rows = open_rows(session)
            token = lease.token
            while (taken := _take(rows, thread, token, is_read=is_read))[0].token > token:
                token = FencingToken(taken[0].token + 1)
            state, head, writes = taken
        finally:
            session.close()
        recent = None if head is None else RecentRead.of_head((*thread, ""), head, writes)
        return TakenThread(
            token=token,
            is_new=not state.seq,
            checkpoint_id=None if recent is None else recent.checkpoint_id,
            kept=_Kept(state, recent),
        )

    def observe_taken(self, lease: Lease, taken: TakenThread) -> None:
        """Remember how a thread was found by the claim that takes it, durable or about to be.

        What is written later is compared with the thread in the database again.
        """
        assert isinstance(taken.kept, _Kept)
        thread = thread_key(self._tenant, lease.thread_id)
        self._observe_held(thread, taken.kept.state)

    async def release(self, lease: Lease) -> None:
        """Give the thread back, if it is still held under the lease's token."""
        thread = thread_key(self._tenant, lease.thread_id)
        self._intake.store_held(thread)
        released = self._intake.set_lease(thread, lease.token, is_leased=False)
        await self._database.settled(released)
        self._intake.forget_lease(thread, lease)

    async def flush(self, thread_id: str) -> None:
        """Wait until everything accepted for the thread under this saver's lease is durable.

        Raises:
            AgentflowError: One of those operations failed; the first failure is raised.
        """
        thread = thread_key(self._tenant, thread_id)
        self._intake.store_held(thread)
        for future in self._intake.accepted(thread, self._lease):
            await self._database.settled(future)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint as the head of its namespace.

        It is durable on return, with all earlier writes of this invocation to the thread; or
        nothing of it is. Putting the same id again from the same invocation replaces it.

        Raises:
            ConflictError: The head is not where this invocation saw it.
            FencedError: The thread is held under another lease.
            SerializationError: A value could not be loaded back.
        """
        saved, future = self._accept_checkpoint(config, checkpoint, metadata, new_versions)
        future.result()
        return saved

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint; see `put`."""
        is_followed = self._is_input_followed and metadata.get("source") == "input"
        saved, future = self._accept_checkpoint(
            config, checkpoint, metadata, new_versions, is_followed=is_followed
        )
        if not is_followed:
            await self._database.settled(future)
        return saved

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store the writes of one task, all or none.

        For each index the first ordinary write stands and the last special one (error, interrupt,
        resume) does.

        Raises:
            FencedError: The thread is held under another lease.
            SerializationError: A value could not be loaded back.
        """
        self._accept_writes(config, writes, task_id, task_path).result()

    def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> Coroutine[Any, Any, None]:
        """Store the writes of one task; see `put_writes`.

        Accepted by the call itself, before anything is awaited: LangGraph schedules the returned
        coroutine after other work, and may cancel it before it starts.
        """
        accepted = self._accept_writes(config, writes, task_id, task_path)

        async def durable() -> None:
            await self._database.settled(accepted)

        return durable()

    async def retract_answer(self, thread_id: str, wanted: Retraction) -> None:
        """Take an answer back: the task that asked is where it was before it got it.

        What it wrote, raised and asked since is gone; no other task is touched. Durable on return.

        Raises:
            FencedError: The thread is held under another lease.
            ConflictError: The superstep in which it was asked is over.
        """
        thread, lease, codec = thread_key(self._tenant, thread_id), self._lease, self._codec
        self._intake.store_held(thread)

        def run(rows: Rows) -> Any:
            return retract(rows, codec, thread, lease, wanted)

        await self._database.settled(self._intake.verb(thread, run))
        self._recent = None

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels back to their nearest stored values.

        The writes of the checkpoint that `config` names are not part of it.
        """
        key = head_key(self._tenant, config)
        self._wait_for(key[:2])
        return self._database.read_now(self._history(key, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels; see `get_delta_channel_history`."""
        key = head_key(self._tenant, config)
        await self._await(key[:2])
        return await self._database.read(self._history(key, config, channels))

    def _history(
        self, key: HeadKey, config: RunnableConfig, channels: Sequence[str]
    ) -> Callable[[Connection], Mapping[str, DeltaChannelHistory]]:
        checkpoint_id = config["configurable"].get("checkpoint_id") or None

        def read(rows: Rows) -> Mapping[str, DeltaChannelHistory]:
            start = checkpoint_id
            if start is None:
                head = rows.find_checkpoint(key, None)
                start = head.row.checkpoint_id if isinstance(head, FoundCheckpoint) else ""
            return read_history(rows, self._encoder, key, start, channels)

        # What is being pruned meanwhile would otherwise be missing from the value.
        return on_snapshot(read)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Load a checkpoint: the one named by `checkpoint_id`, else the head of its namespace.

        Raises:
            HashMismatchError: What is stored is not what was saved.
            BlockedTypeError: It holds a class that may not be built here.
        """
        key, checkpoint_id = self._place(config)
        self._wait_for(key[:2])
        is_known, found = self._remembered(key, checkpoint_id)
        if not is_known:
            found = self._database.query_now(self._load(key, checkpoint_id))
        if found is None:
            # Whoever begins a thread now would hear of a wrong key only when it is stored.
            self._database.prove_now()
        return self._continued(key, found)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Load a checkpoint; see `get_tuple`."""
        key, checkpoint_id = self._place(config)
        await self._await(key[:2])
        is_known, found = self._remembered(key, checkpoint_id)
        if not is_known:
            found = await self._database.query(self._load(key, checkpoint_id))
        if found is None:
            await self._database.prove()
        return self._continued(key, found)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """List checkpoints, newest first.

        Args:
            config: Narrows to a thread, a namespace and an id, as far as it names them; `None`
                lists all threads.
            filter: Metadata keys and the values that they must equal.
            before: List only what is older than this checkpoint.
            limit: At most this many.

        The rows are read in pages; nothing is locked while the caller pauses between two of them.
        """
        check_places(config, before)
        listing = Listing(self._reader, self._tenant, config, filter, before, limit)
        self._wait_for(thread_key(self._tenant, listing.thread_id) if listing.thread_id else None)
        while not listing.is_done:
            yield from self._database.query_now(on_rows(listing.read))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """List checkpoints, newest first; see `list`."""
        check_places(config, before)
        listing = Listing(self._reader, self._tenant, config, filter, before, limit)
        await self._await(
            thread_key(self._tenant, listing.thread_id) if listing.thread_id else None
        )
        while not listing.is_done:
            for item in await self._database.query(on_rows(listing.read)):
                yield item

    def get_next_version(self, current: str | int | None, channel: None) -> str:
        """Return the version after `current`.

        Text with a random tail, so that two branches never share a version. Numbers that came from
        another saver are continued as numbers.

        Raises:
            InvalidInputError: `current` is no version of LangGraph's.
        """
        del channel
        if isinstance(current, int | float):
            return current + 1  # type: ignore[return-value]  # a thread keeps its kind of version
        digits = "0" * _WIDTH if current is None else current.partition(".")[0]
        if not digits.isdecimal():
            raise InvalidInputError("version", (f"{current!r}: begins with no number",))
        return f"{int(digits) + 1:0{len(digits)}}.{random.getrandbits(32):08x}"

    def close(self) -> None:
        """Make everything accepted durable and close what this saver opened.

        Raises:
            AgentflowError: What was held back under a sparse policy is refused now, as it would
                have been when it was put: `ConflictError` if somebody else was faster. The saver
                is closed all the same.
        """
        stored = self._intake.store_held()
        if self._owns_database:
            self._database.close()
        for future in stored:
            future.result()

    async def aclose(self) -> None:
        """Close without blocking the event loop; see `close`."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        """Return the saver, which connects on first use."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the saver."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return the saver, which connects on first use."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the saver."""
        await self.aclose()

    def _wait_for(self, thread: ThreadKey | None) -> None:
        for pending in self._intake.ahead_of(thread):
            pending.wait()

    async def _await(self, thread: ThreadKey | None) -> None:
        for pending in self._intake.ahead_of(thread):
            await self._database.ended(pending)

    def _accept_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: Any,
        task_path: Any,
    ) -> Future:
        if self._check is not None:
            self._check()
        key = head_key(self._tenant, config)
        if not config["configurable"].get("checkpoint_id"):
            raise InvalidInputError("config", ("configurable.checkpoint_id: is missing",))
        if not isinstance(task_id, str) or not isinstance(task_path, str):
            raise InvalidInputError("writes", ("task_id and task_path: must be text",))
        return self._intake.writes(
            self._encoder, key, self._lease, config, writes, task_id, task_path
        )

    def _accept_checkpoint(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
        *,
        is_followed: bool = False,
    ) -> tuple[RunnableConfig, Future]:
        if self._check is not None:
            self._check()
        key = head_key(self._tenant, config)
        check_ids(checkpoint_id=checkpoint["id"])
        future = self._intake.checkpoint(
            self._encoder,
            key,
            self._lease,
            config,
            checkpoint,
            metadata,
            new_versions,
            is_followed=is_followed,
        )
        configurable = {
            "thread_id": key[1],
            "checkpoint_ns": key[2],
            "checkpoint_id": checkpoint["id"],
        }
        return {"configurable": configurable}, future

    def _place(self, config: RunnableConfig) -> tuple[HeadKey, str | None]:
        return head_key(self._tenant, config), config["configurable"].get("checkpoint_id") or None

    def _load(
        self, key: HeadKey, checkpoint_id: str | None
    ) -> Callable[[Session], CheckpointTuple | None]:
        def load(rows: Rows) -> CheckpointTuple | None:
            if self._lease is None:
                return self._reader.load(rows, key, checkpoint_id)
            read = RecentRead(rows)
            found = self._reader.load(read, key, checkpoint_id)
            if read.end():
                self._recent = read
            return found

        return on_rows(load)

    def _remembered(
        self, key: HeadKey, checkpoint_id: str | None
    ) -> tuple[bool, CheckpointTuple | None]:
        """Say whether a checkpoint of the thread that the lease holds is known, and return it.

        Nobody else can write the thread, and what this process writes changes the state that it
        remembers; so what was read in that state is still what stands there.
        """
        if self._lease is None:
            return False, None
        state = self._intake.states.held(key[:2], self._lease.token)
        if state is None:
            return False, None
        if state.seq == 0:
            return True, None
        recent = self._recent
        if recent is None or not recent.is_of(key, checkpoint_id, state):
            return False, None
        try:
            return True, self._reader.load(recent, key, checkpoint_id)
        except NotNotedError:
            return False, None

    def _continued(self, key: HeadKey, found: CheckpointTuple | None) -> CheckpointTuple | None:
        if found is not None and self._lease is None:
            # Whoever goes on by hand from here is not the one who failed here before.
            self._intake.forget_failure(key, found.checkpoint["id"])
        return found


def _take(
    rows: Rows, thread: ThreadKey, token: int, *, is_read: bool
) -> tuple[ThreadState, FoundCheckpoint | None, Writes]:
    if is_read:
        return rows.take_at_head(thread, token)
    state = rows.set_lease(thread, token, is_leased=True)
    assert state is not None  # only one that is given back may have none
    return state, None, {}
