"""Keeps leases alive, and tells an attempt at once when it has to stop.

Heartbeats come from a thread with an event loop of its own, so that a node that blocks the worker's
loop does not cost it its leases.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from agentflow.errors import StoreError
from agentflow.storage import RunStore
from agentflow.types import Heartbeat, Lease

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    expires: float
    """When the lease ends at the earliest, on this machine's monotonic clock."""
    on_lost: Callable[[], None]
    on_cancel: Callable[[], None]


class LeaseKeeper:
    """Extends the leases of one worker from its own thread; use as a context manager."""

    def __init__(self, store: RunStore, *, lease: timedelta, heartbeat: timedelta) -> None:
        """Extend leases to `lease` from now on, once every `heartbeat`."""
        self._store = store
        self._length = lease
        self._interval = heartbeat.total_seconds()
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="agentflow-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread; leases that are still held expire."""
        self._stopped.set()
        self._thread.join()

    def hold(
        self,
        lease: Lease,
        *,
        on_lost: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        """Keep a lease alive until `drop`; the callbacks are called from the keeper's thread."""
        expires = time.monotonic() + self._length.total_seconds()
        with self._lock:
            self._held[lease.run_id] = _Held(lease, expires, on_lost, on_cancel)

    def drop(self, lease: Lease) -> None:
        """Stop keeping a lease."""
        with self._lock:
            held = self._held.get(lease.run_id)
            if held is not None and held.lease.token == lease.token:
                del self._held[lease.run_id]

    def _serve(self) -> None:
        asyncio.run(self._beat())

    async def _beat(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._lock:
                held = list(self._held.values())
            if held:
                await self._extend(held)

    async def _extend(self, held: list[_Held]) -> None:
        # Taken before the request: the store counts from when it sees it, which is later.
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._length.total_seconds()):
                report = await self._store.extend_leases([h.lease for h in held], self._length)
        except (StoreError, TimeoutError) as exc:
            logger.warning("heartbeat failed", extra={"error": type(exc).__name__})
            report = {}
        for entry in held:
            if self._is_held(entry.lease):
                self._tell(entry, report.get(entry.lease.run_id), asked_at)

    def _tell(self, entry: _Held, beat: Heartbeat | None, asked_at: float) -> None:
        # Without a word from the store: past its time, somebody else may have it.
        is_lost = time.monotonic() >= entry.expires if beat is None else beat.lost
        if is_lost:
            logger.warning("lease lost", extra={"run_id": entry.lease.run_id})
            self.drop(entry.lease)
            entry.on_lost()
        elif beat is not None:
            self._renew(entry, asked_at + self._length.total_seconds())
            if beat.cancel_requested:
                entry.on_cancel()

    def _is_held(self, lease: Lease) -> bool:
        """Whether the attempt still runs; it may have ended while the store was being asked."""
        with self._lock:
            current = self._held.get(lease.run_id)
            return current is not None and current.lease.token == lease.token

    def _renew(self, entry: _Held, expires: float) -> None:
        with self._lock:
            current = self._held.get(entry.lease.run_id)
            if current is not None and current.lease.token == entry.lease.token:
                self._held[entry.lease.run_id] = _Held(
                    entry.lease, expires, entry.on_lost, entry.on_cancel
                )
