"""A worker: claims runs and drives many of them at once, until it is told to drain."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.checkpoint import Saver, SweepReport
from agentflow.config import Settings
from agentflow.control import AttemptControl, monotonic
from agentflow.drive import Driver, RegisteredGraph
from agentflow.early import Active, Early
from agentflow.errors import AgentflowError, FencedError
from agentflow.lease import LeaseKeeper
from agentflow.listener import Listener
from agentflow.offers import H, Offers, Verb
from agentflow.processes import own_mark
from agentflow.storage import Claimant, Opening, RunStore
from agentflow.threads import NodeThreads, on_loop
from agentflow.types import ClaimedRun, Lease, WorkerHealth, WorkerReport, new_id

logger = logging.getLogger(__name__)

_NOW = timedelta(0)
_FIRED_AT_ONCE = 100
_PATIENT = 0.8
"""The part of the grace period in which graphs may come to the end of a superstep."""

Graphs = Mapping[tuple[str, str], RegisteredGraph]
_REPORT = 15.0
"""Seconds after which a worker says again that it lives, at the latest."""


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
    """Seconds since the store last said what there is to do."""


@dataclass(frozen=True, slots=True)
class _Here:
    """Where a worker runs."""

    loop: asyncio.AbstractEventLoop
    context: Context
    group: asyncio.TaskGroup
    driver: Driver


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
        *,
        tenant: str,
        concurrency: int,
        queues: Sequence[str],
        name: str | None,
        sweep: Callable[[], Awaitable[SweepReport]],
        sweep_every: timedelta | None,
        opening: Opening | None,
        offers: Offers,
    ) -> None:
        """Drive up to `concurrency` runs of `queues` at a time, under the name `name`.

        Claims open attempts by `opening`, if it is given, and what `offers` has is taken at once
        while there is nothing else to do. About every `sweep_every`, if that is given, `sweep` is
        called.
        """
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{new_id()[-6:]}"
        self._instance = f"{self.name}-{new_id()}"
        """Unlike the name, that of this start alone: it is what a dead worker is known by."""
        self._process = own_mark()
        self._store = store
        self._saver = saver
        self._graphs = graphs
        self._settings = settings
        self._tenant = tenant
        self._concurrency = concurrency
        self._queues = tuple(queues)
        self._sweep = sweep
        self._sweep_every = sweep_every
        self._offers = offers
        self._claims_as = Claimant(
            worker=self.name,
            instance=self._instance,
            lease=settings.lease,
            opening=opening,
            queues=self._queues,
            graphs=frozenset(graphs),
        )
        self._offered: dict[asyncio.Task[Any], Early] = {}
        self._has_more = True
        """Whether there may be runs that it has not claimed yet."""
        self._active: dict[Lease, Active] = {}
        """A run may begin anew while its last attempt is still ending."""
        self._claimed = 0
        self._answered_at = monotonic()
        self._alone_until = 0.0
        self._looked_at = float("-inf")
        self._is_stopping = False
        self._is_overloaded = False
        self._threads: NodeThreads | None = None
        self._listener: Listener | None = None
        self._here: _Here | None = None
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Claim and drive runs until `stop` is called and everything has been settled.

        It also ends by itself, drained, when more threads than `Settings.max_abandoned` are stuck
        in nodes whose attempt is over. Then `stats().health` is `overloaded`: only a new process is
        rid of them.
        """
        settings = self._settings
        keeper = LeaseKeeper(self._store, lease=settings.lease, heartbeat=settings.heartbeat)
        with (
            on_loop(self._concurrency) as threads,
            Listener(partial(self._store.subscribe, "due")) as listener,
            keeper,
        ):
            self._listener, self._threads = listener, threads
            driver = Driver(self._store, self._saver, keeper, threads)
            async with asyncio.TaskGroup() as group:
                aside = [group.create_task(self._report())]
                if self._sweep_every is not None:
                    aside.append(group.create_task(self._sweep_now_and_then(self._sweep_every)))
                was_told = False
                with self._open_to_offers(group, driver):
                    while not self._is_stopping:
                        pause = await self._turn(was_told=was_told)
                        self._check_load(threads)
                        if not self._is_stopping:
                            was_told = await listener.wait(pause)
                await self._settle()
                for task in aside:
                    task.cancel()
        with suppress(AgentflowError):
            await self._store.remove_worker(self._tenant, self._instance)

    @contextmanager
    def _open_to_offers(self, group: asyncio.TaskGroup, driver: Driver) -> Iterator[None]:
        self._here = _Here(asyncio.get_running_loop(), copy_context(), group, driver)
        self._offers.join(self)
        try:
            yield
        finally:
            self._offers.leave(self)
            self._here = None

    async def _turn(self, *, was_told: bool) -> float:
        """Do what there is to do, and return for how many seconds there is no more.

        Who was told of something claims at once. Else, and now and then in any case, the store is
        asked what there is, and what is coming.
        """
        poll = self._settings.poll_interval.total_seconds()
        try:
            if was_told and monotonic() < self._looked_at + poll:
                await self._claim()
                return max(0.0, self._looked_at + poll - monotonic())
            due = await self._store.next_due(
                self._tenant, queues=self._queues, graphs=list(self._graphs)
            )
            self._looked_at = self._answered_at = monotonic()
            self._has_more = due.is_claimable
            if due.is_claimable:
                await self._claim()
            if due.deadline is not None and due.deadline <= _NOW:
                await self._store.fire_due(self._tenant, limit=_FIRED_AT_ONCE)
        except Exception as exc:  # noqa: BLE001 -- the runs that are being driven must go on
            logger.warning("cannot look for work", extra={"error": type(exc).__name__})
            return poll
        coming = [each.total_seconds() for each in (due.expiry, due.deadline) if each is not None]
        return min([poll, *(each for each in coming if each > 0)])

    def _room(self) -> int:
        """Return how many runs there is room for."""
        is_alone = any(active.control.is_isolated for active in self._active.values())
        coming = sum(1 for early in self._offered.values() if not early.has_begun)
        return 0 if is_alone else self._concurrency - len(self._active) - coming

    @property
    def claimant(self) -> Claimant:
        """As whom it claims, and what."""
        return self._claims_as

    def take(self, verb: Verb[H]) -> asyncio.Future[H] | None:
        """See `Taker`: what is offered is taken if nothing else waits for the room."""
        here = self._here
        if here is None or here.loop is not asyncio.get_running_loop():
            return None
        if self._is_stopping or self._has_more or self._room() <= 0:
            return None
        early = Early(here.loop, self._begin)
        task = here.loop.create_task(self._take_offered(verb, early))
        self._offered[task] = early
        task.add_done_callback(self._offered.pop)
        # Whoever offered it may not wait for it any more.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _take_offered(self, verb: Verb[H], early: Early) -> H:
        try:
            handed = await verb(replace(self._claims_as, foretell=early.foretell))
        except BaseException:
            await early.withdraw()
            raise
        claimed = handed.claimed
        if claimed is not None and early.confirm(claimed):
            self._claimed += 1
            return handed
        await early.withdraw()
        if claimed is None:
            return handed
        if self._begin(claimed, since=early.since) is not None:
            self._claimed += 1
        else:
            await self._give_back(claimed.lease)  # the worker has been told to go meanwhile
        return handed

    async def _give_back(self, lease: Lease) -> None:
        with suppress(AgentflowError):
            if isinstance(self._saver, Saver):
                await self._saver.release(lease)
            await self._store.release_run(lease, reason="drain", counts=False)

    async def _end_isolation(self) -> None:
        """Let the worker claim again beside a suspect that has lived for long enough."""
        for active in list(self._active.values()):
            control = active.control
            if control.is_isolated and monotonic() >= self._alone_until:
                control.is_isolated = False
                if (lease := control.lease) is not None:
                    with suppress(FencedError):
                        await self._store.end_isolation(lease)

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
        began = monotonic()
        if self._offered:
            await asyncio.wait(self._offered, timeout=grace * _PATIENT)
        await self._wait_for_active(max(0.0, began + grace * _PATIENT - monotonic()))
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

    async def _claim(self) -> None:
        await self._end_isolation()
        if (room := self._room()) <= 0:
            return
        since = monotonic()
        self._has_more = True  # until it is known: what is offered meanwhile waits its turn
        claimed = await self._store.claim_runs(
            self._tenant,
            worker=self.name,
            instance=self._instance,
            queues=self._queues,
            graphs=list(self._graphs),
            limit=room,
            lease=self._settings.lease,
            opening=self._claims_as.opening,
        )
        self._claimed += len(claimed)
        self._has_more = len(claimed) == room
        for run in claimed:
            if run.isolation is not None:
                self._alone_until = since + run.isolation.total_seconds()
            self._begin(run, since=since)

    async def _report(self) -> None:
        """Tell the store, time and again, that this worker lives."""
        while True:
            report = WorkerReport(
                instance=self._instance,
                name=self.name,
                queues=self._queues,
                graphs=tuple(self._graphs),
                concurrency=self._concurrency,
                active=len(self._active),
                health=self._health(),
                process=self._process,
            )
            try:
                await self._store.beat_worker(self._tenant, report)
            except AgentflowError as exc:
                logger.warning("cannot report", extra={"error": type(exc).__name__})
            # However long its leases are: who says nothing for a minute is taken for dead.
            await asyncio.sleep(min(self._settings.lease.total_seconds(), _REPORT))

    async def _sweep_now_and_then(self, every: timedelta) -> None:
        """Sweep, at another time than other workers do; a worker that soon ends has a turn too."""
        pause = random.uniform(0, every.total_seconds())  # noqa: S311 -- jitter
        while True:
            await asyncio.sleep(pause)
            pause = every.total_seconds()
            try:
                report = await self._sweep()
            except AgentflowError as exc:
                logger.warning("cannot sweep", extra={"error": type(exc).__name__})
            else:
                counts = {"threads": report.threads, "checkpoints": report.checkpoints}
                logger.info("swept", extra=counts)

    def _begin(
        self, claimed: ClaimedRun, *, since: float, stored: asyncio.Event | None = None
    ) -> Active | None:
        """Drive a claimed run from now on; `None` if the worker has gone."""
        if (here := self._here) is None:
            return None
        control = AttemptControl()
        control.is_isolated = claimed.isolation is not None
        if self._is_stopping:
            control.drain()  # claimed while the worker was being told to stop
        driving = self._drive(here.driver, claimed, control, since, stored)
        # Nothing of the context of whoever has offered it.
        task = here.group.create_task(driving, context=here.context.copy())
        self._active[claimed.lease] = active = Active(control, task)
        return active

    async def _drive(
        self,
        driver: Driver,
        claimed: ClaimedRun,
        control: AttemptControl,
        since: float,
        stored: asyncio.Event | None,
    ) -> None:
        run = claimed.run
        registered = self._graphs[run.graph, run.version]
        try:
            await driver.attempt(registered, claimed, control, since=since, stored=stored)
        except Exception:
            # A defect here must not take the other runs with it; this one's lease will expire.
            logger.exception("attempt ended unexpectedly", extra={"run_id": run.id})
        finally:
            had_room = self._room() > 0
            # One that was withdrawn may still have been ending when its lease was claimed again.
            active = self._active.get(claimed.lease)
            if active is not None and active.control is control:
                del self._active[claimed.lease]
            if not had_room and self._listener is not None:
                self._listener.wake()

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
