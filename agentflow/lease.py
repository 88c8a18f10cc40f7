"""Keeps leases alive, and stops an attempt in time when that fails.

Two threads, neither of which is the one that drives graphs. One sends heartbeats, from an event
loop of its own, so that a node that blocks the worker's loop does not cost it its leases. The other
only looks at the clock: it stops an attempt before its lease ends, whatever the heartbeat is stuck
in, and one whose node takes longer than it may.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import TIMEOUT_MAX
from typing import Self

from agentflow.control import AttemptControl, monotonic
from agentflow.errors import StoreError
from agentflow.storage import RunStore
from agentflow.types import Heartbeat, Lease

logger = logging.getLogger(__name__)

_SAFE = 0.8
"""The part of a lease after which work stops that was not told of an extension.

What is left covers a clock that runs at another speed, and what is still on its way.
"""


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    control: AttemptControl


class LeaseKeeper:
    """Extends the leases of one worker; use as a context manager.

    The threads start with the first lease.
    """

    def __init__(self, store: RunStore, *, lease: timedelta, heartbeat: timedelta) -> None:
        """Extend leases to `lease` from now on, once every `heartbeat`."""
        self._store = store
        self._length = lease
        self._interval = heartbeat.total_seconds()
        self._held: dict[str, _Held] = {}
        self._stopped = threading.Event()
        self._is_urgent = threading.Event()
        """Somebody wants an attempt to stop, perhaps one of these."""
        self._changed = threading.Condition()
        self._looks_at = 0.0
        """When the guard looks again, unless it is woken."""
        self._threads = [
            threading.Thread(target=target, name=f"agentflow-{name}", daemon=True)
            for name, target in (("heartbeat", self._serve), ("guard", self._guard))
        ]
        self._unsubscribe: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        """Be ready to keep leases."""
        self._unsubscribe = self._store.subscribe("stop", self._is_urgent.set)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; leases that are still held expire."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._stopped.set()
        self._is_urgent.set()
        self._wake_guard()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def hold(self, lease: Lease, control: AttemptControl, *, since: float) -> None:
        """Keep a lease alive until `drop`, and tell `control` when that fails.

        Args:
            lease: What to extend.
            control: The attempt that works under it.
            since: When the lease was asked for, by `monotonic`: it began after that.
        """
        control.hold(lease, until=self._safe_until(since))
        control.on_change(self._wake_guard)
        with self._changed:
            for thread in self._threads:
                # If one cannot be had, nothing is held, and the next lease asks again.
                if thread.ident is None:
                    thread.start()
            self._held[lease.run_id] = _Held(lease, control)
            if control.next_look < self._looks_at:
                self._changed.notify()

    def drop(self, lease: Lease, control: AttemptControl) -> None:
        """Stop keeping a lease for an attempt."""
        with self._changed:
            if self._is_held(lease, control):
                del self._held[lease.run_id]

    def _safe_until(self, since: float) -> float:
        return since + self._length.total_seconds() * _SAFE

    def _wake_guard(self) -> None:
        with self._changed:
            self._changed.notify()

    def _guard(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                held = list(self._held.values())
                # Without a lease as if one were held from now on: one that is needs not wake it.
                idle = self._safe_until(monotonic())
                self._looks_at = min((entry.control.next_look for entry in held), default=idle)
                pause = self._looks_at - monotonic()
                if pause > 0:
                    self._changed.wait(min(pause, TIMEOUT_MAX))
                    continue
            for entry in held:
                self._look(entry)

    def _look(self, entry: _Held) -> None:
        control = entry.control
        control.look()
        if control.is_lost:
            logger.warning("lease not extended in time", extra={"run_id": entry.lease.run_id})
            self.drop(entry.lease, entry.control)
        elif control.overdue is not None:
            # Nor extended any more: should the attempt be unable to give it up, it expires.
            logger.warning(
                "node timed out",
                extra={"run_id": entry.lease.run_id, "node": control.overdue.node},
            )
            self.drop(entry.lease, entry.control)

    def _serve(self) -> None:
        asyncio.run(self._beat())

    async def _beat(self) -> None:
        while not self._stopped.is_set():
            self._is_urgent.wait(min(self._interval, TIMEOUT_MAX))
            self._is_urgent.clear()
            with self._changed:
                held = list(self._held.values())
            if held and not self._stopped.is_set():
                await self._extend(held)

    async def _extend(self, held: Sequence[_Held]) -> None:
        # Taken before the request: the store counts from when it sees it, which is later.
        asked_at = monotonic()
        try:
            async with asyncio.timeout(self._length.total_seconds()):
                report = await self._store.extend_leases([h.lease for h in held], self._length)
        except (StoreError, TimeoutError) as exc:
            # What this means for the leases, the guard knows.
            logger.warning("heartbeat failed", extra={"error": type(exc).__name__})
            return
        for entry in held:
            beat = report.get(entry.lease.run_id)
            if beat is not None and self._is_held(entry.lease, entry.control):
                self._tell(entry, beat, asked_at)

    def _tell(self, entry: _Held, beat: Heartbeat, asked_at: float) -> None:
        if beat.lost:
            self.drop(entry.lease, entry.control)
            # It is as well if the outcome was written just before.
            if not entry.control.is_settling:
                logger.warning("lease lost", extra={"run_id": entry.lease.run_id})
                entry.control.lose()
            return
        entry.control.extend(self._safe_until(asked_at))
        if beat.stop is not None:
            entry.control.stop(beat.stop)

    def _is_held(self, lease: Lease, control: AttemptControl) -> bool:
        """Whether the attempt still runs; it may have ended while the store was being asked."""
        current = self._held.get(lease.run_id)
        if current is None or current.control is not control:
            return False
        return current.lease.token == lease.token
