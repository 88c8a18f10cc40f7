"""What a saver was given and what has become of it; shared by all copies of the saver.

Puts enter the database's queue in the order in which they were made. One that follows another, of
the same invocation, fails if that one has failed. Under a sparse policy the newest checkpoint of an
invocation waits here until it is due, with the writes that belong to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from opentelemetry.trace import Span

from agentflow.checkpoint.batch import ThreadStates
from agentflow.checkpoint.encoding import Encoder, KnownLists
from agentflow.checkpoint.operations import Put, Verb
from agentflow.checkpoint.planning import Planned, PlannedCheckpoint, PlannedWrites, Seen
from agentflow.checkpoint.policy import SavePolicy
from agentflow.checkpoint.rows import HeadKey, Rows, ThreadKey
from agentflow.checkpoint.stamps import read_seen
from agentflow.database import Database
from agentflow.database.futures import Future
from agentflow.errors import AgentflowError
from agentflow.telemetry import CHECKPOINT_BYTES, fail_span, start_checkpoint_span
from agentflow.types import Lease, new_id

_Place = tuple[HeadKey, Lease | None, str | None]
"""Namespace, lease, and the invocation's load or else the checkpoint."""
_ROW_SIZE = 300
"""Bytes that a row needs beside its payload, roughly."""
_FAILED_LIMIT = 1000
"""How many failed invocations are remembered."""


@dataclass(slots=True)
class _Held:
    """A checkpoint that is not due yet."""

    config: RunnableConfig
    """Where the last stored checkpoint of the invocation is."""
    planned: PlannedCheckpoint
    changed: dict[str, Any]
    """The channels that have changed since the last stored checkpoint."""
    writes: list[PlannedWrites] = field(default_factory=list)


class Intake:
    """Accepts puts; safe from any thread."""

    def __init__(self, database: Database, policy: SavePolicy) -> None:
        """Queue with `database` what `policy` says."""
        self._database = database
        self._policy = policy
        self._instance = new_id()[-16:]
        self._lock = threading.Lock()
        # The last operation on each checkpoint that is not durable yet, or has failed. What is
        # bound to a checkpoint, or follows from it, comes after it and fails with it.
        self._tails: dict[_Place, Future] = {}
        self._held: dict[tuple[HeadKey, Lease | None], _Held] = {}
        # The checkpoints after which a marked node has begun.
        self._marked: dict[tuple[HeadKey, Lease | None], str] = {}
        self.states = ThreadStates()
        self.known = KnownLists()

    def writes(
        self,
        encoder: Encoder,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> Future:
        """Accept the writes of one task."""

        def make() -> PlannedWrites:
            return encoder.writes(key, lease, config, writes, task_id, task_path)

        checkpoint_id = config["configurable"]["checkpoint_id"]
        held = self._held.get((key, lease)) if self._held else None
        if held is None or held.planned.checkpoint_id != checkpoint_id:
            return self._enqueue(key, lease, config, checkpoint_id, make)
        if not any(channel in {ERROR, INTERRUPT} for channel, _ in writes):
            held.writes.append(make())
            return _done()
        # The run stops here, so that what was held back is stored, and this behind it.
        self._store_held(encoder, (key, lease))
        return self._enqueue(key, lease, config, checkpoint_id, make)

    def checkpoint(
        self,
        encoder: Encoder,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Future:
        """Accept a checkpoint."""
        attempt = str(lease.token) if lease else self._instance
        changed = dict(new_versions)
        is_due = True
        if not self._policy.saves_all:
            parent_id = _id_of(config)
            held = self._held.pop((key, lease), None)
            if held is not None and held.planned.checkpoint_id == parent_id:
                config, changed = held.config, {**held.changed, **new_versions}
            marked = self._marked.pop((key, lease), None)
            was_marked = marked is not None and marked == parent_id
            is_due = self._policy.is_due(checkpoint, metadata, was_marked=was_marked)
            if self._policy.is_marked(checkpoint):
                self._marked[key, lease] = checkpoint["id"]

        def make() -> PlannedCheckpoint:
            return encoder.checkpoint(key, lease, attempt, config, checkpoint, metadata, changed)

        if not is_due:
            self._held[key, lease] = _Held(config, make(), changed)
            return _done()
        return self._store(encoder, key, lease, config, checkpoint["id"], metadata, make)

    def _store(
        self,
        encoder: Encoder,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        checkpoint_id: str,
        metadata: CheckpointMetadata,
        make: Callable[[], PlannedCheckpoint],
    ) -> Future:
        span = start_checkpoint_span(
            thread_id=key[1], ns=key[2], checkpoint_id=checkpoint_id, step=metadata.get("step")
        )

        def made() -> PlannedCheckpoint:
            planned = make()
            encoder.follow(planned)
            if span is not None:
                span.set_attribute(CHECKPOINT_BYTES, planned.size)
            return planned

        future = self._enqueue(key, lease, config, checkpoint_id, made)
        if span is not None:
            future.add_done_callback(partial(_end_span, span))
        return future

    def _store_held(self, encoder: Encoder, place: tuple[HeadKey, Lease | None]) -> None:
        held = self._held.pop(place, None)
        if held is None:
            return
        planned = held.planned
        metadata: CheckpointMetadata = {} if planned.step is None else {"step": planned.step}
        self._store(encoder, *place, held.config, planned.checkpoint_id, metadata, lambda: planned)
        of_held = {**held.config["configurable"], "checkpoint_id": planned.checkpoint_id}
        for writes in held.writes:
            config: RunnableConfig = {**held.config, "configurable": of_held}
            self._enqueue(*place, config, planned.checkpoint_id, partial(_same, writes))

    def store_held(self, encoder: Encoder, thread: ThreadKey | None = None) -> None:
        """Store what is held back of a thread, or of all threads."""
        for place in [p for p in tuple(self._held) if thread is None or p[0][:2] == thread]:
            self._store_held(encoder, place)

    def _enqueue(
        self,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        checkpoint_id: str,
        make: Callable[[], Planned],
    ) -> Future:
        """Queue an operation behind the last one of the same invocation in this namespace.

        An invocation that loaded something is known by its load, so that of two that race the
        loser's failure is not the winner's. One that found nothing is followed from checkpoint to
        checkpoint.
        """
        seen: Seen | None = read_seen(config, key[2])
        after = seen.load_id if seen else _id_of(config)
        place: _Place = (key, lease, seen.load_id if seen else checkpoint_id)
        try:
            planned = make()
        except AgentflowError as exc:
            # Refused at the door; what follows must fail too, as if the database had refused.
            future = Future()
            future.settle(error=exc)
            with self._lock:
                self._tails[place] = future
        else:
            operation = Put(planned, self.states, size=planned.size + _ROW_SIZE)
            with self._lock:
                operation.previous = self._tails.get((key, lease, after))
                future = self._database.submit(operation)
                self._tails[place] = future
        future.add_done_callback(partial(self._end, place))
        return future

    def _end(self, place: _Place, done: Future) -> None:
        """Drop an operation that succeeded; remember one that failed, for those that follow it."""
        has_failed = done.exception() is not None
        with self._lock:
            if self._tails.get(place) is not done:
                return
            if not has_failed:
                del self._tails[place]
            elif len(self._tails) > _FAILED_LIMIT:
                oldest = next((p for p, tail in self._tails.items() if tail.done()), place)
                del self._tails[oldest]

    def verb(self, thread: ThreadKey | None, function: Callable[[Rows], Any]) -> Future:
        """Run a verb with the writer; the states of what it changes are read again afterwards.

        Args:
            thread: The thread that it changes; `None` for several.
            function: The verb.
        """

        def run(rows: Rows) -> Any:
            self.states.forget(thread)
            return function(rows)

        return self._database.submit(Verb(run))

    def accepted(self, thread: ThreadKey, lease: Lease | None) -> list[Future]:
        """Return what was accepted for a thread under a lease and is not durable, or has failed."""
        with self._lock:
            return [
                future
                for (key, held_by, _), future in self._tails.items()
                if key[:2] == thread and held_by == lease
            ]

    def pending(self, thread: ThreadKey) -> list[Future]:
        """Return what was accepted for a thread, by whomever, and is still on its way."""
        if not self._tails:
            return []
        with self._lock:
            return [
                future
                for (key, *_), future in self._tails.items()
                if key[:2] == thread and not future.done()
            ]

    def forget_failure(self, key: HeadKey, checkpoint_id: str) -> None:
        """Let whoever goes on by hand from a checkpoint do so, though another one has failed."""
        place: _Place = (key, None, checkpoint_id)
        with self._lock:
            if place in self._tails and self._tails[place].done():
                del self._tails[place]

    def forget_lease(self, thread: ThreadKey, lease: Lease) -> None:
        """Drop what is known of a lease's operations."""
        with self._lock:
            for place in [p for p in self._tails if p[0][:2] == thread and p[1] == lease]:
                del self._tails[place]

    def forget_thread(self, thread: ThreadKey) -> None:
        """Drop everything about a thread."""
        self.known.forget_thread(thread)
        with self._lock:
            for place in [place for place in self._tails if place[0][:2] == thread]:
                del self._tails[place]
            for kept in (self._held, self._marked):
                for held in [place for place in kept if place[0][:2] == thread]:
                    del kept[held]


def _same(planned: PlannedWrites) -> PlannedWrites:
    return planned


def _id_of(config: RunnableConfig) -> str | None:
    return config["configurable"].get("checkpoint_id") or None


def _done() -> Future:
    future = Future()
    future.settle()
    return future


def _end_span(span: Span, done: Future) -> None:
    if (error := done.exception()) is not None:
        fail_span(span, type(error).__name__)
    span.end()
