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
from itertools import count
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

from agentflow.checkpoint.deltas import read_history
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.intake import Intake
from agentflow.checkpoint.loading import Listing, Reader
from agentflow.checkpoint.policy import Save, SavePolicy
from agentflow.checkpoint.records import column_text
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
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.errors import InvalidInputError
from agentflow.types import FencingToken, Lease

T = TypeVar("T")
_WIDTH = 12
"""Digits of a new thread's versions, which are compared as text."""
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
    ) -> None:
        """Save into `database`.

        Args:
            database: Where the rows go.
            codec: How values are stored.
            tenant: Part of every key.
            owns_database: Whether closing the saver closes the database.
            verify_deltas: Whether growing lists are compared as a whole at each checkpoint.
            save: When the state of a running graph is stored.
        """
        super().__init__()
        self._database = database
        self._owns_database = owns_database
        self._tenant = tenant
        self._verify_deltas = verify_deltas
        self._intake = Intake(database, SavePolicy(save))
        self._lease: Lease | None = None
        self._use(codec)

    def _use(self, codec: Codec) -> None:
        self._codec = codec
        self._encoder = Encoder(codec, self._intake.known, verify_deltas=self._verify_deltas)
        self._reader = Reader(self._encoder, self._intake.states)

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
        acquired = self._intake.verb(thread, lambda rows: acquire_thread(rows, thread, lease))
        return FencingToken(await self._database.settled(acquired))

    async def release(self, lease: Lease) -> None:
        """Give the thread back, if it is still held under the lease's token."""
        thread = self._thread_key(lease.thread_id)
        released = self._intake.verb(thread, lambda rows: release_thread(rows, thread, lease))
        await self._database.settled(released)
        self._intake.forget_lease(thread, lease)

    async def flush(self, thread_id: str) -> None:
        """Wait until everything accepted for the thread under this saver's lease is durable.

        Raises:
            AgentflowError: One of those operations failed; the first failure is raised.
        """
        thread = self._thread_key(thread_id)
        self._intake.store_held(self._encoder, thread)
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
        self._delete_thread(thread_id).result()

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete a thread; see `delete_thread`."""
        await self._database.settled(self._delete_thread(thread_id))

    def _delete_thread(self, thread_id: str) -> Future:
        thread = self._thread_key(thread_id)
        lease = self._lease
        future = self._intake.verb(thread, lambda rows: delete_thread(rows, thread, lease))

        def forget(done: Future) -> None:
            if done.exception() is None:
                self._intake.forget_thread(thread)

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
        await self._database.settled(self._delete_for_runs(run_ids))

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Future:
        tenant, encoder, lease = self._tenant, self._encoder, self._lease
        doomed = {column_text(run_id) for run_id in run_ids}
        return self._intake.verb(
            None, lambda rows: delete_runs(rows, encoder, tenant, doomed, lease)
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
        await self._database.settled(self._copy_thread(source_thread_id, target_thread_id))

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Future:
        source, target = self._thread_key(source_thread_id), self._thread_key(target_thread_id)
        lease = self._lease
        calls = count()

        def run(rows: Rows) -> Any:
            return copy_thread(rows, source, target, lease, is_again=next(calls) > 0)

        return self._intake.verb(target, run)

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
        await self._database.settled(self._prune(thread_ids, strategy))

    def _prune(self, thread_ids: Sequence[str], strategy: str) -> Future:
        if strategy not in get_args(PruneStrategy):
            raise InvalidInputError("strategy", (f"must be one of {get_args(PruneStrategy)}",))
        threads = [self._thread_key(thread_id) for thread_id in dict.fromkeys(thread_ids)]
        chosen = cast("PruneStrategy", strategy)
        encoder, lease = self._encoder, self._lease
        return self._intake.verb(
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
        return self._database.query_now(self._history(key, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect the writes of delta channels; see `get_delta_channel_history`."""
        key = self._head_key(config)
        await self._await(key[:2])
        return await self._database.query(self._history(key, config, channels))

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
        return self._continued(key, self._database.query_now(load))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Load a checkpoint; see `get_tuple`."""
        key, load = self._load(config)
        await self._await(key[:2])
        return self._continued(key, await self._database.query(load))

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
        if listing.thread_id is not None:
            self._wait_for(self._thread_key(listing.thread_id))
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
        if listing.thread_id is not None:
            await self._await(self._thread_key(listing.thread_id))
        while not listing.is_done:
            for item in await self._database.query(on_rows(listing.read)):
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
        width = _WIDTH if current is None else len(current.partition(".")[0])
        return f"{number + 1:0{width}}.{random.getrandbits(32):08x}"

    def close(self) -> None:
        """Make everything accepted durable and close what this saver opened."""
        self._intake.store_held(self._encoder)
        if self._owns_database:
            self._database.close()

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
        if not together.isascii() or "\x00" in together or len(together) > MAX_ID:
            check_ids(thread_id=thread_id, checkpoint_ns=ns, checkpoint_id=checkpoint_id)
        return (self._tenant, thread_id, ns)

    def _wait_for(self, thread: ThreadKey) -> None:
        self._intake.store_held(self._encoder, thread)
        for pending in self._intake.pending(thread):
            pending.wait()

    async def _await(self, thread: ThreadKey) -> None:
        self._intake.store_held(self._encoder, thread)
        for pending in self._intake.pending(thread):
            await self._database.ended(pending)

    def _accept_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> Future:
        key = self._head_key(config)
        if not config["configurable"].get("checkpoint_id"):
            raise InvalidInputError("config", ("configurable.checkpoint_id: is missing",))
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

    def _load(
        self, config: RunnableConfig
    ) -> tuple[HeadKey, Callable[[Session], CheckpointTuple | None]]:
        key = self._head_key(config)
        checkpoint_id = config["configurable"].get("checkpoint_id") or None
        return key, on_rows(lambda rows: self._reader.load(rows, key, checkpoint_id))

    def _continued(self, key: HeadKey, found: CheckpointTuple | None) -> CheckpointTuple | None:
        if found is not None and self._lease is None:
            # Whoever goes on by hand from here is not the one who failed here before.
            self._intake.forget_failure(key, found.checkpoint["id"])
        return found


def check_ids(**texts: str) -> None:
    """Refuse ids that not every database can keep and index.

    Raises:
        InvalidInputError: Names them.
    """
    bad = []
    for name, text in texts.items():
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


def on_rows(function: Callable[[Rows], T]) -> Callable[[Session], T]:
    """Return `function` of the rows as a function of a session."""
    return lambda session: function(open_rows(session))
