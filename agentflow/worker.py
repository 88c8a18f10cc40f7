"""A worker: claims runs and drives many of them at once, until it is told to drain."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.config import Settings
from agentflow.drive import AttemptControl, Driver, RegisteredGraph
from agentflow.lease import LeaseKeeper
from agentflow.storage import RunStore
from agentflow.types import ClaimedRun, new_id

logger = logging.getLogger(__name__)

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


class Worker:
    """Drives runs of the registered graphs; made by `AgentFlow.worker`.

    Use it as an async context manager, or call `run()` and, from elsewhere, `stop()`. Leaving the
    context
    drains: no new claims, running graphs stop at their next superstep with their state saved, and
    what they have left is continued by another worker.
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
        self._active: dict[str, AttemptControl] = {}
        self._is_stopping = False
        self._listener: Listener | None = None
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Claim and drive runs until `stop` is called and everything has been settled."""
        keeper = LeaseKeeper(
            self._store, lease=self._settings.lease, heartbeat=self._settings.heartbeat
        )
        with self._changes.listen() as listener, keeper:
            self._listener = listener
            driver = Driver(self._store, self._saver, keeper)
            async with asyncio.TaskGroup() as group:
                while not self._is_stopping:
                    claimed = await self._claim()
                    for run in claimed:
                        self._begin(group, driver, run)
                    if not claimed or len(self._active) >= self._concurrency:
                        await listener.wait(self._settings.poll_interval.total_seconds())

    def stop(self) -> None:
        """Drain: claim nothing more and let running graphs stop at their next superstep."""
        self._is_stopping = True
        for control in self._active.values():
            control.drain()
        if self._listener is not None:
            self._listener.wake()

    async def _claim(self) -> list[ClaimedRun]:
        room = self._concurrency - len(self._active)
        if room <= 0:
            return []
        try:
            return await self._store.claim_runs(
                self._tenant,
                worker=self.name,
                queues=self._queues,
                graphs=list(self._graphs),
                limit=room,
                lease=self._settings.lease,
            )
        except Exception as exc:  # noqa: BLE001 -- the runs that are being driven must go on
            logger.warning("cannot claim runs", extra={"error": type(exc).__name__})
            return []

    def _begin(self, group: asyncio.TaskGroup, driver: Driver, claimed: ClaimedRun) -> None:
        control = AttemptControl()
        if self._is_stopping:
            control.drain()  # claimed while the worker was being told to stop
        self._active[claimed.run.id] = control
        group.create_task(self._drive(driver, claimed, control))

    async def _drive(self, driver: Driver, claimed: ClaimedRun, control: AttemptControl) -> None:
        run = claimed.run
        registered = self._graphs[run.graph, run.version]
        try:
            await driver.attempt(registered, claimed, control)
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
