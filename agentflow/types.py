"""The records that cross agentflow's interfaces, and the clock.

Records are frozen: a change is a new record. Times are aware UTC datetimes, durations are
`timedelta`. This module and `config` are the only ones that read the wall clock or make random ids.
"""

from __future__ import annotations

import html
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, NewType, Protocol, TypeVar

from agentflow.errors import AgentflowError

Duration = timedelta | float | int
"""A length of time: a `timedelta`, or seconds."""

T = TypeVar("T")

FencingToken = NewType("FencingToken", int)
"""Grows by at least one with each claim of a thread; every write is checked against it."""


def to_timedelta(value: Duration) -> timedelta:
    """Turn seconds into a `timedelta`; a `timedelta` passes through."""
    return value if isinstance(value, timedelta) else timedelta(seconds=value)


def new_id() -> str:
    """Return a new time-ordered id (UUID version 7, RFC 9562) as text."""
    unix_ms = time.time_ns() // 1_000_000
    random = uuid.uuid4().int
    value = (unix_ms & 0xFFFF_FFFF_FFFF) << 80 | (random & ((1 << 80) - 1))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


class Clock(Protocol):
    """Where timers, deadlines and backoff read the time. Leases use the database's clock."""

    def now(self) -> datetime:
        """Return the current time as an aware UTC datetime."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Return the current time."""
        return datetime.now(UTC)


class RunStatus(StrEnum):
    """The closed set of statuses of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_ended(self) -> bool:
        """Whether nothing will happen to the run any more, unless its dead letter is requeued."""
        return self in {RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}


FROM_START = ""
"""Stands for the checkpoint from which all of a run is executed again."""

TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.CANCELLED}),
    RunStatus.RUNNING: frozenset(
        {
            RunStatus.WAITING,
            RunStatus.SUCCEEDED,
            RunStatus.FAILED,
            RunStatus.CANCELLED,
            RunStatus.QUEUED,
        }
    ),
    RunStatus.WAITING: frozenset({RunStatus.QUEUED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.SUCCEEDED: frozenset(),
    RunStatus.FAILED: frozenset({RunStatus.QUEUED}),
    RunStatus.CANCELLED: frozenset(),
}
"""Every status change that is allowed; all others are `IllegalTransitionError`."""


class WaitStatus(StrEnum):
    """What became of a wait."""

    PENDING = "pending"
    RESOLVED = "resolved"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"
    SUPERSEDED = "superseded"


DecisionType = Literal["approve", "edit", "reject", "respond"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailure:
    """Why an attempt, or a run, failed."""

    type: str
    """The exception's class, as `module.Name`."""
    message: str
    node: str | None = None
    attempt: int = 0
    traceback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request to advance a thread, as it stood when it was read."""

    id: str
    thread_id: str
    tenant: str
    graph: str
    version: str
    queue: str
    status: RunStatus
    input: Any
    output: Any = None
    error: RunFailure | None = None
    """The last failure, also while the run is queued for another attempt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """`configurable`, `recursion_limit`, `tags`: what is needed to drive the run again."""
    priority: int = 0
    attempt: int = 0
    """Attempts since the last durable progress or clean release."""
    claims: int = 0
    """How often the run was claimed in all."""
    losses: int = 0
    """Attempts since then that were lost with their worker; `AttemptStart` says which count."""
    step: int | None = None
    """The superstep of the newest checkpoint known to the run store."""
    checkpoint_id: str | None = None
    resume_from: str | None = None
    """The checkpoint that the next attempt starts from, instead of the thread's head; or
    `FROM_START`, the one before any of its nodes has run."""
    retry: Mapping[str, Any] | None = None
    """The retry policy as it was when the run was submitted, as plain data."""
    dead_letter: bool = False
    created_at: datetime
    available_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    paused_at: datetime | None = None
    """Since when the run is not to be driven; its status stays what it is."""
    start_deadline_at: datetime | None = None
    """When the run is cancelled if nobody has claimed it."""
    deadline_at: datetime | None = None
    """When the run fails unless it has ended."""
    cancel_requested_at: datetime | None = None
    cancel_reason: str | None = None
    submitted_by: str | None = None
    root_id: str | None = None
    """The run whose effects are not repeated, if this one is a fork."""
    forked_from: str | None = None
    effect_shift: int = 0
    """Supersteps that forks and requeues have added; effects are known by the others."""
    saga: str | None = None
    """`compensating` while effects are being undone; then `compensated`, or
    `partially_compensated` if not all could be."""
    saga_cause: Mapping[str, Any] | None = None
    """How it ends after that: `kind` is `failed` or `cancelled`."""
    fingerprint: str | None = None
    """Of the graph that it was last driven with, or submitted for."""

    def _repr_html_(self) -> str:
        return _html_table(
            f"Run {self.id}",
            {
                "graph": f"{self.graph} (version {self.version})",
                "status": self.status.value,
                "thread": self.thread_id,
                "attempt": self.attempt,
                "step": self.step,
                "output": self.output,
                "error": f"{self.error.type}: {self.error.message}" if self.error else None,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What `submit` stores: all that is needed to drive the run on any machine."""

    run_id: str
    thread_id: str
    graph: str
    version: str
    queue: str
    input: Any
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    priority: int = 0
    start_at: datetime | None = None
    start_timeout: timedelta | None = None
    """How long after `start_at` the run may stay unclaimed."""
    timeout: timedelta | None = None
    """How long the run may take in all, its waits included; a requeue starts it anew."""
    retry: Mapping[str, Any] | None = None
    submitted_by: str | None = None
    traceparent: str | None = None
    root_id: str | None = None
    """The run whose effects are not to be repeated."""
    resume_from: str | None = None
    """The checkpoint of its thread at which it begins."""
    forked_from: str | None = None
    effect_shift: int = 0
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to write for one thread, until it expires or is taken over."""

    tenant: str
    run_id: str
    thread_id: str
    worker: str
    token: FencingToken


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenThread:
    """How a checkpointer found a thread that it took in the transaction of a claim."""

    token: FencingToken
    """What the thread is held under: the lease's token, or a higher one."""
    is_new: bool
    """Whether it has no checkpoint."""
    checkpoint_id: str | None
    """The head of the graph's own namespace, if it was looked for."""
    kept: object
    """What the checkpointer is to be given back when the claim is durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRun:
    """A run and the lease under which it may be driven."""

    run: Run
    lease: Lease
    reason: str
    """Why it runs now: `start`, `approval`, `retry`, `drain`, `pause`, `requeue`, `recovery`,
    `migration`, or `incompatible` if it is tried again after its graph did not fit."""
    isolation: timedelta | None = None
    """If set, the run is suspected of killing its workers: whoever drives it claims nothing else
    for so long, or until the run makes progress; see `RunStore.end_isolation`."""
    rolled_back: tuple[str, ...] = ()
    """Cancelled runs of the thread whose checkpoints are to be deleted before the thread is read;
    then `RunStore.finish_rollback`."""
    traceparent: str | None = None
    thread: TakenThread | None = None
    """Set if the checkpointer has taken the thread already; see `Opening`."""
    started: AttemptStart | None = None
    """Set if the attempt has begun already; see `Opening`."""
    waits: tuple[Approval, ...] | None = None
    """All that the run has ever asked, if it was read with the claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that an approval is about."""

    name: str
    args: Mapping[str, Any]
    allowed: tuple[DecisionType, ...]
    description: str | None = None
    args_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRequest:
    """What a reviewer is asked, whatever shape the graph used to ask it."""

    shape: str
    """The shape that was recognised; it decides how the answer is encoded."""
    title: str
    proposal: Any
    """The canonical proposal as plain data: what is shown, hashed and handed back."""
    allowed: tuple[DecisionType, ...]
    actions: tuple[Action, ...] = ()
    """Set where the question is about calls of tools; one decision is due for each."""
    response_schema: Mapping[str, Any] | None = None
    """JSON Schema for the value of an `edit` or `respond`."""
    policy: Mapping[str, Any] | None = None
    description: str | None = None
    key: str | None = None
    """What the node calls this question, so that no other one gets its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A person's answer."""

    type: DecisionType
    message: str | None = None
    value: Any = None
    """The answer of a `respond`, and the edited proposal of an `edit` without an action."""
    edited_action: Mapping[str, Any] | None = None
    """`{"name": ..., "args": ...}`: the edited call."""
    decisions: tuple[Decision, ...] = ()
    """One decision for each action, where several are asked about at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWait:
    """A question found in a parked thread, on its way into the run store."""

    wait_id: str
    kind: Literal["approval", "budget", "effect"]
    """`effect`: whether an effect in doubt happened; its `interrupt_id` names that call."""
    ns: str
    task_id: str
    interrupt_id: str
    checkpoint_id: str
    answers_recorded: int
    """How many answers the asking task had when it parked, in the namespace that asked."""
    request: ApprovalRequest
    proposal_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A wait that a person answers, as it stood when it was read."""

    id: str
    run_id: str
    thread_id: str
    tenant: str
    graph: str
    ns: str
    task_id: str
    interrupt_id: str
    checkpoint_id: str
    answers_recorded: int
    kind: str
    request: ApprovalRequest
    proposal_hash: str
    version: int
    """Rises when what a reviewer is shown changes."""
    status: WaitStatus
    created_at: datetime
    decision: Decision | None = None
    decided_by: str | None = None
    decided_at: datetime | None = None
    comment: str | None = None

    def _repr_html_(self) -> str:
        decided = f"{self.decision.type} by {self.decided_by}" if self.decision else None
        return _html_table(
            self.request.title,
            {
                "approval": self.id,
                "status": self.status.value,
                "run": self.run_id,
                "graph": self.graph,
                "proposal": self.request.proposal,
                "allowed": ", ".join(self.request.allowed),
                "decision": decided,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalResult:
    """What `request_approval` returns: the decision, and the proposal to act on."""

    type: DecisionType
    proposal: Any
    """The proposal that was approved, as edited; act on this value only."""
    message: str | None = None
    value: Any = None
    by: str | None = None
    at: datetime | None = None

    @property
    def approved(self) -> bool:
        """Whether the proposal may be carried out (approved or edited)."""
        return self.type in {"approve", "edit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """An immutable fact about a run, chained to the one before it by hash."""

    run_id: str
    seq: int
    """1, 2, 3 … within the run, without gaps."""
    type: str
    at: datetime
    data: Mapping[str, Any]
    prev_hash: str
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An audit event on its way into the store, which gives it number, time and hash."""

    type: str
    data: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, bytes] = field(default_factory=dict)
    """What rows are like that it has changed; see `storage.marks`."""


StopReason = Literal["cancel", "deadline", "pause"]
"""Why an attempt is asked to stop: at once, or, for `pause`, at the next superstep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What extending a lease tells its holder."""

    lost: bool
    stop: StopReason | None = None
    """The most urgent reason to stop, if there is one."""

    @property
    def cancel_requested(self) -> bool:
        """Whether the run is to be cancelled."""
        return self.stop == "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStart:
    """What the store says when an attempt begins."""

    attempt: int
    """Attempts since the last durable progress, this one included.

    An attempt that was lost with its worker counts only if the run was the only one that the worker
    held, or was driven in isolation: else another run may be to blame.
    """
    failures: Mapping[str, int]
    """Failures so far of each task of the current superstep, by task id."""
    losses: int = 0
    """Attempts since then that were lost with their worker, whether they count or not."""
    is_isolated: bool = False
    """Whether the isolation of the claim goes on: there was no progress before this attempt."""
    stop: StopReason | None = None
    """Set if the attempt is to stop before it drives anything."""


def progress_of(checkpoint_id: str | None, finished: int, answered: int) -> str:
    """Name what is durable of a run.

    Args:
        checkpoint_id: The head of its thread.
        finished: How many tasks of the superstep after it have their results.
        answered: How many answers those tasks have taken.
    """
    return f"{checkpoint_id}:{finished}:{answered}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What is kept of a run that failed for good."""

    run_id: str
    thread_id: str | None
    graph: str | None
    version: str | None
    at: datetime
    reason: str | None
    """`exhausted`, `not_retryable` or `deadline`; `None` in letters of older versions."""
    cause: RunFailure
    attempts: int
    claims: int
    step: int | None
    checkpoint_id: str | None
    """The newest checkpoint: the state in which the run failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextDue:
    """What there is to do for a worker, and how long it is until there is; `None` if never."""

    is_claimable: bool
    """Whether `claim_runs` may find something now."""
    expiry: timedelta | None
    """Until the next lease expires."""
    deadline: timedelta | None
    """Until the next deadline of a run that nobody drives; not above zero if one has passed."""


PauseScope = Literal["graph", "queue", "all", "store"]
"""What is paused: a graph, a queue, everything of a tenant, or all tenants of a restored store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Nothing of this is claimed, and what runs stops at its next superstep."""

    scope: PauseScope
    name: str
    """The graph or queue; empty for `all` and `store`."""
    at: datetime
    by: str | None = None
    reason: str | None = None
    damage: str | None = None
    """The message of the error, if its reason cannot be read."""


WorkerHealth = Literal["ok", "draining", "overloaded", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker tells about itself with each beat."""

    instance: str
    """Unique to one start of one worker."""
    name: str
    queues: tuple[str, ...]
    graphs: tuple[tuple[str, str], ...]
    """Names and versions."""
    concurrency: int
    active: int = 0
    health: WorkerHealth = "ok"
    """`overloaded`: it claims nothing more and asks to be replaced. `silent`: others have noted
    that it does not report any more."""
    process: str | None = None
    """The process that it is in, as `processes.own_mark` names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker as it was when it last gave a sign of life."""

    report: WorkerReport
    started_at: datetime
    beat_at: datetime
    silence: timedelta
    """How long ago that was, by the store's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which share of a graph's new runs goes to one of its versions."""

    graph: str
    version: str
    share: float
    """From 0 to 1."""
    at: datetime
    by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedWait:
    """Under which ids a question is asked after its run was migrated."""

    wait_id: str
    ns: str = ""
    task_id: str
    interrupt_id: str
    checkpoint_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedRuns:
    """How many runs of one kind have not ended."""

    graph: str
    version: str
    queue: str
    status: RunStatus
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """How a store is doing, for `agentflow doctor`; all of one moment."""

    at: datetime
    """The store's clock."""
    epoch: int
    """How often the store was restored from a backup."""
    unfinished: tuple[UnfinishedRuns, ...]
    paused: int
    """Runs that are paused by themselves."""
    incompatible: int
    """Those of them whose graph has changed where they can still come to."""
    expired_leases: int
    overdue: int
    """Runs that have passed a deadline and have not ended."""
    dead_letters: int
    pauses: tuple[Pause, ...]
    workers: tuple[WorkerRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What marking a restored backup has found."""

    epoch: int
    at: datetime
    unfinished: int
    """Runs, of all tenants, that have not ended in the backup, whatever happened to them since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A record that a listing leaves out, since it cannot be read; the others are there."""

    id: str
    """Of the run, approval or effect; that of a dead letter is its run's."""
    error: AgentflowError
    """What is raised to whoever reads this record alone."""
    status: str | None = None
    """As it stands there, like the graph and its version."""
    graph: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: tuple[T, ...]
    cursor: str | None
    """Give it to the next call to continue; `None` at the end."""
    unreadable: tuple[Unreadable, ...] = ()
    """What belongs to this page and is not among its items."""

    def whole(self) -> tuple[T, ...]:
        """Return the items; raise the error of the first record that is unreadable."""
        for each in self.unreadable:
            raise each.error
        return self.items


def plain(record: Any) -> Any:
    """Turn a record into plain data: dicts by field name, ISO times, lists for tuples."""
    if hasattr(record, "__dataclass_fields__"):
        return {f.name: plain(getattr(record, f.name)) for f in fields(record)}
    if isinstance(record, StrEnum):
        return record.value
    if isinstance(record, datetime):
        return record.isoformat()
    if isinstance(record, Mapping):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [plain(item) for item in record]
    return record


def _html_table(title: str, rows: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value is not None
    )
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>"
