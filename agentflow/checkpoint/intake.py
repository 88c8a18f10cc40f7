"""What a saver was given and what has become of it; shared by all copies of the saver.

Puts enter the database's queue in the order in which they were made. One that follows another, of
the same invocation, fails if that one has failed. Under a sparse policy the newest checkpoint of an
invocation waits here until it is due, with the writes that belong to it; whatever follows it brings
what it would have brought.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME
from opentelemetry.trace import Span

from agentflow.checkpoint.batch import ThreadStates
from agentflow.checkpoint.encoding import Encoder, KnownLists
from agentflow.checkpoint.operations import Put, Short, Verb
from agentflow.checkpoint.policy import SavePolicy
from agentflow.checkpoint.puts import Planned, PlannedCheckpoint, PlannedWrites
from agentflow.checkpoint.rows import HeadKey, Rows, ThreadKey, ThreadState
from agentflow.checkpoint.stamps import Seen, read_seen
from agentflow.database import Database
from agentflow.database.forks import FORKS
from agentflow.database.futures import Future
from agentflow.errors import AgentflowError
from agentflow.telemetry import CHECKPOINT_BYTES, fail_span, start_checkpoint_span
from agentflow.types import Lease, new_id

T = TypeVar("T")
P = TypeVar("P", bound=Planned)
_ENGINE = "__pregel_"
"""With this begin LangGraph's own keys."""
_RUNTIME = f"{_ENGINE}runtime"

_Place = tuple[HeadKey, Lease | None, str | None]
"""Namespace, lease, and the invocation's load or else the checkpoint."""
_ROW_SIZE = 300
"""Bytes that a row needs beside its payload, roughly."""
_FAILED_LIMIT = 1000
"""How many failed invocations are remembered."""
_CARRIED_LIMIT = 1000
_MARKED_LIMIT = 10_000
"""How many checkpoints are remembered that were held back and followed by another one, or after
which a marked node began, or a run stopped."""

_Spot = tuple[HeadKey, Lease | None, str]
"""Namespace, lease and checkpoint; ids of checkpoints are never those of another invocation."""


class _Carried(NamedTuple):
    """What follows a checkpoint that was not stored has to bring in its stead."""

    since: str | None
    """The last stored checkpoint of the invocation."""
    changed: ChannelVersions
    """The channels that have changed since then."""


@dataclass(slots=True)
class _Held:
    """A checkpoint that is not due yet."""

    encoder: Encoder
    config: RunnableConfig
    """Where the last stored checkpoint of the invocation is."""
    planned: PlannedCheckpoint
    carried: _Carried
    writes: list[PlannedWrites] = field(default_factory=list)


@dataclass(slots=True)
class _Behind:
    """Writes behind a stored checkpoint whose nodes are not marked.

    If the next checkpoint is not stored, they are not either: a crash runs all again that came
    after the last stored one, and not sometimes a part of it.
    """

    config: RunnableConfig
    writes: list[PlannedWrites] = field(default_factory=list)


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
        # Taken from the look at what is held back until what became of it is queued, so that
        # nothing overtakes what it follows.
        self._holding = threading.RLock()
        self._held: dict[_Spot, _Held] = {}
        self._carried: OrderedDict[_Spot, _Carried] = OrderedDict()
        self._behind: dict[_Spot, _Behind] = {}
        self._marked: OrderedDict[_Spot, None] = OrderedDict()
        self._stopped: OrderedDict[_Spot, None] = OrderedDict()
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

        def make() -> PlannedWrites:
            return encoder.writes(key, lease, config, writes, task_id, task_path)

        self.check_fork()
        checkpoint_id = config["configurable"]["checkpoint_id"]
        if self._policy.saves_all:
            return self._enqueue(key, lease, config, checkpoint_id, make)
        with self._holding:
            spot = (key, lease, checkpoint_id)
            try:
                planned = make()
            except AgentflowError as exc:
                return self._refuse_held(spot, spot, config, exc)
            if self._may_wait(spot, config, {channel for channel, _ in writes}):
                held = self._held.get(spot)
                if held is not None:
                    held.writes.append(planned)
                else:
                    behind = _Behind(_without_engine(config))
                    self._behind.setdefault(spot, behind).writes.append(planned)
                return _done()
            # The run stops here, so that what was held back is stored, and this behind it.
            self._store_held(spot)
            return self._enqueue(key, lease, config, checkpoint_id, partial(_same, planned))

    def _may_wait(self, spot: _Spot, config: RunnableConfig, channels: Collection[str]) -> bool:
        """Whether writes may be held back until it is known if the next checkpoint is due."""
        if not {ERROR, INTERRUPT}.isdisjoint(channels):
            _remember(self._stopped, spot, None, _MARKED_LIMIT)
            return False
        if spot in self._held:
            return True
        if RESUME in channels:
            self._stopped.pop(spot, None)
            return False
        return spot not in self._stopped and not self._is_before_marked(spot, config)

    def _is_before_marked(self, spot: _Spot, config: RunnableConfig) -> bool:
        """Whether a marked node comes after a checkpoint."""
        key, _, checkpoint_id = spot
        seen = read_seen(config, key[2])
        is_seen = seen is not None and seen.checkpoint_id == checkpoint_id and seen.is_marked
        return is_seen or spot in self._marked

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
        self.check_fork()
        attempt = str(lease.token) if lease else self._attempt(config, key)
        if self._policy.saves_all:

            def make() -> PlannedCheckpoint:
                return encoder.checkpoint(
                    key, lease, attempt, config, checkpoint, metadata, new_versions
                )

            return self._store(encoder, key, lease, config, checkpoint["id"], metadata, make)
        parent = (key, lease, _id_of(config) or "")
        spot = (key, lease, checkpoint["id"])
        with self._holding:
            is_due = self._is_due(parent, config, checkpoint, metadata)
            followed = self._held.get(parent)
            carried = followed.carried if followed else self._carried.get(parent)
            if carried is not None:
                config = _at(config, carried.since)
                new_versions = {**carried.changed, **new_versions}
            try:
                planned = encoder.checkpoint(
                    key, lease, attempt, config, checkpoint, metadata, new_versions
                )
            except AgentflowError as exc:
                return self._refuse_held(parent, spot, config, exc)
            if followed is not None:
                # Others may follow it too; if not, it is one of the first to be forgotten.
                _remember(self._carried, parent, self._held.pop(parent).carried, _CARRIED_LIMIT)
            if is_due:
                self._store_behind(parent)
                return self._store(
                    encoder, *spot[:2], config, spot[2], metadata, partial(_same, planned)
                )
            if not self._has_writer:
                # Starts its thread, since none can be started when the process ends.
                self.verb(spot[0][:2], lambda _: None)
                self._has_writer = True
            # It brings what they have made of the state.
            self._behind.pop(parent, None)
            changes = _Carried(_id_of(config), new_versions)
            self._held[spot] = _Held(encoder, _without_engine(config), planned, changes)
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

    def _is_due(
        self,
        parent: _Spot,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
    ) -> bool:
        key, lease, _ = parent
        seen = read_seen(config, key[2])
        was_marked = self._is_before_marked(parent, config)
        self._marked.pop(parent, None)
        if self._policy.is_marked(checkpoint):
            _remember(self._marked, (key, lease, checkpoint["id"]), None, _MARKED_LIMIT)
        return self._policy.is_due(
            checkpoint, metadata, was_marked=was_marked, is_last=_is_last(config, metadata, seen)
        )

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

    def _store_held(self, spot: _Spot) -> list[Future]:
        """Store a checkpoint that is held back, with its writes, or those behind a stored one."""
        held = self._held.pop(spot, None)
        if held is None:
            return self._store_behind(spot)
        # It is there for whoever follows it.
        self._carried.pop(spot, None)
        key, lease, checkpoint_id = spot
        step = held.planned.step
        metadata: CheckpointMetadata = {} if step is None else {"step": step}
        make = partial(_same, held.planned)
        stored = self._store(held.encoder, key, lease, held.config, checkpoint_id, metadata, make)
        self._behind[spot] = _Behind(_at(held.config, checkpoint_id), held.writes)
        return [stored, *self._store_behind(spot)]

    def _store_behind(self, spot: _Spot) -> list[Future]:
        """Store writes that wait behind a stored checkpoint."""
        behind = self._behind.pop(spot, None)
        if behind is None:
            return []
        key, lease, checkpoint_id = spot
        makes = (partial(_same, each) for each in behind.writes)
        return [self._enqueue(key, lease, behind.config, checkpoint_id, make) for make in makes]

    def _refuse_held(
        self, held: _Spot, spot: _Spot, config: RunnableConfig, error: AgentflowError
    ) -> Future:
        """Refuse a put, and what follows it; the run stops there, so that what is held is stored.

        Whoever is told of the error finds it durable.
        """
        stored = self._store_held(held)
        refused = self._enqueue(*spot[:2], config, spot[2], partial(_refuse, error))
        if not stored:
            return refused
        told = Future()
        stored[-1].add_done_callback(lambda _: told.settle(error=error))
        return told

    def store_held(self, thread: ThreadKey | None = None) -> list[Future]:
        """Store what is held back of a thread, or of all threads."""
        self.check_fork()
        if not self._held and not self._behind:
            return []
        with self._holding:
            waiting = [*self._held, *self._behind]
            spots = [spot for spot in waiting if thread is None or spot[0][:2] == thread]
            return [future for spot in spots for future in self._store_held(spot)]

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
        places: list[_Place] = [(key, lease, seen.load_id if seen else checkpoint_id)]
        try:
            planned = make()
        except AgentflowError as exc:
            # Refused at the door; what follows must fail too, as if the database had refused.
            future = Future()
            future.settle(error=exc)
            with self._lock:
                self._tails[places[0]] = future
        else:
            if seen and isinstance(planned, PlannedCheckpoint):
                # Subgraphs know what called them by its id.
                places.append((key, lease, checkpoint_id))
            operation = Put(planned, self.states, size=planned.size + _ROW_SIZE)
            with self._lock:
                previous = self._tails.get((key, lease, after))
                operation.previous = previous or self._caller(config, key, lease)
                future = self._database.enqueue(operation)
                self._tails.update(dict.fromkeys(places, future))
            # Perhaps here and now, which ends what was accepted before as well.
            self._database.push(operation)
        future.add_done_callback(partial(self._end, places))
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
        with self._holding:
            kept: dict[_Spot, Any]
            for kept in (self._held, self._behind, self._carried, self._marked, self._stopped):
                for spot in [spot for spot in kept if spot[0][:2] == thread]:
                    del kept[spot]


def _store_at_exit(intake: weakref.ref[Intake]) -> None:
    """Store what is held back when the process ends without having closed its saver."""
    alive = intake()
    for future in alive.store_held() if alive is not None else ():
        future.wait()


def _remember(kept: OrderedDict[_Spot, T], spot: _Spot, value: T, limit: int) -> None:
    """Keep a value, and drop the oldest one if there are too many."""
    kept[spot] = value
    kept.move_to_end(spot)
    if len(kept) > limit:
        kept.popitem(last=False)


def _is_last(config: RunnableConfig, metadata: CheckpointMetadata, seen: Seen | None) -> bool:
    """Whether LangGraph stops here, since the invocation has used its steps; it puts nothing then.

    It counts from the step behind the one that was loaded; a new thread begins at -1.
    """
    limit, step = config.get("recursion_limit"), metadata.get("step")
    if limit is None or step is None:
        return False
    loaded = -2 if seen is None or seen.step is None else seen.step
    return step >= loaded + limit + 2


def _same(planned: P) -> P:
    return planned


def _refuse(error: AgentflowError) -> Any:
    raise error


def _id_of(config: RunnableConfig) -> str | None:
    return config["configurable"].get("checkpoint_id") or None


def _at(config: RunnableConfig, checkpoint_id: str | None) -> RunnableConfig:
    """Return a configuration that names another checkpoint."""
    return {**config, "configurable": {**config["configurable"], "checkpoint_id": checkpoint_id}}


def _without_engine(config: RunnableConfig) -> RunnableConfig:
    """Return what is needed of a configuration; the engine's keys hold on to the whole state."""
    configurable = config["configurable"].items()
    return {"configurable": {k: v for k, v in configurable if not k.startswith(_ENGINE)}}


def _done() -> Future:
    future = Future()
    future.settle()
    return future


def _end_span(span: Span, done: Future) -> None:
    if (error := done.exception()) is not None:
        fail_span(span, type(error).__name__)
    span.end()
