"""What a saver was given and what has become of it; shared by all copies of the saver.

Puts enter the database's queue in the order in which they were made. One that follows another, of
the same invocation, fails if that one has failed. What a sparse policy does not want stored waits
in `holding`, until it is due or something asks for it.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from opentelemetry.trace import Span

from agentflow.checkpoint.batch import ThreadStates
from agentflow.checkpoint.encoding import Encoder, KnownLists
from agentflow.checkpoint.holding import HeldBack, Spot
from agentflow.checkpoint.ids import checkpoint_id_of
from agentflow.checkpoint.operations import Put, Short, Verb
from agentflow.checkpoint.policy import SavePolicy
from agentflow.checkpoint.puts import Planned, PlannedCheckpoint
from agentflow.checkpoint.rows import HeadKey, Rows, ThreadKey, ThreadState
from agentflow.checkpoint.stamps import read_seen
from agentflow.database import Database
from agentflow.database.forks import FORKS
from agentflow.database.futures import Future
from agentflow.errors import AgentflowError
from agentflow.telemetry import CHECKPOINT_BYTES, fail_span, start_checkpoint_span
from agentflow.types import Lease, new_id

_RUNTIME = "__pregel_runtime"

_Place = tuple[HeadKey, Lease | None, str | None]
"""Namespace, lease, and the invocation's load or else the checkpoint."""
_ROW_SIZE = 300
"""Bytes that a row needs beside its payload, roughly."""
_FAILED_LIMIT = 1000
"""How many failed invocations are remembered."""


class Intake:
    """Accepts puts; safe from any thread."""

    def __init__(self, database: Database, policy: SavePolicy) -> None:
        """Queue with `database` what `policy` says."""
        self._database = database
        self._policy = policy
        self.known = KnownLists()
        self._reset()
        if not policy.saves_all:
            atexit.register(_store_at_exit, weakref.ref(self))

    def _reset(self) -> None:
        self._forks = FORKS.count
        # No lock is inherited: a thread that is gone in the child may hold it for ever.
        self.states = ThreadStates()
        self.known.reset()
        self._instance = new_id()[-12:]
        self._lock = threading.Lock()
        # The last operation on each checkpoint that is not durable yet, or has failed. What is
        # bound to a checkpoint, or follows from it, comes after it and fails with it.
        self._tails: dict[_Place, Future] = {}
        self._held = HeldBack(self._policy)
        self._has_writer = False

    def check_fork(self) -> None:
        """Start afresh in the child of a fork: what was accepted before is its parent's."""
        if self._forks != FORKS.count:
            self._reset()

    def observe(self, thread: ThreadKey, state: ThreadState) -> None:
        """Remember the state in which a reader has found a thread."""
        self.states.observe(thread, state)

    def is_marked(self, checkpoint: Checkpoint) -> bool:
        """Whether the policy wants to have stored what comes after this checkpoint."""
        return self._policy.is_marked(checkpoint)

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
        self.check_fork()
        checkpoint_id = config["configurable"]["checkpoint_id"]
        spot = (key, lease, checkpoint_id)
        try:
            planned = encoder.writes(key, lease, config, writes, task_id, task_path)
        except AgentflowError as exc:
            if self._policy.saves_all:
                return self._refuse(spot, config, exc)
            with self._held.lock:
                return self._refuse_held(spot, spot, config, exc)
        if self._policy.saves_all:
            return self._enqueue(planned, config, checkpoint_id)
        with self._held.lock:
            if self._held.may_wait(spot, config, {channel for channel, _ in writes}):
                self._held.hold_writes(spot, config, planned)
                return _done()
            # The run stops here, so that what was held back is stored, and this behind it.
            self._store_held(spot)
            return self._enqueue(planned, config, checkpoint_id)

    def checkpoint(
        self,
        encoder: Encoder,
        key: HeadKey,
        lease: Lease | None,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
        *,
        is_followed: bool = False,
    ) -> Future:
        """Accept a checkpoint; `is_followed` says that nobody waits for it before the next one."""
        self.check_fork()
        attempt = str(lease.token) if lease else self._attempt(config, key)
        if self._policy.saves_all:
            make = partial(
                encoder.checkpoint, key, lease, attempt, config, checkpoint, metadata, new_versions
            )
            spot = (key, lease, checkpoint["id"])
            return self._store(encoder, spot, config, metadata, make, is_followed=is_followed)
        parent = (key, lease, checkpoint_id_of(config) or "")
        spot = (key, lease, checkpoint["id"])
        with self._held.lock:
            is_due = self._held.is_due(parent, config, checkpoint, metadata)
            config, new_versions = self._held.completed(parent, config, new_versions)
            try:
                planned = encoder.checkpoint(
                    key, lease, attempt, config, checkpoint, metadata, new_versions
                )
            except AgentflowError as exc:
                return self._refuse_held(parent, spot, config, exc)
            self._held.follow(parent)
            if is_due:
                self._store_behind(parent)
                return self._store(encoder, spot, config, metadata, lambda: planned)
            if not self._has_writer:
                # Starts its thread, since none can be started when the process ends.
                self.verb(spot[0][:2], lambda _: None)
                self._has_writer = True
            self._held.hold(parent, encoder, config, planned, new_versions)
            return _done()

    def _attempt(self, config: RunnableConfig, key: HeadKey) -> str:
        """Name the invocation, which parallel calls of its subgraphs share.

        LangGraph hands one object for the control of a run to all of its subgraphs. No two
        invocations have the same at the same time, and only those can be in each other's way.
        """
        control = getattr(config["configurable"].get(_RUNTIME), "control", None)
        if control is not None:
            return f"{self._instance}.{id(control):x}"
        seen = read_seen(config, key[2])
        return f"{self._instance}.{seen.load_id[-12:]}" if seen else self._instance

    def _store(
        self,
        encoder: Encoder,
        spot: Spot,
        config: RunnableConfig,
        metadata: CheckpointMetadata,
        make: Callable[[], PlannedCheckpoint],
        *,
        is_followed: bool = False,
    ) -> Future:
        key, _, checkpoint_id = spot
        span = start_checkpoint_span(
            thread_id=key[1], ns=key[2], checkpoint_id=checkpoint_id, step=metadata.get("step")
        )
        try:
            planned = make()
        except AgentflowError as exc:
            future = self._refuse(spot, config, exc)
        else:
            encoder.follow(planned)
            future = self._enqueue(planned, config, checkpoint_id, is_followed=is_followed)
            if span is not None:
                span.set_attribute(CHECKPOINT_BYTES, planned.size)
        if span is not None:
            future.add_done_callback(partial(_end_span, span))
        return future

    def _store_held(self, spot: Spot) -> list[Future]:
        """Store a checkpoint that is held back, with its writes, or those behind a stored one."""
        held = self._held.take(spot)
        if held is None:
            return self._store_behind(spot)
        planned = held.planned
        metadata: CheckpointMetadata = {} if planned.step is None else {"step": planned.step}
        stored = self._store(held.encoder, spot, held.config, metadata, lambda: planned)
        return [stored, *self._store_behind(spot)]

    def _store_behind(self, spot: Spot) -> list[Future]:
        """Store writes that wait behind a stored checkpoint."""
        behind = self._held.take_behind(spot)
        if behind is None:
            return []
        return [self._enqueue(each, behind.config, spot[2]) for each in behind.writes]

    def _refuse_held(
        self, held: Spot, spot: Spot, config: RunnableConfig, error: AgentflowError
    ) -> Future:
        """Refuse a put, and what follows it; the run stops there, so that what is held is stored.

        Whoever is told of the error finds it durable.
        """
        stored = self._store_held(held)
        refused = self._refuse(spot, config, error)
        if not stored:
            return refused
        told = Future()
        stored[-1].add_done_callback(lambda _: told.settle(error=error))
        return told

    def store_held(self, thread: ThreadKey | None = None) -> list[Future]:
        """Store what is held back of a thread, or of all threads."""
        self.check_fork()
        if self._policy.saves_all:
            return []
        # Also to see that there is nothing: between two checkpoints neither of them is held.
        with self._held.lock:
            spots = self._held.spots(thread)
            return [future for spot in spots for future in self._store_held(spot)]

    def _enqueue(
        self,
        planned: Planned,
        config: RunnableConfig,
        checkpoint_id: str,
        *,
        is_followed: bool = False,
    ) -> Future:
        """Queue a put behind the last operation of the same invocation in this namespace.

        An invocation that loaded something is known by its load, so that of two that race the
        loser's failure is not the winner's. One that found nothing is followed from checkpoint to
        checkpoint.
        """
        key, lease = planned.key, planned.lease
        seen = read_seen(config, key[2])
        places: list[_Place]
        if seen is None:
            after, places = checkpoint_id_of(config), [(key, lease, checkpoint_id)]
        else:
            after, places = seen.load_id, [(key, lease, seen.load_id)]
            if isinstance(planned, PlannedCheckpoint):
                # Subgraphs know what called them by its id.
                places.append((key, lease, checkpoint_id))
        size = planned.size + _ROW_SIZE
        operation = Put(planned, self.states, size=size, is_followed=is_followed)
        with self._lock:
            previous = self._tails.get((key, lease, after))
            operation.previous = previous or self._caller(config, key, lease)
            future = self._database.enqueue(operation)
            for place in places:
                self._tails[place] = future
        # Perhaps here and now, which ends what was accepted before as well.
        self._database.push(operation)
        future.add_done_callback(partial(self._end, places))
        return future

    def _refuse(self, spot: Spot, config: RunnableConfig, error: AgentflowError) -> Future:
        """Refuse a put at the door; what follows must fail too, as if the database had refused."""
        key, lease, checkpoint_id = spot
        seen = read_seen(config, key[2])
        place: _Place = (key, lease, seen.load_id if seen else checkpoint_id)
        future = Future()
        future.settle(error=error)
        with self._lock:
            self._tails[place] = future
        self._end([place], future)
        return future

    def _caller(self, config: RunnableConfig, key: HeadKey, lease: Lease | None) -> Future | None:
        """Return the put of the checkpoint from which a subgraph was called.

        It need not be durable yet. If it loses a race, the subgraph must not win one.
        """
        calling: dict[str, str] = config["configurable"].get("checkpoint_map") or {}
        for ns, checkpoint_id in reversed(calling.items()):
            future = self._tails.get(((*key[:2], ns), lease, checkpoint_id))
            if ns != key[2] and future is not None:
                return future
        return None

    def _end(self, places: Sequence[_Place], done: Future) -> None:
        """Drop an operation that succeeded; remember one that failed, for those that follow it."""
        has_failed = done.exception() is not None
        if has_failed:
            # It may be stored all the same, if nobody could tell.
            self.states.forget(places[0][0][:2])
        with self._lock:
            for place in places:
                if self._tails.get(place) is not done:
                    continue
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
        self.check_fork()

        def run(rows: Rows) -> Any:
            self.states.forget(thread)
            return function(rows)

        return self._database.submit(Verb(run))

    def set_lease(self, thread: ThreadKey, token: int, *, is_leased: bool) -> Future:
        """Have a thread taken or given back; see `Rows.set_lease`."""
        self.check_fork()

        def run(rows: Rows) -> ThreadState | None:
            self.states.forget(thread)
            return rows.set_lease(thread, token, is_leased=is_leased)

        return self._database.submit(Short(run))

    def step(self, thread: ThreadKey | None, function: Callable[[Rows], Any]) -> Future:
        """Run a step of something longer with the writer, in a transaction of its own.

        Args:
            thread: The thread that it changes; `None` if nobody can know the state of what it does.
            function: The step.
        """
        self.check_fork()

        def run(rows: Rows) -> Any:
            if thread is not None:
                self.states.forget(thread)
            return function(rows)

        return self._database.submit(Verb(run, is_step=True))

    def accepted(self, thread: ThreadKey, lease: Lease | None) -> list[Future]:
        """Return what was accepted for a thread under a lease and is not durable, or has failed."""
        with self._lock:
            return [
                future
                for (key, held_by, _), future in self._tails.items()
                if key[:2] == thread and held_by == lease
            ]

    def ahead_of(self, thread: ThreadKey | None) -> Sequence[Future]:
        """Return what a reader of a thread, or of all (`None`), has to wait for.

        What is held back is stored first. Of a thread it is all that was accepted, by whomever, and
        is still on its way.
        """
        stored = self.store_held(thread)
        if thread is None:
            return stored
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
        with self._held.lock:
            self._held.forget_thread(thread)


def _store_at_exit(intake: weakref.ref[Intake]) -> None:
    """Store what is held back when the process ends without having closed its saver."""
    alive = intake()
    for future in alive.store_held() if alive is not None else ():
        future.wait()


def _done() -> Future:
    future = Future()
    future.settle()
    return future


def _end_span(span: Span, done: Future) -> None:
    if (error := done.exception()) is not None:
        fail_span(span, type(error).__name__)
    span.end()
