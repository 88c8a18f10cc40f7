"""How an attempt gives its run back: to whoever it waits for, to the queue, or to its end.

All checkpoints are flushed and the thread is given back before the run store hears of an outcome;
whoever is told of one finds what it says, and can write the thread at once. If this process dies in
between, the run is recovered and takes the thread again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError, GraphRecursionError, InvalidUpdateError
from langgraph.types import StateSnapshot
from opentelemetry.trace import Span

from agentflow.checkpoint import Saver
from agentflow.control import AttemptControl
from agentflow.drive import failures
from agentflow.drive.failures import Failed
from agentflow.drive.graph import RegisteredGraph
from agentflow.errors import (
    AttemptsExhaustedError,
    DeadlineExceededError,
    FencedError,
    IncompatibleGraphError,
    NotFoundError,
    StoreUnavailableError,
    UnknownVersionError,
)
from agentflow.retry import GiveUp, Retry, RetryPolicies, decide
from agentflow.storage import RunStore
from agentflow.telemetry import RUN_STATUS
from agentflow.types import ClaimedRun, Lease, NewWait

logger = logging.getLogger(__name__)

INCOMPATIBLE = (IncompatibleGraphError, UnknownVersionError)
"""What is no fault of the run's: another program, of another release, can go on with it."""
# LangGraph's own errors that the same call would only raise again.
_HOPELESS = (GraphRecursionError, InvalidUpdateError, EmptyInputError)


class Settlement:
    """The ways in which the attempt under one lease can end."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        registered: RegisteredGraph,
        claimed: ClaimedRun,
        control: AttemptControl,
    ) -> None:
        """Settle in `store` what becomes of `claimed`, whose thread `saver` holds."""
        self._store = store
        self._saver = saver
        self._registered = registered
        self._run = claimed.run
        self._lease = claimed.lease
        self._control = control
        self._is_released = False

    def held(self) -> Lease:
        """Return the lease for a verb of the run store, if it still holds."""
        self._control.check()
        return self._lease

    def _held_to_the_end(self) -> Lease:
        """Return the lease for the verb with which it ends."""
        self._control.is_settling = True
        return self.held()

    async def park(
        self, state: StateSnapshot, waits: Sequence[NewWait], span: Span, progress: str | None
    ) -> None:
        """Leave the run waiting for answers; `progress` names what is durable, if it is known."""
        await self.release_thread()
        held = self._held_to_the_end()
        await self._store.park_run(held, waits, progress=progress, **_place(state))
        span.set_attribute(RUN_STATUS, "waiting")

    async def finish(self, state: StateSnapshot, output: Any, span: Span) -> None:
        """End the run with what its graph has made."""
        await self.release_thread()
        await self._store.finish_run(self._held_to_the_end(), output, **_place(state))
        span.set_attribute(RUN_STATUS, "succeeded")

    async def cancel(self, span: Span) -> None:
        """End the run as cancelled, after its hook; a hook that fails does not keep it."""
        try:
            await self._registered.tell_cancelled(self._run)
        except Exception as exc:  # noqa: BLE001 -- user code
            logger.warning(
                "the hook on cancel failed",
                extra={"run_id": self._run.id, "error": type(exc).__name__},
            )
        await self.end_cancelled(span)

    async def end_cancelled(self, span: Span) -> None:
        """End the run as cancelled."""
        await self.release_thread()
        await self._store.finish_cancel(self._held_to_the_end())
        span.set_attribute(RUN_STATUS, "cancelled")

    async def end_undone(self, cause: Mapping[str, Any], span: Span) -> None:
        """End a run whose effects have been undone as it was to end before that."""
        if cause["kind"] == "cancelled":
            await self.end_cancelled(span)
            return
        await self.release_thread()
        await self._store.fail_run(
            self._held_to_the_end(),
            cause["failure"],
            reason=cause["reason"],
            checkpoint_id=cause["checkpoint_id"],
            step=cause["step"],
        )
        span.set_attribute(RUN_STATUS, "failed")

    async def requeue(self, reason: str, span: Span, delay: timedelta = timedelta(0)) -> None:
        """Queue the run again, which was stopped between two supersteps; the attempt is free."""
        await self.release_thread()
        await self._store.release_run(
            self._held_to_the_end(), reason=reason, counts=False, delay=delay
        )
        span.set_attribute(RUN_STATUS, "queued")

    async def give_back(self, *, counts: bool) -> None:
        """Queue the run again, because whoever drives it is going away.

        The attempt counts once a node may have run, since that may be the reason: one that calls
        `sys.exit` takes its worker with it.
        """
        try:
            await self.flush_quietly()
            await self.release_thread()
            await self._store.release_run(self._held_to_the_end(), reason="drain", counts=counts)
        except (FencedError, StoreUnavailableError, NotFoundError) as exc:
            logger.warning(
                "run was not given back",
                extra={"run_id": self._run.id, "error": type(exc).__name__},
            )

    async def fail(
        self, error: Exception, failed: Failed, policies: RetryPolicies, span: Span
    ) -> None:
        """Queue a run that has failed again, pause it, or end it with a dead letter."""
        failure = failures.describe(error, failed.node, failed.attempt)
        await self.release_thread()
        verdict = _judge(error, failed, policies)
        place: dict[str, Any] = {"checkpoint_id": failed.checkpoint_id, "step": failed.step}
        if isinstance(verdict, Retry):
            await self._store.retry_run(
                self._held_to_the_end(),
                failure,
                delay=verdict.delay,
                failures=failed.failures,
                **place,
            )
            span.set_attribute(RUN_STATUS, "queued")
            return
        is_paused = isinstance(error, INCOMPATIBLE) or (
            verdict.reason == "exhausted" and policies.of(failed.node).on_exhausted == "pause"
        )
        end = self._store.pause_failed_run if is_paused else self._store.fail_run
        await end(self._held_to_the_end(), failure, reason=verdict.reason, **place)
        span.set_attribute(RUN_STATUS, "queued" if is_paused else "failed")

    async def flush(self) -> None:
        """Return when what the graph has written is durable."""
        if isinstance(self._saver, Saver):
            await self._saver.flush(self._run.thread_id)

    async def flush_quietly(self) -> None:
        """Flush before an outcome that is news of its own; only a lost thread is told."""
        try:
            await self.flush()
        except FencedError:
            raise
        except Exception:  # noqa: BLE001 -- the outcome that is being settled is the news
            logger.warning("unsaved writes were dropped", extra={"run_id": self._run.id})

    async def release_thread(self) -> None:
        """Give the thread back, once."""
        if isinstance(self._saver, Saver) and not self._control.is_over and not self._is_released:
            self._is_released = True
            await asyncio.shield(self._saver.release(self._lease))


def _judge(error: Exception, failed: Failed, policies: RetryPolicies) -> Retry | GiveUp:
    if isinstance(error, INCOMPATIBLE):
        return GiveUp("incompatible")
    if isinstance(error, _HOPELESS):
        return GiveUp("not_retryable")
    if isinstance(error, DeadlineExceededError):
        return GiveUp("deadline")
    if isinstance(error, AttemptsExhaustedError):
        return GiveUp("exhausted")
    return decide(policies.of(failed.node), failed.attempt, error)


def _place(state: StateSnapshot) -> dict[str, Any]:
    """Say where in its thread a run stands."""
    return {
        "checkpoint_id": state.config["configurable"].get("checkpoint_id"),
        "step": (state.metadata or {}).get("step"),
    }
