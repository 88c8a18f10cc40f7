"""`RunStore`, the port to everything about runs but their checkpoints.

A verb is a whole transition: it happens entirely, with its audit events, or not at all, in one
transaction. Verbs of an attempt take its `Lease`; a verb whose lease is no longer the run's raises
`LeaseLostError` and changes nothing. Leases are judged by the store's own clock; so are times of
starting, backoff and deadlines, unless the store was given a `Clock` for them.

Every sentence in the docstrings below is a rule for each backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from agentflow.codec import Codec
from agentflow.journal import Begun, Effect, EffectStatus, NewEffect, Outcome, Resolution
from agentflow.storage.evolution import VersionVerbs
from agentflow.storage.integrity import IntegrityVerbs
from agentflow.storage.opening import Claimant, Created, Opening, Resolved
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
    NextDue,
    Page,
    Pause,
    PauseScope,
    Restored,
    Run,
    RunFailure,
    RunSpec,
    RunStatus,
    Survey,
    WaitStatus,
    WorkerRecord,
    WorkerReport,
)

OnExisting = Literal["return", "reject", "restart_if_failed"]
OnBusy = Literal["enqueue", "reject", "interrupt", "rollback"]
"""What becomes of a new run whose thread has unfinished ones; LangGraph's multitask strategies."""
ChangeKind = Literal["due", "settled", "stop"]
"""`due`: a run may have become claimable. `settled`: a run parked or ended. `stop`: a run that is
being driven may have to stop."""


class RunStore(VersionVerbs, IntegrityVerbs, ABC):
    """Runs, leases, waits, audit events and dead letters of all tenants in one database.

    A run whose cancellation was requested becomes `cancelled` by `park_run`, `retry_run`,
    `fail_run`, `pause_failed_run` and `release_run`. What is paused, a run by itself or all of a
    graph, a queue, a tenant or the store, keeps its status and is not claimed; it can be cancelled,
    decided about and read as always, and its deadlines go on.

    Events that concern no single run stand in the tenant's own log, under the run id `""`.
    """

    @abstractmethod
    async def create_run(
        self,
        tenant: str,
        spec: RunSpec,
        *,
        on_existing: OnExisting,
        on_busy: OnBusy = "enqueue",
        claimant: Claimant | None = None,
    ) -> Created:
        """Store a new run as `queued`; it is durable on return.

        The same id with the same graph and input gives the stored run and `False` (`return`), is
        `IdempotencyConflictError` (`reject`), or queues a failed run again with a new attempt
        budget (`restart_if_failed`). The same id with another graph, thread or input is always
        `IdempotencyConflictError`. Events: `run.submitted`, or `run.requeued`.

        `on_busy` says what happens if the thread has unfinished runs: the new one waits for them
        (`enqueue`), or is refused with `ThreadBusyError` (`reject`), or they are cancelled as by
        `cancel_run`, in the same transaction (`interrupt`, `rollback`), and the new one follows
        when the last of them has ended. After `rollback`, claims of the thread say whose
        checkpoints to delete first, for each of those runs that did end as `cancelled`.

        A new run that is due by the rules of `claim_runs` may be claimed for `claimant`, who has
        room for it, in the same transaction.
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
        """Return a page of runs, newest first.

        What cannot be read is among `Page.unreadable`, in this and all other listings in pages.
        """

    @abstractmethod
    async def list_events(
        self, tenant: str, run_id: str, *, after: int, limit: int
    ) -> tuple[AuditEvent, ...]:
        """Return audit events of a run with numbers above `after`, in order.

        Those of the tenant's own log stand under the run id `""`.
        """

    @abstractmethod
    async def claim_runs(
        self,
        tenant: str,
        *,
        worker: str,
        instance: str | None = None,
        queues: Collection[str],
        graphs: Collection[tuple[str, str]],
        limit: int,
        lease: timedelta,
        opening: Opening | None = None,
    ) -> list[ClaimedRun]:
        """Take up to `limit` runs that are due: higher priority first, then the older.

        Due is a queued run whose time has come and whose start deadline has not, and a running one
        whose lease has expired; in one of `queues`, of one of the `graphs` (name and version), not
        paused, and the oldest unfinished run of its thread. Each gets a lease under a token higher
        than any before on its thread. No run is given to two claimers. A start deadline is met by
        the claim.

        A run that is not what its events say, or that cannot be read, is paused (events, if its
        chain is whole: `run.unreadable`, `run.paused`); one whose classes or key are not here is
        left to others, and one whose key cannot be had now is put off.
        Events: `run.claimed`, before it `run.recovered` for an expired one.

        Its attempt and its claims are counted now, so that a run that kills its worker is counted
        too. `instance` names one start of one worker (by default, `worker` does). The attempt that
        an expired run has lost counts if the instance that lost it held no other run at the time,
        or if the run was in isolation; otherwise another run may have killed the worker, and the
        lost attempt is counted in `losses` alone. A run that lost two attempts or more since its
        last progress is a suspect: it is claimed alone, in isolation, for as long as the lost
        attempt may have lived.

        `opening` lets the attempt be opened in the same transaction, with the events of
        `start_attempt`, which is not called for it then; `ClaimedRun` says what was. A store that
        shares no database with the checkpointer is given none.
        """

    @abstractmethod
    async def claim_run(
        self,
        tenant: str,
        run_id: str,
        *,
        worker: str,
        instance: str | None = None,
        lease: timedelta,
        although_paused: bool = False,
        opening: Opening | None = None,
    ) -> ClaimedRun | None:
        """Take one run if it is due by the rules of `claim_runs`.

        `None` if it has ended, waits, or its time has not come; `ThreadBusyError` if it, or another
        run of its thread, is in the way; `PausedError` if it is paused, unless it is taken
        `although_paused`.
        """

    @abstractmethod
    async def raise_token(self, lease: Lease, *, above: FencingToken) -> Lease:
        """Return the lease under a new token, higher than `above` and than any before."""

    @abstractmethod
    async def extend_leases(
        self, leases: Sequence[Lease], duration: timedelta
    ) -> Mapping[str, Heartbeat]:
        """Extend each lease that still holds, and report on all of them by run id.

        A lease that has expired and was not taken over is lost all the same. The report says
        whether the attempt is to stop: since the run is to be cancelled, has passed its deadline,
        or is paused, in this order.
        """

    @abstractmethod
    async def end_isolation(self, lease: Lease) -> None:
        """Note that the isolation of a run is over: it has made progress, or its time has passed.

        To be called before the worker claims anything else. It becomes a suspect again when it has
        lost two more attempts.
        """

    @abstractmethod
    async def finish_rollback(self, lease: Lease, run_ids: Collection[str]) -> None:
        """Note that the checkpoints of rolled back runs of the lease's thread are gone.

        Claims do not name them any more. Event, of each of those runs: `run.rolled_back`.
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
        effect_shift: int | None = None,
        fingerprint: str | None = None,
        graph_changed: Mapping[str, Any] | None = None,
    ) -> AttemptStart:
        """Note, before the first step, that an attempt begins and from where.

        `progress` names what is durable. If it differs from the last attempt's, the counts of
        attempts and losses start anew: with this one, or, if the last one was lost with its worker,
        with that one. The failures per task start anew if `checkpoint_id` differs. `resume_from` is
        forgotten: the caller has made that checkpoint the thread's head before, and `effect_shift`
        says by how many supersteps that has moved what follows. If the run is to be
        cancelled, is paused by itself or has passed its deadline, that is said. Event:
        `run.started` if `reason` is `start`, else one `run.resumed` with reason and checkpoint.

        `fingerprint` is that of the graph that is going to be driven, and `graph_changed` what is
        to be told of it if the thread was left by another one. Event, before the others:
        `run.graph_changed`.
        """

    @abstractmethod
    async def park_run(
        self,
        lease: Lease,
        waits: Sequence[NewWait],
        *,
        checkpoint_id: str | None,
        step: int | None,
        progress: str | None = None,
    ) -> None:
        """Give the run up until one of its waits is resolved.

        A wait that exists for the same question is kept; a pending one that is not asked any more
        becomes `superseded`. The run becomes `waiting`, or `queued` if a wait was resolved
        meanwhile and not delivered. The lease ends; attempts and losses are cleared. `progress`
        says what is durable, as in `start_attempt`.
        Events: `approval.requested` for each new wait, before it `effect.in_doubt` if it is about
        an effect, `run.parked`.
        """

    @abstractmethod
    async def finish_run(
        self, lease: Lease, output: Any, *, checkpoint_id: str | None, step: int | None
    ) -> None:
        """End the run as `succeeded`; its lease ends. Event: `run.succeeded`.

        An output that cannot be stored, or is too large (`PayloadTooLargeError`), changes nothing.
        """

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

        Pending waits become `withdrawn`. What is too long of a message or traceback is cut. Event:
        `run.failed` with the reason.
        """

    @abstractmethod
    async def pause_failed_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        """Queue the run again, paused, instead of failing it; its lease ends.

        Whoever resumes it gives it a new attempt budget. Event: `run.paused` with the reason. With
        the reason `incompatible` it counts as such in a survey for as long as it is paused.
        """

    @abstractmethod
    async def release_run(
        self, lease: Lease, *, reason: str, counts: bool, delay: timedelta = timedelta(0)
    ) -> None:
        """Queue the run again, for at once or after `delay`. Event: `run.released`.

        Its attempts and losses are cleared, unless this one `counts`.
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
        or failed is `IllegalTransitionError`. The first reason is kept. Event: `run.cancelled` or
        `run.cancel_requested`.
        """

    @abstractmethod
    async def pause_run(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        """Pause a run; one that is running is asked to stop at its next superstep.

        A paused run is returned as it is; one that has ended is `IllegalTransitionError`. Event:
        `run.paused`.
        """

    @abstractmethod
    async def resume_run(self, tenant: str, run_id: str, *, by: str | None) -> Run:
        """Let a paused run go on, with a new attempt budget if it was paused by a failure.

        A run that is not paused is returned as it is; one that has ended is
        `IllegalTransitionError`. Event: `run.unpaused`.
        """

    @abstractmethod
    async def pause(
        self, tenant: str, scope: PauseScope, name: str, *, reason: str | None, by: str | None
    ) -> Pause:
        """Pause all runs of a graph or a queue (`name`), or all of the tenant; also future ones.

        Those that are running are asked to stop at their next superstep. What is paused already is
        returned as it is. Event, in the tenant's own log: `<scope>.paused`.
        """

    @abstractmethod
    async def resume(self, tenant: str, scope: PauseScope, name: str, *, by: str | None) -> bool:
        """End a pause and say whether there was one. Event, likewise: `<scope>.unpaused`.

        Runs that are paused by themselves, or by another pause, stay so. The scope `store` ends
        the pause that `restore` has made, for all tenants.
        """

    @abstractmethod
    async def list_pauses(self, tenant: str) -> tuple[Pause, ...]:
        """Return what is paused, but for single runs; the oldest first."""

    @abstractmethod
    async def fire_due(self, tenant: str, *, limit: int) -> int:
        """End up to `limit` runs whose time is over, and return how many that were.

        A queued run that nobody claimed by its start deadline becomes `cancelled`. A waiting or
        queued run at its deadline becomes `failed`, with a dead letter; its pending waits become
        `expired`. A running one is left to whoever holds or recovers it. Events: `run.cancelled` or
        `run.failed`, with the reason `start_deadline` or `deadline`.
        """

    @abstractmethod
    async def next_due(
        self, tenant: str, *, queues: Collection[str], graphs: Collection[tuple[str, str]]
    ) -> NextDue:
        """Say whether there is something to claim, and how long it is until something happens.

        That is until the next lease of a run in one of `queues` and of one of the `graphs` expires,
        leases that have expired apart, and until the next deadline that `fire_due` will see to. It
        only reads, so that idle workers disturb nobody.
        """

    @abstractmethod
    async def list_dead_letters(
        self,
        tenant: str,
        *,
        graph: str | None,
        reason: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[DeadLetter]:
        """Return a page of dead letters, newest first."""

    @abstractmethod
    async def find_dead_letter(self, tenant: str, run_id: str) -> DeadLetter | None:
        """Return the dead letter of a run, or `None`."""

    @abstractmethod
    async def requeue_dead_letter(
        self, tenant: str, run_id: str, *, checkpoint_id: str | None, by: str | None
    ) -> Run:
        """Queue a failed run again, with a new attempt budget and its whole time, once.

        It continues from where it failed, or, by `resume_from`, from `checkpoint_id`; if another
        run of its thread has started since it failed, from its own newest checkpoint; if its
        effects were undone, from its start (`FROM_START`). Its dead letter is gone. A run without
        one is `NotDeadLetterError`. Event: `run.requeued`.
        """

    @abstractmethod
    async def discard_dead_letter(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        """Delete the dead letter of a run, which stays `failed`.

        A run without one is `NotDeadLetterError`. Event: `dead_letter.discarded`.
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
        claimant: Claimant | None = None,
    ) -> Resolved:
        """Record the decision on a pending wait, once, and queue its run if it waits.

        `request` is what the decision was checked against; a wait that asks something else by now
        is `VersionChangedError`, and so is one that is not at `version`. A wait that was resolved
        under the same idempotency key by the same decision gives the stored result; any other
        resolved one is `AlreadyResolvedError`, and one that is gone `SupersededError`. Event:
        `approval.resolved`.

        What is said of an effect in doubt is written to its record together with that, as by
        `resolve_effect`; a `reject` cancels the run instead, as by `cancel_run`.

        A run that is queued by it may be claimed for `claimant`, as by `create_run`.
        """

    @abstractmethod
    async def claim_reopening(
        self, tenant: str, wait_id: str, *, worker: str, lease: timedelta, by: str
    ) -> ClaimedRun:
        """Take the run of a resolved approval, in order to take that decision back.

        It may be due, wait, be paused, or be in the dead letter, which it leaves. It is paused, if
        it was not, until `reopen_wait`. `ConflictError` if the approval is not resolved, is about
        an effect or a budget, or its run has ended otherwise; `ThreadBusyError` if it is being
        driven. Events: as of `claim_runs`, and `run.requeued`.
        """

    @abstractmethod
    async def reopen_wait(
        self, lease: Lease, wait_id: str, *, by: str, comment: str | None
    ) -> Approval:
        """Make a resolved approval pending again, under its id, and queue its run.

        What the same task has asked after it becomes `superseded`. Attempts are cleared; the pause
        of `claim_reopening` ends. Events: `approval.reopened`, `approval.superseded`.
        """

    @abstractmethod
    async def begin_effect(
        self, lease: Lease, new: NewEffect, *, retake: int | None = None
    ) -> Begun:
        """Make the intent of a call durable, or return what is known of one under the same key.

        It is due, and then the caller's to make, if nothing is known under the key, if somebody
        said that it did not happen, or if it was not called. `retake` is the attempt after which
        the caller wants it called again: it is due if it has not gone beyond that, has not
        succeeded, and no living attempt of another run is at it. An attempt is counted whenever it
        becomes due. Another function, or other arguments, under a known key are
        `EffectConflictError`. Event, if it is due: `effect.intended`.
        """

    @abstractmethod
    async def finish_effect(self, lease: Lease, effect_id: str, outcome: Outcome) -> bool:
        """Record what came of a call that became due under this lease, and say whether it counts.

        It does as long as nobody has said otherwise, whether the lease still holds or not; a
        pending question about it becomes `superseded` and a waiting run is queued. Otherwise it is
        kept as a late one, the run is paused, and the event is `effect.late_outcome`. Events:
        `effect.succeeded`, `effect.failed`, `effect.not_called`.

        An outcome that cannot be stored, or is too large (`PayloadTooLargeError`), changes nothing.
        """

    @abstractmethod
    async def resolve_effect(self, tenant: str, effect_id: str, resolution: Resolution) -> Effect:
        """Record what somebody says of an effect that is in doubt or failed.

        Pending questions about it become `superseded`, and a waiting run is queued. One that is
        under way, or of which the outcome is known, is `ConflictError`; but an outcome that a
        person gave may be corrected when its run has failed. Of a compensation that did not
        happen, whose run has failed, another call is made: the run is queued for that; when all
        have happened, it is `compensated`. Event: `effect.resolved`.
        """

    @abstractmethod
    async def get_effect(self, tenant: str, effect_id: str) -> Effect:
        """Return an effect; `NotFoundError` if there is none."""

    @abstractmethod
    async def list_effects(
        self,
        tenant: str,
        *,
        run_id: str | None = None,
        scope: str | None = None,
        status: EffectStatus | None = None,
        in_doubt: bool = False,
        limit: int = 100,
        cursor: str | None = None,
        strict: bool = False,
        in_rows: bool = False,
    ) -> Page[Effect]:
        """Return a page of effects, the first intended first.

        `run_id` names the run that intended them last, `scope` where their keys are unique;
        `in_doubt` leaves those that were intended by an attempt that does not hold its lease now;
        `strict` refuses outcomes of classes that are not known here; `in_rows` leaves out effects
        whose outcomes are too large for their rows and stand elsewhere.
        """

    @abstractmethod
    async def beat_worker(self, tenant: str, report: WorkerReport) -> None:
        """Note that a worker lives, and what it says about itself.

        Workers that have been silent for a day are forgotten. With the first beat of an instance,
        versions that have unfinished runs and no living worker are told; with any beat, those of
        workers that have been silent for a minute, once. Event for each, in the tenant's own log:
        `graph.stranded`.
        """

    @abstractmethod
    async def remove_worker(self, tenant: str, instance: str) -> None:
        """Forget a worker that has stopped.

        Event for each version of which it was the last worker, if it has unfinished runs, in the
        tenant's own log: `graph.stranded`.
        """

    @abstractmethod
    async def list_workers(self, tenant: str) -> tuple[WorkerRecord, ...]:
        """Return the workers that are known, by name."""

    @abstractmethod
    async def survey(self, tenant: str) -> Survey:
        """Return how a tenant's runs and workers are doing, all as of one moment."""

    @abstractmethod
    async def restore(self, *, reason: str | None, by: str | None) -> Restored:
        """Mark that the store was put back from a backup; it begins a new epoch, paused.

        Every token of every thread becomes higher than any that was given before, so that no lease
        from before holds; leases that the backup holds have expired. Nothing of any tenant is
        claimed until the pause of scope `store` is ended. Event, in the log of the tenant `""`:
        `store.restored`.
        """

    @abstractmethod
    async def prune_effects(
        self,
        tenant: str,
        *,
        ended_before: datetime,
        graphs: Collection[tuple[str, str]],
        are_others: bool,
        limit: int,
    ) -> int:
        """Delete up to `limit` effects of runs that ended before a time, and say how many.

        Of runs of `graphs` (name and version), or, if `are_others`, of all others. Those of a run
        with a dead letter are kept, since it may be requeued; so are those that a fork which has
        not ended shares, and those with keys of the whole tenant. No event.
        """

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """What encodes payloads: for those of a run that are kept elsewhere."""

    @property
    @abstractmethod
    def hears_others(self) -> bool:
        """Whether subscribers now hear of what other processes change, and need look seldom."""

    @abstractmethod
    def subscribe(
        self, kind: ChangeKind, wake: Callable[[], None], *, run_id: str | None = None
    ) -> Callable[[], None]:
        """Call `wake` soon after a change of this kind, whoever made it; return what ends that.

        With `run_id` only after those that concern this run, as far as that can be told.

        It is a hint: it may come late, twice, for nothing, or not at all, and it comes from any
        thread. Changes through this store are told at once, those of other processes where the
        database can tell.
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
