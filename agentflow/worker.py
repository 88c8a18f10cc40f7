"""A worker: claims runs and drives many of them at once, until it is told to drain."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.config import Settings
from agentflow.control import AttemptControl, monotonic
from agentflow.drive import Driver, RegisteredGraph
from agentflow.lease import LeaseKeeper
from agentflow.storage import RunStore
from agentflow.threads import NodeThreads, on_loop
from agentflow.types import ClaimedRun, new_id

logger = logging.getLogger(__name__)

_PATIENT = 0.8
"""The part of the grace period in which graphs may come to the end of a superstep."""

WorkerHealth = Literal["ok", "draining", "overloaded"]
Graphs = Mapping[tuple[str, str], RegisteredGraph]


class Changes:
    """Tells whoever waits in this process that something changed, so that they look again."""

    def __init__(self) -> None:
        """Start with nobody listening."""
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()

    def notify(self) -> None:
        """Wake all listeners; safe from any thread."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listen(self) -> Listener:
        """Return a listener of the running event loop; use it as a context manager."""
        return Listener(self)

    def add(self, listener: Callable[[], None]) -> None:
        """Call `listener` at each change."""
        with self._lock:
            self._listeners.add(listener)

    def remove(self, listener: Callable[[], None]) -> None:
        """Stop calling `listener`."""
        with self._lock:
            self._listeners.discard(listener)


class Listener:
    """Waits for the next change, or for the next look at the database."""

    def __init__(self, changes: Changes) -> None:
        """Listen to `changes` from the running event loop."""
        self._changes = changes
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __enter__(self) -> Self:
        """Start listening."""
        self._changes.add(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._changes.remove(self._wake)

    async def wait(self, timeout: float) -> None:
        """Return at the next change, at the latest after about `timeout` seconds.

        The time varies by a fifth, so that many processes do not look at the same moment.
        """
        jittered = timeout * (0.9 + random.random() / 5)  # noqa: S311 -- not a secret
        try:
            async with asyncio.timeout(jittered):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()

    def wake(self) -> None:
        """End the current wait, from this event loop."""
        self._event.set()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """What a worker is doing."""

    name: str
    health: WorkerHealth
    concurrency: int
    active: int
    """Runs that it drives."""
    claimed: int
    """Runs that it has claimed since it started."""
    abandoned: int
    """Threads in nodes whose attempt is over."""
    silence: float
    """Seconds since the store last answered a claim."""


@dataclass(frozen=True, slots=True)
class _Active:
    control: AttemptControl
    task: asyncio.Task[None]


class Worker:
    """Drives runs of the registered graphs; made by `AgentFlow.worker`.

    Use it as an async context manager, or call `run()` and, from elsewhere, `stop()`. Leaving the
    context drains: no new claims, running graphs stop at their next superstep with their state
    saved, and what they have left is continued by another worker.
    """

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        graphs: Graphs,
        settings: Settings,
        changes: Changes,
        *,
        tenant: str,
        concurrency: int,
        queues: Sequence[str],
        name: str | None,
    ) -> None:
        """Drive up to `concurrency` runs of `queues` at a time, under the name `name`."""
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{new_id()[-6:]}"
        self._store = store
        self._saver = saver
        self._graphs = graphs
        self._settings = settings
        self._changes = changes
        self._tenant = tenant
        self._concurrency = concurrency
        self._queues = tuple(queues)
        self._active: dict[str, _Active] = {}
        self._claimed = 0
        self._answered_at = monotonic()
        self._is_stopping = False
        self._is_overloaded = False
        self._threads: NodeThreads | None = None
        self._listener: Listener | None = None
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Claim and drive runs until `stop` is called and everything has been settled.

        It also ends by itself, drained, when more threads than `Settings.max_abandoned` are stuck
        in nodes whose attempt is over. Then `stats().health` is `overloaded`: only a new process is
        rid of them.
        """
        keeper = LeaseKeeper(
            self._store, lease=self._settings.lease, heartbeat=self._settings.heartbeat
        )
        with (
            on_loop(self._concurrency) as threads,
            self._changes.listen() as listener,
            keeper,
        ):
            self._listener, self._threads = listener, threads
            driver = Driver(self._store, self._saver, keeper, threads)
            async with asyncio.TaskGroup() as group:
                while not self._is_stopping:
                    claimed = await self._claim(group, driver)
                    if not claimed or len(self._active) >= self._concurrency:
                        await listener.wait(self._settings.poll_interval.total_seconds())
                    self._check_load(threads)
                await self._settle()

    def stop(self) -> None:
        """Drain: claim nothing more and let running graphs stop at their next superstep.

        A node that takes longer than `Settings.grace` is stopped in the middle, and is executed
        again elsewhere.
        """
        self._is_stopping = True
        for active in self._active.values():
            active.control.drain()
        if self._listener is not None:
            self._listener.wake()

    def stats(self) -> WorkerStats:
        """Say what the worker is doing."""
        return WorkerStats(
            name=self.name,
            health=self._health(),
            concurrency=self._concurrency,
            active=len(self._active),
            claimed=self._claimed,
            abandoned=0 if self._threads is None else self._threads.abandoned(),
            silence=monotonic() - self._answered_at,
        )

    def _health(self) -> WorkerHealth:
        if self._is_overloaded:
            return "overloaded"
        return "draining" if self._is_stopping else "ok"

    def _check_load(self, threads: NodeThreads) -> None:
        if not self._is_overloaded and threads.abandoned() > self._settings.max_abandoned:
            self._is_overloaded = True
            logger.error("too many threads are stuck in nodes", extra={"worker": self.name})
            self.stop()

    async def _settle(self) -> None:
        """Wait for what is still being driven, for as long as there is time."""
        grace = self._settings.grace.total_seconds()
        await self._wait_for_active(grace * _PATIENT)
        for active in self._active.values():
            active.control.give_up()
        await self._wait_for_active(grace * (1 - _PATIENT))
        for active in self._active.values():
            # The store does not answer; the leases will expire.
            logger.warning("run was not given back in time", extra={"worker": self.name})
            active.task.cancel()

    async def _wait_for_active(self, timeout: float) -> None:
        if tasks := [active.task for active in self._active.values()]:
            await asyncio.wait(tasks, timeout=timeout)

    async def _claim(self, group: asyncio.TaskGroup, driver: Driver) -> int:
        room = self._concurrency - len(self._active)
        if room <= 0:
            return 0
        since = monotonic()
        try:
            claimed = await self._store.claim_runs(
                self._tenant,
                worker=self.name,
                queues=self._queues,
                graphs=list(self._graphs),
                limit=room,
                lease=self._settings.lease,
            )
        except Exception as exc:  # noqa: BLE001 -- the runs that are being driven must go on
            logger.warning("cannot claim runs", extra={"error": type(exc).__name__})
            return 0
        self._answered_at = monotonic()
        self._claimed += len(claimed)
        for run in claimed:
            self._begin(group, driver, run, since)
        return len(claimed)

    def _begin(
        self, group: asyncio.TaskGroup, driver: Driver, claimed: ClaimedRun, since: float
    ) -> None:
        control = AttemptControl()
        if self._is_stopping:
            control.drain()  # claimed while the worker was being told to stop
        task = group.create_task(self._drive(driver, claimed, control, since))
        self._active[claimed.run.id] = _Active(control, task)

    async def _drive(
        self, driver: Driver, claimed: ClaimedRun, control: AttemptControl, since: float
    ) -> None:
        run = claimed.run
        registered = self._graphs[run.graph, run.version]
        try:
            await driver.attempt(registered, claimed, control, since=since)
        except Exception:
            # A defect here must not take the other runs with it; this one's lease will expire.
            logger.exception("attempt ended unexpectedly", extra={"run_id": run.id})
        finally:
            del self._active[run.id]
            self._changes.notify()

    async def __aenter__(self) -> Self:
        """Start driving runs in the background."""
        self._group = await asyncio.TaskGroup().__aenter__()
        self._group.create_task(self.run())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain and wait until everything has been settled."""
        self.stop()
        if self._group is not None:
            # Not told of an exception of the body: it passes on as it is, not inside a group.
            await self._group.__aexit__(None, None, None)
