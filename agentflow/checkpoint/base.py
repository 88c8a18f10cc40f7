"""The checkpointer: LangGraph's saver contract, durable, ordered and fenced.

A `Saver` accepts each call in the order in which it is made, and what it has accepted becomes
durable in that order. Sync and async methods wait on the same futures of the database's writer.
Copies made by `with_lease` and `with_allowlist` share everything but the lease and the codec.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import random
import threading
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self, TypeVar, cast, get_args

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from opentelemetry.trace import Span

from agentflow.checkpoint.batch import ThreadStates
from agentflow.checkpoint.deltas import read_history
from agentflow.checkpoint.encoding import Encoder, KnownLists, read_seen
from agentflow.checkpoint.loading import Listing, Reader
from agentflow.checkpoint.operations import Put, Verb
from agentflow.checkpoint.planning import Planned
from agentflow.checkpoint.rows import FoundCheckpoint, HeadKey, Rows, ThreadKey
from agentflow.checkpoint.sql import open_rows
from agentflow.checkpoint.verbs import (
    PruneStrategy,
    acquire_thread,
    copy_thread,
    delete_runs,
    delete_thread,
    prune_threads,
    release_thread,
)
from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.session import Session
from agentflow.errors import AgentflowError, InvalidInputError
from agentflow.telemetry import CHECKPOINT_BYTES, fail_span, start_checkpoint_span
from agentflow.types import FencingToken, Lease, new_id

T = TypeVar("T")
_Place = tuple[HeadKey, Lease | None, str | None]
"""Namespace, lease, and the invocation's load or else the checkpoint."""
_ROW_SIZE = 300
"""Bytes that a row needs beside its payload, roughly."""
_FAILED_LIMIT = 1000
"""How many failed invocations are remembered."""


class _Core:
    """What all copies of a saver share."""

    def __init__(self, database: Database, *, owns_database: bool, tenant: str) -> None:
        self.database = database
        self.owns_database = owns_database
        self.tenant = tenant
        self.instance = new_id()[-16:]
        self.states = ThreadStates()
        self.known = KnownLists()
        self.lock = threading.Lock()
        # The last operation on each checkpoint that is not durable yet, or has failed. What is
        # bound to a checkpoint, or follows from it, comes after it and fails with it.
        self.tails: dict[_Place, Future[Any]] = {}

    def end_tail(self, place: _Place, done: Future[Any]) -> None:
        """Drop an operation that succeeded; remember one that failed, for those that follow it."""
        has_failed = done.cancelled() or done.exception() is not None
        with self.lock:
            if self.tails.get(place) is not done:
                return
            if not has_failed:
                del self.tails[place]
            elif len(self.tails) > _FAILED_LIMIT:
                oldest = next((p for p, tail in self.tails.items() if tail.done()), place)
                del self.tails[oldest]

    def submit(self, thread: ThreadKey | None, function: Callable[[Rows], Any]) -> Future[Any]:
        """Run a verb with the writer; the states of what it changes are read again afterwards.

        Args:
            thread: The thread that it changes; `None` for several.
            function: The verb.
        """

        def run(rows: Rows) -> Any:
            self.states.forget(thread)
            return function(rows)

        return self.database.submit(Verb(run))

    def forget_thread(self, thread: ThreadKey) -> None:
        self.known.forget_thread(thread)
        with self.lock:
            for tail in [entry for entry in self.tails if entry[0][:2] == thread]:
                del self.tails[tail]


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
    ) -> None:
        """Save into `database`.

        Args:
            database: Where the rows go.
            codec: How values are stored.
            tenant: Part of every key.
            owns_database: Whether closing the saver closes the database.
            verify_deltas: Whether growing lists are compared as a whole at each checkpoint.
        """
        super().__init__()
        self._verify_deltas = verify_deltas
        self._lease: Lease | None = None
        self._core = _Core(database, owns_database=owns_database, tenant=tenant)
        self._use(codec)

    def _use(self, codec: Codec) -> None:
        self._codec = codec
        self._encoder = Encoder(codec, self._core.known, verify_deltas=self._verify_deltas)
        self._reader = Reader(self._encoder, self._core.states)

    def with_lease(self, lease: Lease) -> Saver:
        """Return a copy whose writes are made under `lease`."""
        clone = copy.copy(self)
        clone._lease = lease
        return clone

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> Saver:
        """Return a copy that also allows the given classes, as `(module, name)`."""
        clone = copy.copy(self)
        extra = [f"{module}:{name}" for module, name, *_ in extra_allowlist]
        clone._use(self._codec.with_allowed(extra))
        return clone

    async def acquire(self, lease: Lease) -> FencingToken:
        """Take the lease's thread: only writes under its token are accepted from now on.

        Returns:
            The thread's token. If it is higher than the lease's, the thread was not taken; claim
            again with a token above it.
        """
        thread = self._thread_key(lease.thread_id)
        acquired = self._core.submit(thread, lambda rows: acquire_thread(rows, thread, lease))
        return FencingToken(await self._core.database.settled(acquired))

    async def release(self, lease: Lease) -> None:
        """Give the thread back, if it is still held under the lease's token."""
        thread = self._thread_key(lease.thread_id)
        released = self._core.submit(thread, lambda rows: release_thread(rows, thread, lease))
        await self._core.database.settled(released)
        with self._core.lock:
            for place in [p for p in self._core.tails if p[0][:2] == thread and p[1] == lease]:
                del self._core.tails[place]

    async def flush(self, thread_id: str) -> None:
        """Wait until everything accepted for the thread under this saver's lease is durable.

        Raises:
            AgentflowError: One of those operations failed; the first failure is raised.
        """
        thread = self._thread_key(thread_id)
        with self._core.lock:
            tails = self._core.tails.items()
            own = [future for place, future in tails if self._is_own(place, thread)]
        for future in own:
            await self._core.database.settled(future)

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
        await self._core.database.settled(future)
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
            await self._core.database.settled(accepted)

        return durable()

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread's checkpoints and writes in all namespaces.

        The thread's fencing token stays, so that a worker that was left behind stays locked out.

        Raises:
            FencedError: A run holds the thread.
        """
        self._delete_thread(thread_id).result()

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete a thread; see `delete_thread`."""
        await self._core.database.settled(self._delete_thread(thread_id))

    def _delete_thread(self, thread_id: str) -> Future[Any]:
        thread = self._thread_key(thread_id)
        lease = self._lease
        future = self._core.submit(thread, lambda rows: delete_thread(rows, thread, lease))

        def forget(done: Future[Any]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._core.forget_thread(thread)

        future.add_done_callback(forget)
        return future

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata has one of these run ids, with their writes.

        All of them are deleted, or none. What stays can be loaded and continued as before.

        Raises:
            FencedError: A run holds one of the threads.
        """
        self._delete_for_runs(run_ids).result()

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs; see `delete_for_runs`."""
        await self._core.database.settled(self._delete_for_runs(run_ids))

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Future[Any]:
        core, encoder, lease = self._core, self._encoder, self._lease
        doomed = {str(run_id) for run_id in run_ids}
        return core.submit(
            None, lambda rows: delete_runs(rows, encoder, core.tenant, doomed, lease)
        )

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
        await self._core.database.settled(self._copy_thread(source_thread_id, target_thread_id))

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Future[Any]:
        source, target = self._thread_key(source_thread_id), self._thread_key(target_thread_id)
        lease = self._lease
        return self._core.submit(target, lambda rows: copy_thread(rows, source, target, lease))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints of some threads; of all of them, or of none.

        Args:
            thread_ids: Unknown ones are passed over.
            strategy: `keep_latest` keeps the newest checkpoint of each namespace, with its writes;
                `delete` keeps nothing. Delta channels of what is kept keep their values.

        Raises:
            FencedError: A run holds one of the threads.
            InvalidInputError: The strategy is unknown.
        """
        self._prune(thread_ids, strategy).result()

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints; see `prune`."""
        await self._core.database.settled(self._prune(thread_ids, strategy))

    def _prune(self, thread_ids: Sequence[str], strategy: str) -> Future[Any]:
        if strategy not in get_args(PruneStrategy):
            raise InvalidInputError("strategy", (f"must be one of {get_args(PruneStrategy)}",))
        threads = [self._thread_key(thread_id) for thread_id in dict.fromkeys(thread_ids)]
        chosen = cast("PruneStrategy", strategy)
        encoder, lease = self._encoder, self._lease
        return self._core.submit(
            None, lambda rows: prune_threads(rows, encoder, threads, chosen, lease)
        )

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels back to their nearest stored values.

        The writes of the checkpoint that `config` names are not part of it.
        """
        key = self._head_key(config)
        self._wait_for(key[:2])
        return self._core.database.query_now(self._history(key, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels; see `get_delta_channel_history`."""
        key = self._head_key(config)
        await self._await(key[:2])
        return await self._core.database.query(self._history(key, config, channels))

    def _history(
        self, key: HeadKey, config: RunnableConfig, channels: Sequence[str]
    ) -> Callable[[Session], Mapping[str, DeltaChannelHistory]]:
        checkpoint_id = config["configurable"].get("checkpoint_id") or None

        def read(rows: Rows) -> Mapping[str, DeltaChannelHistory]:
            start = checkpoint_id
            if start is None:
                head = rows.find_checkpoint(key, None)
                start = head.row.checkpoint_id if isinstance(head, FoundCheckpoint) else ""
            return read_history(rows, self._encoder, key, start, channels)

        return on_rows(read)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Load a checkpoint: the one named by `checkpoint_id`, else the head of its namespace.

        Raises:
            HashMismatchError: What is stored is not what was saved.
            BlockedTypeError: It holds a class that may not be built here.
        """
        key, load = self._load(config)
        self._wait_for(key[:2])
        return self._continued(key, self._core.database.query_now(load))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Load a checkpoint; see `get_tuple`."""
        key, load = self._load(config)
        await self._await(key[:2])
        return self._continued(key, await self._core.database.query(load))

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
        listing = Listing(self._reader, self._core.tenant, config, filter, before, limit)
        if listing.thread_id is not None:
            self._wait_for(self._thread_key(listing.thread_id))
        while not listing.is_done:
            yield from self._core.database.query_now(on_rows(listing.read))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """List checkpoints, newest first; see `list`."""
        listing = Listing(self._reader, self._core.tenant, config, filter, before, limit)
        if listing.thread_id is not None:
            await self._await(self._thread_key(listing.thread_id))
        while not listing.is_done:
            for item in await self._core.database.query(on_rows(listing.read)):
                yield item

    def get_next_version(self, current: str | int | None, channel: None) -> str:
        """Return the version after `current`.

        Text with a random tail, so that two branches never share a version. Numbers that came from
        another saver are continued as numbers.
        """
        del channel
        if isinstance(current, int):
            return current + 1  # type: ignore[return-value]  # a thread keeps its kind of version
        number = 0 if current is None else int(current.partition(".")[0])
        return f"{number + 1:032}.{random.random():016}"  # noqa: S311 -- not a secret

    def close(self) -> None:
        """Make everything accepted durable and close what this saver opened."""
        if self._core.owns_database:
            self._core.database.close()

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
        return (self._core.tenant, thread_id)

    def _head_key(self, config: RunnableConfig) -> HeadKey:
        configurable = config.get("configurable", {})
        thread_id = configurable.get("thread_id")
        if thread_id is None or thread_id == "":
            raise InvalidInputError("config", ("configurable.thread_id: is missing",))
        return (*self._thread_key(str(thread_id)), configurable.get("checkpoint_ns") or "")

    def _is_own(self, place: _Place, thread: ThreadKey) -> bool:
        return place[0][:2] == thread and place[1] == self._lease

    def _wait_for(self, thread: ThreadKey) -> None:
        wait(self._pending(thread))

    async def _await(self, thread: ThreadKey) -> None:
        for tail in self._pending(thread):
            await asyncio.wait([asyncio.wrap_future(tail)])

    def _pending(self, thread: ThreadKey) -> builtins.list[Future[Any]]:
        with self._core.lock:
            tails = self._core.tails.items()
            return [
                future for (key, *_), future in tails if key[:2] == thread and not future.done()
            ]

    def _enqueue(
        self,
        key: HeadKey,
        config: RunnableConfig,
        checkpoint_id: str,
        make: Callable[[], tuple[Planned, int]],
    ) -> Future[Any]:
        """Queue an operation behind the last one of the same invocation in this namespace.

        An invocation that loaded something is known by its load, so that of two that race the
        loser's failure is not the winner's. One that found nothing is followed from checkpoint to
        checkpoint.
        """
        core = self._core
        seen = read_seen(config, key[2])
        after = seen.load_id if seen else config["configurable"].get("checkpoint_id") or None
        place: _Place = (key, self._lease, seen.load_id if seen else checkpoint_id)
        try:
            planned, size = make()
        except AgentflowError as exc:
            # Refused at the door; what follows must fail too, as if the database had refused.
            future: Future[Any] = Future()
            future.set_exception(exc)
            with core.lock:
                core.tails[place] = future
        else:
            operation = Put(planned, core.states, size=size)
            with core.lock:
                operation.previous = core.tails.get((key, self._lease, after))
                future = core.database.submit(operation)
                core.tails[place] = future
        future.add_done_callback(lambda done: core.end_tail(place, done))
        return future

    def _accept_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> Future[Any]:
        key = self._head_key(config)
        checkpoint_id = config["configurable"]["checkpoint_id"]

        def make() -> tuple[Planned, int]:
            planned = self._encoder.writes(key, self._lease, config, writes, task_id, task_path)
            return planned, len(planned.call) + _ROW_SIZE

        return self._enqueue(key, config, checkpoint_id, make)

    def _accept_checkpoint(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[RunnableConfig, Future[Any]]:
        key = self._head_key(config)
        span = start_checkpoint_span(
            thread_id=key[1], ns=key[2], checkpoint_id=checkpoint["id"], step=metadata.get("step")
        )

        def make() -> tuple[Planned, int]:
            attempt = str(self._lease.token) if self._lease else self._core.instance
            planned = self._encoder.checkpoint(
                key, self._lease, attempt, config, checkpoint, metadata, new_versions
            )
            span.set_attribute(CHECKPOINT_BYTES, planned.size)
            return planned, planned.size + _ROW_SIZE

        future = self._enqueue(key, config, checkpoint["id"], make)
        future.add_done_callback(lambda done: _end_span(span, done))
        configurable = {
            "thread_id": key[1],
            "checkpoint_ns": key[2],
            "checkpoint_id": checkpoint["id"],
        }
        return {"configurable": configurable}, future

    def _load(
        self, config: RunnableConfig
    ) -> tuple[HeadKey, Callable[[Session], CheckpointTuple | None]]:
        key = self._head_key(config)
        checkpoint_id = config["configurable"].get("checkpoint_id") or None
        return key, on_rows(lambda rows: self._reader.load(rows, key, checkpoint_id))

    def _continued(self, key: HeadKey, found: CheckpointTuple | None) -> CheckpointTuple | None:
        if found is not None and self._lease is None:
            # Whoever goes on by hand from here is not the one who failed here before.
            with self._core.lock:
                place: _Place = (key, None, found.checkpoint["id"])
                if place in self._core.tails and self._core.tails[place].done():
                    del self._core.tails[place]
        return found


def on_rows(function: Callable[[Rows], T]) -> Callable[[Session], T]:
    """Return `function` of the rows as a function of a session."""
    return lambda session: function(open_rows(session))


def _end_span(span: Span, done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        fail_span(span, type(error).__name__)
    span.end()
