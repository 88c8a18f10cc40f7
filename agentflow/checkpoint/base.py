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
from dataclasses import replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Literal, Self, get_args

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

from agentflow.checkpoint.archive import Archived, archive, restore
from agentflow.checkpoint.audit import Audited, Scope, audit_group
from agentflow.checkpoint.collection import GRACE
from agentflow.checkpoint.deltas import read_history
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.intake import Intake
from agentflow.checkpoint.key_check import check_keys
from agentflow.checkpoint.loading import Listing, Reader
from agentflow.checkpoint.policy import Save, SavePolicy
from agentflow.checkpoint.pruning import Selection, check_leases, delete, prune
from agentflow.checkpoint.recent import RecentRead
from agentflow.checkpoint.records import column_text
from agentflow.checkpoint.retention import Chooser, Retention, SweepReport, sweep
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
from agentflow.checkpoint.steps import Ask, Read, Steps, Wait
from agentflow.checkpoint.verbs import copy_thread
from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.database.tables import EPOCH
from agentflow.errors import InvalidInputError
from agentflow.keys import KeyRing
from agentflow.objects import ObjectStore, open_objects
from agentflow.types import Clock, Duration, FencingToken, Lease, SystemClock

PruneStrategy = Literal["keep_latest", "delete"]
_WIDTH = 12
"""Digits of a new thread's versions, which are compared as text."""
_RUNS_AT_ONCE = 10_000
"""A statement may not name any number of them."""
MAX_ID = 1000
"""Bytes of the longest id or namespace; PostgreSQL's indexes take no more than two of these."""


class Saver(BaseCheckpointSaver[str]):
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

    def with_lease(self, lease: Lease, *, check: Callable[[], None] | None = None) -> Saver:
        """Return a copy whose writes are made under `lease`.

        Args:
            lease: What the database compares with the thread's.
            check: Called before anything is accepted; raises what the caller of a put is to get.
        """
        clone = copy.copy(self)
        clone._lease, clone._check = lease, check
        clone._recent = None
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

    async def verify(
        self,
        *,
        tenant: str | None = None,
        thread_id: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Audited]:
        """Verify all that is stored, of all tenants; yields what has come of each few threads.

        Every row, hash, chain and value is read and compared, and nothing is changed. Each thread
        is seen as it is at one moment.

        Args:
            tenant: Narrows to a tenant.
            thread_id: Narrows to threads of this id.
            advance: Told of numbers of checkpoints, from another thread, as they are verified.
        """
        scope = Scope(tenant=tenant, thread_id=thread_id)
        after: int | None = 0
        while after is not None:
            run = partial(
                audit_group, codec=self._codec, scope=scope, after=after, advance=advance or _ignore
            )
            audited = await self._database.read(on_snapshot(run))
            yield audited
            after = audited.after

    async def count(self, *, tenant: str | None = None, thread_id: str | None = None) -> int:
        """Count the checkpoints of all tenants, or as narrowed."""
        return await self._database.query(
            on_rows(lambda rows: rows.count_checkpoints(tenant, thread_id))
        )

    async def count_by_namespace(self, thread_id: str) -> dict[str, int]:
        """Count the checkpoints of a thread; there is nothing for one that is unknown."""
        thread = self._thread_key(thread_id)
        return await self._database.query(on_rows(lambda rows: rows.count_by_namespace(thread)))

    async def acquire(self, lease: Lease) -> FencingToken:
        """Take the lease's thread: only writes under its token are accepted from now on.

        Returns:
            The thread's token. If it is higher than the lease's, the thread was not taken; claim
            again with a token above it.
        """
        thread = self._thread_key(lease.thread_id)
        self._intake.store_held(thread)
        taken = self._intake.set_lease(thread, lease.token, is_leased=True)
        state: ThreadState = await self._database.settled(taken)
        # Whoever takes it is about to read it and to write it.
        heads: dict[str, Head | None] = {} if state.seq else {"": None}
        self._intake.observe(thread, replace(state, heads=heads))
        return FencingToken(state.token)

    async def release(self, lease: Lease) -> None:
        """Give the thread back, if it is still held under the lease's token."""
        thread = self._thread_key(lease.thread_id)
        self._intake.store_held(thread)
        released = self._intake.set_lease(thread, lease.token, is_leased=False)
        await self._database.settled(released)
        self._intake.forget_lease(thread, lease)

    async def begin_epoch(self) -> None:
        """Raise the tokens of all threads, of all tenants, above any that was given before.

        For a database that was put back from a backup: who holds a lease from before cannot write.
        """

        def raise_tokens(connection: Connection) -> None:
            open_rows(Session.inside(connection)).raise_tokens(EPOCH)

        await self._database.write(raise_tokens)

    async def flush(self, thread_id: str) -> None:
        """Wait until everything accepted for the thread under this saver's lease is durable.

        Raises:
            AgentflowError: One of those operations failed; the first failure is raised.
        """
        thread = self._thread_key(thread_id)
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
        saved, future = self._accept_checkpoint(config, checkpoint, metadata, new_versions)
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

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread's checkpoints and writes in all namespaces.

        The thread's fencing token stays, so that a worker that was left behind stays locked out.

        Raises:
            FencedError: A run holds the thread.
        """
        self._runner.run(self._delete_thread(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete a thread; see `delete_thread`."""
        await self._runner.arun(self._delete_thread(thread_id))

    def _delete_thread(self, thread_id: str) -> Steps[None]:
        thread = self._thread_key(thread_id)

        def steps() -> Steps[None]:
            yield from delete(thread, self._lease, lambda: self._intake.forget_thread(thread))

        return steps()

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata has one of these run ids, with their writes.

        They go in batches, each of which leaves the threads whole: what stays can be loaded and
        continued as before at any moment. If the call is interrupted, another one goes on with it.

        Raises:
            FencedError: A run holds one of the threads. If it held it from the beginning, nothing
                is deleted.
        """
        self._runner.run(self._delete_for_runs(run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs; see `delete_for_runs`."""
        await self._runner.arun(self._delete_for_runs(run_ids))

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Steps[None]:
        yield Wait(self._pending(None))
        doomed = sorted({column_text(run_id) for run_id in run_ids})
        found: list[tuple[Selection, Sequence[ThreadKey]]] = []
        for begin in range(0, len(doomed), _RUNS_AT_ONCE):
            some = frozenset(doomed[begin : begin + _RUNS_AT_ONCE])
            threads = yield Read(partial(_threads_of_runs, self._tenant, some))
            yield from check_leases(threads, self._lease)
            found.append((Selection(run_ids=some), threads))
        for selection, threads in found:
            for thread in threads:
                yield from prune(self._encoder, thread, selection, self._lease)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread with all its checkpoints, their ids and their writes.

        Nothing happens if the source does not exist.

        Raises:
            ConflictError: The target has checkpoints.
            FencedError: A run holds the target.
        """
        self._copy_thread(source_thread_id, target_thread_id).result()

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread; see `copy_thread`."""
        await self._database.settled(self._copy_thread(source_thread_id, target_thread_id))

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Future:
        source, target = self._thread_key(source_thread_id), self._thread_key(target_thread_id)
        lease, codec = self._lease, self._codec
        self._intake.store_held(source)
        calls = count()

        def run(rows: Rows) -> Any:
            return copy_thread(rows, codec, source, target, lease, is_again=next(calls) > 0)

        return self._intake.verb(target, run)

    async def retract_answer(self, thread_id: str, wanted: Retraction) -> None:
        """Take an answer back: the task that asked is where it was before it got it.

        What it wrote, raised and asked since is gone; no other task is touched. Durable on return.

        Raises:
            FencedError: The thread is held under another lease.
            ConflictError: The superstep in which it was asked is over.
        """
        thread, lease, codec = self._thread_key(thread_id), self._lease, self._codec
        self._intake.store_held(thread)

        def run(rows: Rows) -> Any:
            return retract(rows, codec, thread, lease, wanted)

        await self._database.settled(self._intake.verb(thread, run))
        self._recent = None

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints of some threads.

        They go in batches, each of which leaves its thread whole: what is there can be loaded and
        continued at any moment, graphs may run meanwhile, and what they put is kept. If the call is
        interrupted, another one goes on with it. A thread that is deleted is gone at once.

        Args:
            thread_ids: Unknown ones are passed over.
            strategy: `keep_latest` keeps the newest checkpoint of each namespace, with its writes;
                `delete` keeps nothing. Delta channels of what is kept keep their values.

        Raises:
            FencedError: A run holds one of the threads. If it held it from the beginning, nothing
                is deleted.
            InvalidInputError: The strategy is unknown.
        """
        self._runner.run(self._prune(thread_ids, strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints; see `prune`."""
        await self._runner.arun(self._prune(thread_ids, strategy))

    def _prune(self, thread_ids: Sequence[str], strategy: str) -> Steps[None]:
        if strategy not in get_args(PruneStrategy):
            raise InvalidInputError("strategy", (f"must be one of {get_args(PruneStrategy)}",))
        given = [self._thread_key(thread_id) for thread_id in dict.fromkeys(thread_ids)]
        for thread in given:
            yield Wait(self._pending(thread))
        threads = yield Read(
            lambda rows: [key for key in given if rows.find_checkpoint((*key, ""), None)]
        )
        yield from check_leases(threads, self._lease)
        for thread in threads:
            if strategy == "delete":
                yield from delete(thread, self._lease)
            else:
                yield from prune(self._encoder, thread, Selection(keep_last=1), self._lease)

    def sweep(
        self,
        retention: Retention | None = None,
        *,
        dry_run: bool = False,
        thread_ids: Sequence[str] | None = None,
        clock: Clock | None = None,
        grace: Duration = GRACE,
    ) -> SweepReport:
        """Delete what need not be kept any longer, of all threads of the tenant.

        Threads with work left, and those that runs hold, are let be. It goes in small batches while
        graphs run, and may be interrupted and called again at any time.

        Args:
            retention: What is kept; by default what the checkpointer was opened with.
            dry_run: Only say what would go.
            thread_ids: Sweep only these.
            clock: Tells the age of threads; the machine's by default.
            grace: How long objects of the object tier are kept to which nothing refers any more.
                They are looked at when all threads are.

        Raises:
            InvalidInputError: Nobody has said what is kept.
        """
        kept = self._kept(retention)

        def answer(asked: Ask) -> Mapping[str, Retention]:
            return dict.fromkeys(asked.thread_ids, kept)

        return self._runner.run(self._sweep(thread_ids, clock, grace, dry_run=dry_run), answer)

    async def asweep(
        self,
        retention: Retention | Chooser | None = None,
        *,
        dry_run: bool = False,
        thread_ids: Sequence[str] | None = None,
        clock: Clock | None = None,
        grace: Duration = GRACE,
    ) -> SweepReport:
        """Delete what need not be kept any longer; see `sweep`.

        Instead of one `Retention` for all, it takes a function that gets some thread ids and
        returns what is kept of each; those that it leaves out are let be. It is asked about a
        thread again before that is deleted as a whole.
        """
        chosen = retention if callable(retention) else self._kept(retention)

        async def answer(asked: Ask) -> Mapping[str, Retention]:
            if isinstance(chosen, Retention):
                return dict.fromkeys(asked.thread_ids, chosen)
            return await chosen(asked.thread_ids)

        return await self._runner.arun(
            self._sweep(thread_ids, clock, grace, dry_run=dry_run), answer
        )

    def _kept(self, retention: Retention | None) -> Retention:
        found = retention or self.retention
        if found is None:
            raise InvalidInputError("retention", ("is missing: give it here or when opening",))
        return found

    def _sweep(
        self,
        thread_ids: Sequence[str] | None,
        clock: Clock | None,
        grace: Duration,
        *,
        dry_run: bool,
    ) -> Steps[SweepReport]:
        for thread_id in thread_ids or ():
            check_ids(thread_id=thread_id)
        now = (clock or SystemClock()).now()
        return sweep(self._encoder, self._tenant, thread_ids, now, dry_run=dry_run, grace=grace)

    def archive(self, thread_id: str, *, to: str | ObjectStore, keep: bool = False) -> Archived:
        """Move a thread with all that it has into an object store.

        Rows are deleted once the archive is durable. Killed before, it leaves the thread as it is.

        Args:
            thread_id: The thread.
            to: The object store, or its URL: `file:///folder`.
            keep: Do not delete the thread.

        Raises:
            NotFoundError: There is no such thread.
            FencedError: A run holds it.
            ConflictError: It was written meanwhile; nothing was deleted.
            ObjectStoreError: The store could not be written; nothing was deleted.
        """
        return self._runner.run(self._archive(thread_id, to, keep=keep))

    async def aarchive(
        self, thread_id: str, *, to: str | ObjectStore, keep: bool = False
    ) -> Archived:
        """Move a thread into an object store; see `archive`."""
        return await self._runner.arun(self._archive(thread_id, to, keep=keep))

    def _archive(self, thread_id: str, to: str | ObjectStore, *, keep: bool) -> Steps[Archived]:
        thread, store = self._thread_key(thread_id), _opened(to)
        yield Wait(self._pending(thread))
        forget = partial(self._intake.forget_thread, thread)
        return (
            yield from archive(
                self._codec, thread, store, self._lease, keep=keep, on_deleted=forget
            )
        )

    def restore(
        self, thread_id: str, *, source: str | ObjectStore, archive_id: str | None = None
    ) -> Archived:
        """Make a thread from its archive, also in another database; the archive stays.

        It is there whole, in one commit, or not at all.

        Args:
            thread_id: The thread, which must not have anything.
            source: The object store, or its URL: `file:///folder`.
            archive_id: Which archive; by default the newest of the thread.

        Raises:
            NotFoundError: There is no such archive.
            ConflictError: The thread is there already.
            FencedError: A run holds the thread.
            HashMismatchError: The archive is damaged, or is another thread's.
            MissingBlobError: A part of it is not there.
            UnknownKeyError: It is encrypted by a key that is not here.
        """
        return self._runner.run(self._restore(thread_id, source, archive_id))

    async def arestore(
        self, thread_id: str, *, source: str | ObjectStore, archive_id: str | None = None
    ) -> Archived:
        """Make a thread from its archive; see `restore`."""
        return await self._runner.arun(self._restore(thread_id, source, archive_id))

    def _restore(
        self, thread_id: str, source: str | ObjectStore, archive_id: str | None
    ) -> Steps[Archived]:
        thread, store = self._thread_key(thread_id), _opened(source)
        return restore(self._codec, thread, store, self._lease, archive_id)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels back to their nearest stored values.

        The writes of the checkpoint that `config` names are not part of it.
        """
        key = self._head_key(config)
        self._wait_for(key[:2])
        return self._database.read_now(self._history(key, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels; see `get_delta_channel_history`."""
        key = self._head_key(config)
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
        _check_places(config, before)
        listing = Listing(self._reader, self._tenant, config, filter, before, limit)
        self._wait_for(self._thread_key(listing.thread_id) if listing.thread_id else None)
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
        _check_places(config, before)
        listing = Listing(self._reader, self._tenant, config, filter, before, limit)
        await self._await(self._thread_key(listing.thread_id) if listing.thread_id else None)
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

    def _thread_key(self, thread_id: str) -> ThreadKey:
        check_ids(thread_id=thread_id)
        return (self._tenant, thread_id)

    def _head_key(self, config: RunnableConfig) -> HeadKey:
        configurable = config.get("configurable", {})
        thread_id = configurable.get("thread_id")
        if thread_id is None or thread_id == "":
            raise InvalidInputError("config", ("configurable.thread_id: is missing",))
        thread_id, ns = str(thread_id), configurable.get("checkpoint_ns") or ""
        checkpoint_id = configurable.get("checkpoint_id") or ""
        together = f"{thread_id}{ns}{checkpoint_id}"
        is_text = isinstance(ns, str) and isinstance(checkpoint_id, str)
        if not is_text or not together.isascii() or "\x00" in together or len(together) > MAX_ID:
            check_ids(thread_id=thread_id, checkpoint_ns=ns, checkpoint_id=checkpoint_id)
        return (self._tenant, thread_id, ns)

    def _wait_for(self, thread: ThreadKey | None) -> None:
        for pending in self._pending(thread):
            pending.wait()

    async def _await(self, thread: ThreadKey | None) -> None:
        for pending in self._pending(thread):
            await self._database.ended(pending)

    def _pending(self, thread: ThreadKey | None) -> Sequence[Future]:
        """Return what a reader of a thread has to wait for; `None` stands for all threads."""
        stored = self._intake.store_held(thread)
        return self._intake.pending(thread) if thread is not None else stored

    def _accept_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: Any,
        task_path: Any,
    ) -> Future:
        if self._check is not None:
            self._check()
        key = self._head_key(config)
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
    ) -> tuple[RunnableConfig, Future]:
        if self._check is not None:
            self._check()
        key = self._head_key(config)
        check_ids(checkpoint_id=checkpoint["id"])
        future = self._intake.checkpoint(
            self._encoder, key, self._lease, config, checkpoint, metadata, new_versions
        )
        configurable = {
            "thread_id": key[1],
            "checkpoint_ns": key[2],
            "checkpoint_id": checkpoint["id"],
        }
        return {"configurable": configurable}, future

    def _place(self, config: RunnableConfig) -> tuple[HeadKey, str | None]:
        return self._head_key(config), config["configurable"].get("checkpoint_id") or None

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
        return True, self._reader.load(recent, key, checkpoint_id)

    def _continued(self, key: HeadKey, found: CheckpointTuple | None) -> CheckpointTuple | None:
        if found is not None and self._lease is None:
            # Whoever goes on by hand from here is not the one who failed here before.
            self._intake.forget_failure(key, found.checkpoint["id"])
        return found


def _opened(objects: str | ObjectStore) -> ObjectStore:
    return open_objects(objects) if isinstance(objects, str) else objects


def check_ids(**texts: Any) -> None:
    """Refuse ids that not every database can keep and index.

    Raises:
        InvalidInputError: Names them.
    """
    bad = []
    for name, text in texts.items():
        if not isinstance(text, str):
            bad.append(f"{name}: is no text")
            continue
        if text.isascii() and "\x00" not in text and len(text) <= MAX_ID:
            continue
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            bad.append(f"{name}: holds a lone surrogate; use plain text")
            continue
        if b"\x00" in encoded:
            bad.append(f"{name}: holds a NUL; use plain text")
        elif len(encoded) > MAX_ID:
            bad.append(f"{name}: is longer than {MAX_ID} bytes")
    if bad:
        raise InvalidInputError("config", tuple(bad))


def _check_places(*configs: RunnableConfig | None) -> None:
    for config in configs:
        named = (config or {}).get("configurable", {})
        names = ("thread_id", "checkpoint_ns", "checkpoint_id")
        check_ids(**{name: str(named[name]) for name in names if named.get(name)})


def _threads_of_runs(tenant: str, run_ids: Collection[str], rows: Rows) -> Sequence[ThreadKey]:
    return rows.list_threads_of_runs(tenant, run_ids)


def _ignore(_: int) -> None:
    """Tell nobody."""
