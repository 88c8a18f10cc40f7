"""`RunStore`, the port to everything about runs but their checkpoints.

A verb is a whole transition: it happens entirely, with its audit events, or not at all, in one
transaction. Verbs of an attempt take its `Lease`; a verb whose lease is no longer the run's raises
`LeaseLostError` and changes nothing. Leases are judged by the store's own clock.

Every sentence in the docstrings below is a rule for each backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

from agentflow.types import (
    Approval,
    ApprovalRequest,
    AttemptStart,
    AuditEvent,
    ClaimedRun,
    DeadLetter,
    Decision,
    FencingToken,
    Heartbeat,
    Lease,
    NewWait,
    Page,
    Run,
    RunFailure,
    RunSpec,
    RunStatus,
    WaitStatus,
)

OnExisting = Literal["return", "reject", "restart_if_failed"]


class RunStore(ABC):
    """Runs, leases, waits, audit events and dead letters of all tenants in one database.

    A run whose cancellation was requested becomes `cancelled` by `park_run`, `retry_run`,
    `fail_run` and `release_run`.
    """

    @abstractmethod
    async def create_run(
        self, tenant: str, spec: RunSpec, *, on_existing: OnExisting
    ) -> tuple[Run, bool]:
        """Store a new run as `queued`; it is durable on return.

        The same id with the same graph and input gives the stored run and `False` (`return`), is
        `IdempotencyConflictError` (`reject`), or queues a failed run again with a new attempt
        budget (`restart_if_failed`). The same id with another graph, thread or input is always
        `IdempotencyConflictError`. Events: `run.submitted`, or `run.requeued`.
        """

    @abstractmethod
    async def get_run(self, tenant: str, run_id: str) -> Run:
        """Return a run; `NotFoundError` if there is none."""

    @abstractmethod
    async def list_runs(
        self,
        tenant: str,
        *,
        status: RunStatus | None,
        graph: str | None,
        thread_id: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Run]:
        """Return a page of runs, newest first."""

    @abstractmethod
    async def list_events(
        self, tenant: str, run_id: str, *, after: int, limit: int
    ) -> tuple[AuditEvent, ...]:
        """Return audit events of a run with numbers above `after`, in order."""

    @abstractmethod
    async def find_dead_letter(self, tenant: str, run_id: str) -> DeadLetter | None:
        """Return the dead letter of a run, or `None`."""

    @abstractmethod
    async def claim_runs(
        self,
        tenant: str,
        *,
        worker: str,
        queues: Collection[str],
        graphs: Collection[tuple[str, str]],
        limit: int,
        lease: timedelta,
    ) -> list[ClaimedRun]:
        """Take up to `limit` runs that are due: higher priority first, then the older.

        Due is a queued run whose time has come, and a running one whose lease has expired; in one
        of `queues`, of one of the `graphs` (name and version), and the oldest unfinished run of its
        thread. Each gets a lease under a token higher than any before on its thread. Its attempt
        and its claims are counted now, so that a run that kills its worker is counted too. No run
        is given to two claimers. An expired run whose cancellation was requested becomes
        `cancelled` instead.
        Events: `run.claimed`, before it `run.recovered` for an expired one.
        """

    @abstractmethod
    async def claim_run(
        self, tenant: str, run_id: str, *, worker: str, lease: timedelta
    ) -> ClaimedRun | None:
        """Take one run if it is due by the rules of `claim_runs`.

        `None` if it has ended, waits, or its time has not come; `ThreadBusyError` if it, or another
        run of its thread, is in the way.
        """

    @abstractmethod
    async def raise_token(self, lease: Lease, *, above: FencingToken) -> Lease:
        """Return the lease under a new token, higher than `above` and than any before."""

    @abstractmethod
    async def extend_leases(
        self, leases: Sequence[Lease], duration: timedelta
    ) -> Mapping[str, Heartbeat]:
        """Extend each lease that still holds, and report on all of them by run id.

        A lease that has expired and was not taken over is lost all the same.
        """

    @abstractmethod
    async def start_attempt(
        self,
        lease: Lease,
        *,
        progress: str,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
        traceparent: str | None,
    ) -> AttemptStart:
        """Note, before the first step, that an attempt begins and from where.

        `progress` names what is durable. If it differs from the last attempt's, the count of
        attempts starts anew: with this one, or, if the last one lost its worker, with that one. The
        failures per task start anew if `checkpoint_id` differs. Event: `run.started` if `reason` is
        `start`, else one `run.resumed` with reason and checkpoint.
        """

    @abstractmethod
    async def park_run(
        self, lease: Lease, waits: Sequence[NewWait], *, checkpoint_id: str | None, step: int | None
    ) -> None:
        """Give the run up until one of its waits is resolved.

        A wait that exists for the same question is kept; a pending one that is not asked any more
        becomes `superseded`. The run becomes `waiting`, or `queued` if a wait was resolved
        meanwhile and not delivered. The lease ends and the attempts are cleared.
        Events: `approval.requested` for each new wait, `run.parked`.
        """

    @abstractmethod
    async def finish_run(
        self, lease: Lease, output: Any, *, checkpoint_id: str | None, step: int | None
    ) -> None:
        """End the run as `succeeded`; its lease ends. Event: `run.succeeded`."""

    @abstractmethod
    async def retry_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        delay: timedelta,
        failures: Mapping[str, int],
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        """Queue the run again after `delay`; its lease ends. Event: `run.retried`.

        `failures` counts for as long as the thread stands at `checkpoint_id`.
        """

    @abstractmethod
    async def fail_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        """End the run as `failed` and keep a dead letter, together; its lease ends.

        Pending waits become `withdrawn`. Event: `run.failed` with the reason.
        """

    @abstractmethod
    async def release_run(self, lease: Lease, *, reason: str, counts: bool) -> None:
        """Queue the run again, for at once. Event: `run.released`.

        Its attempts are cleared, unless this one `counts`.
        """

    @abstractmethod
    async def finish_cancel(self, lease: Lease) -> None:
        """End the run as `cancelled`, as was requested; its lease ends. Event: `run.cancelled`."""

    @abstractmethod
    async def cancel_run(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        """Cancel a run: at once if it is queued or waiting, by request if it is running.

        Pending waits become `withdrawn`. A cancelled run is returned as it is; a run that succeeded
        or failed is `IllegalTransitionError`. Event: `run.cancelled` or `run.cancel_requested`.
        """

    @abstractmethod
    async def get_wait(self, tenant: str, wait_id: str) -> Approval:
        """Return a wait; `NotFoundError` if there is none."""

    @abstractmethod
    async def list_waits(
        self,
        tenant: str,
        *,
        status: WaitStatus | None,
        run_id: str | None,
        graph: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Approval]:
        """Return a page of waits, oldest first."""

    @abstractmethod
    async def resolve_wait(
        self,
        tenant: str,
        wait_id: str,
        decision: Decision,
        *,
        by: str,
        comment: str | None,
        version: int | None,
        idempotency_key: str | None,
        request: ApprovalRequest,
    ) -> Approval:
        """Record the decision on a pending wait, once, and queue its run if it waits.

        `request` is what the decision was checked against; a wait that asks something else by now
        is `VersionChangedError`, and so is one that is not at `version`. A wait that was resolved
        under the same idempotency key by the same decision gives the stored result; any other
        resolved one is `AlreadyResolvedError`, and one that is gone `SupersededError`. Event:
        `approval.resolved`.
        """

    @abstractmethod
    async def rotate_keys(self, tell: Callable[[int, int], None]) -> int:
        """Seal by the current key what is not, of all tenants, and return how much that was.

        Killed at any point it leaves everything readable. `tell` is called with what was looked
        through and what was sealed so far.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close what the store opened."""
