"""Begins an attempt and ends it, whatever happens in between."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow import upstream
from agentflow.checkpoint import Saver
from agentflow.control import AttemptControl, entered
from agentflow.drive.attempt import Attempt
from agentflow.drive.graph import RegisteredGraph
from agentflow.errors import (
    FencedError,
    IncompatibleGraphError,
    StoreUnavailableError,
    UnknownVersionError,
)
from agentflow.lease import LeaseKeeper
from agentflow.storage import Opening, RunStore
from agentflow.telemetry import fail_span, segment_span
from agentflow.threads import NodeThreads
from agentflow.types import ClaimedRun, Lease

logger = logging.getLogger(__name__)


class Driver:
    """Drives attempts against one run store and one checkpointer."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        keeper: LeaseKeeper,
        threads: NodeThreads,
    ) -> None:
        """Use `store` for runs, `saver` for their checkpoints, and let `keeper` keep the leases.

        `threads` are those of the event loop.
        """
        upstream.mend()
        self._store = store
        self._saver = saver
        self._keeper = keeper
        self._threads = threads

    async def attempt(
        self,
        registered: RegisteredGraph,
        claimed: ClaimedRun,
        control: AttemptControl,
        *,
        since: float,
        stored: asyncio.Event | None = None,
    ) -> IncompatibleGraphError | UnknownVersionError | None:
        """Drive a claimed run until it parks, ends, or has to be given up.

        Whatever happens is in the run store afterwards, unless the lease was lost or the store
        cannot be reached: then another attempt will continue from what is durable.

        Args:
            registered: The run's graph.
            claimed: The run, and the lease to drive it under.
            control: How to stop it; not used before.
            since: When the claim was asked for, by `monotonic`.
            stored: Set when the claim is durable, if it is not yet; the graph is not driven before.
                Whoever finds that it was not stored has `control` lose the lease.

        Returns:
            Why the run is paused, if it cannot go on with the graph.

        Raises:
            asyncio.CancelledError: The caller was cancelled; the run was released first.
        """
        lease = claimed.lease
        with segment_span(claimed) as span, entered(control):
            try:
                self._keeper.hold(lease, control, since=since)
                held = claimed
                if claimed.thread is None:
                    acquired = await acquire(self._store, self._saver, lease)
                    if acquired != lease:
                        self._keeper.drop(lease, control)
                        lease = acquired
                        self._keeper.hold(lease, control, since=since)
                    held = replace(claimed, lease=lease)
                elif isinstance(self._saver, Saver):
                    self._saver.observe_taken(lease, claimed.thread)
                attempt = Attempt(self._store, self._saver, registered, held, control, stored)
                await attempt.run(span)
                return attempt.refused
            except FencedError as exc:
                fail_span(span, type(exc).__name__)
                logger.warning("attempt was fenced", extra={"run_id": claimed.run.id})
            except StoreUnavailableError as exc:
                fail_span(span, type(exc).__name__)
                logger.warning("store unavailable", extra={"run_id": claimed.run.id})
            finally:
                self._keeper.drop(lease, control)
                control.end()
                self._threads.forsake(control)
        return None


@contextmanager
def drained_by_interrupt(control: AttemptControl) -> Iterator[None]:
    """Let the first interrupt at the keyboard drain an attempt; it goes on when that has ended.

    The second one is not for us. Nor is any where somebody has decided to ignore them, or in
    another thread than the main one, which gets none.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    interrupted: list[FrameType | None] = []

    def drain(number: int, frame: FrameType | None) -> None:
        interrupted.append(frame)
        signal.signal(number, usual)
        control.drain()

    signal.signal(signal.SIGINT, drain)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is drain:
            signal.signal(signal.SIGINT, usual)
    if interrupted:
        usual(signal.SIGINT, None)


async def end_cancelled(
    store: RunStore, saver: BaseCheckpointSaver[Any], claimed: ClaimedRun
) -> None:
    """End a claimed run as cancelled, without driving it."""
    lease = await acquire(store, saver, claimed.lease)
    if isinstance(saver, Saver):
        await saver.release(lease)
    await store.finish_cancel(lease)


def opening(
    saver: BaseCheckpointSaver[Any], graphs: Mapping[tuple[str, str], RegisteredGraph]
) -> Opening | None:
    """Return how a claim opens an attempt, if runs are in the database of their checkpoints."""
    if not isinstance(saver, Saver):
        return None
    fingerprints = {key: each.fingerprint.digest for key, each in graphs.items()}
    return Opening(take_thread=saver.take_within, fingerprints=fingerprints)


async def acquire(store: RunStore, saver: BaseCheckpointSaver[Any], lease: Lease) -> Lease:
    """Raise the token in the checkpointer; from then on no earlier attempt can write."""
    if not isinstance(saver, Saver):
        return lease
    while (token := await saver.acquire(lease)) > lease.token:
        # The checkpointer has seen more claims than the run store, which was restored or moved.
        lease = await store.raise_token(lease, above=token)
    return lease
