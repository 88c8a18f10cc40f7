"""What a run store does, as rules on plain objects: the model that each backend is held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from agentflow.types import Lease, RunStatus

Q, R, W = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING
S, F, C = RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED
SUSPECT = 2
BACKOFF = timedelta(minutes=1)
WAYS = ("park", "finish", "fail", "retry", "release", "cancel", "hold")


@dataclass
class ModelRun:
    """A run as the model sees it."""

    id: str
    thread: str
    seq: int
    priority: int
    graph: str
    available_at: datetime
    start_deadline: datetime | None
    deadline: datetime | None
    timeout: timedelta | None
    status: RunStatus = Q
    attempt: int = 0
    losses: int = 0
    pardoned: int = 0
    claims: int = 0
    has_loss_counted: bool = True
    progress: str | None = None
    is_isolated: bool = False
    is_expired: bool = False
    is_cancelling: bool = False
    is_paused: bool = False
    is_paused_by_failure: bool = False
    is_dead: bool = False
    rollback: str | None = None
    instance: str | None = None
    lease: Lease | None = None
    waits: dict[str, str] = field(default_factory=dict)
    """Ids of its questions, to `pending`, `resolved` or another end."""

    def clear(self) -> None:
        """Give it a new attempt budget."""
        self.attempt = self.losses = self.pardoned = 0
        self.has_loss_counted = True

    def let_go(self, status: RunStatus) -> None:
        """End its lease."""
        self.status = status
        self.instance = None
        self.is_isolated = self.is_expired = False

    def close_waits(self, how: str) -> None:
        """End its pending questions."""
        self.waits = {key: how if was == "pending" else was for key, was in self.waits.items()}

    def cancel(self) -> None:
        """End it as cancelled."""
        self.close_waits("withdrawn")
        self.let_go(C)

    def fail(self, waits: str = "withdrawn") -> None:
        """End it as failed, with a dead letter."""
        self.close_waits(waits)
        self.is_dead = True
        self.let_go(F)

    def settle(self, how: str, now: datetime, wait: str) -> None:
        """End its attempt; `how` is one of `WAYS`."""
        if how == "finish":
            self.close_waits("superseded")
            self.let_go(S)
        elif self.is_cancelling or how == "cancel":
            self.cancel()
        elif how == "fail":
            self.fail()
        elif how == "park":
            self.close_waits("superseded")
            self.waits[wait] = "pending"
            self.clear()
            self.let_go(W)
        else:
            if how == "release":
                self.clear()
            self.is_paused_by_failure = how == "hold"
            self.is_paused = self.is_paused or how == "hold"
            self.available_at = now + (BACKOFF if how == "retry" else timedelta(0))
            self.let_go(Q)


@dataclass
class Model:
    """A tenant's runs."""

    now: datetime
    runs: dict[str, ModelRun] = field(default_factory=dict)
    paused: set[tuple[str, str]] = field(default_factory=set)
    verdicts: dict[str, int] = field(default_factory=dict)
    """How many runs an instance held when the first of them was found to have expired."""

    def of(self, *statuses: RunStatus) -> list[ModelRun]:
        """Return the runs of some statuses, oldest first."""
        return [run for run in self.runs.values() if run.status in statuses]

    def busy(self, thread: str) -> list[ModelRun]:
        """Return the unfinished runs of a thread."""
        return [run for run in self.of(Q, R, W) if run.thread == thread]

    def is_held(self, run: ModelRun) -> bool:
        """Whether the run's last lease still holds."""
        return run.status is R and not run.is_expired

    def is_paused(self, run: ModelRun) -> bool:
        """Whether a run is not to be driven."""
        scopes = {("all", ""), ("queue", "default"), ("graph", run.graph)}
        return run.is_paused or bool(scopes & self.paused)

    def is_due(self, run: ModelRun) -> bool:
        """Whether a run may be claimed."""
        if self.is_paused(run):
            return False
        if run.status is R:
            is_time = run.is_expired
        else:
            is_open = run.start_deadline is None or run.start_deadline > self.now
            is_time = run.status is Q and run.available_at <= self.now and is_open
        return is_time and not any(
            other.seq < run.seq or other.status in {R, W}
            for other in self.busy(run.thread)
            if other is not run
        )

    def claimable(self, limit: int) -> list[ModelRun]:
        """Return what a claim of up to `limit` runs gets, in order."""
        due = [run for run in self.runs.values() if self.is_due(run)]
        taken: list[ModelRun] = []
        for run in sorted(due, key=lambda run: (run.status is Q, -run.priority, run.seq)):
            if len(taken) == limit or (taken and self.is_suspect(run)):
                continue
            taken.append(run)
            if self.is_suspect(run):
                break
        return taken

    def is_suspect(self, run: ModelRun) -> bool:
        """Whether a run that is claimed now is isolated."""
        return run.losses + (run.status is R) - run.pardoned >= SUSPECT

    def claim(self, run: ModelRun, instance: str, lease: Lease) -> None:
        """Give a run to an instance."""
        is_suspect = self.is_suspect(run)
        counts = True
        if run.status is R:
            assert run.instance is not None
            held = sum(other.instance == run.instance for other in self.of(R))
            counts = self.verdicts.setdefault(run.instance, held) <= 1 or run.is_isolated
            run.losses += 1
            run.has_loss_counted = counts
        run.attempt = run.attempt + 1 if counts else max(run.attempt, 1)
        run.claims += 1
        run.status, run.is_expired, run.start_deadline = R, False, None
        run.instance, run.lease, run.is_isolated = instance, lease, is_suspect

    def start(self, run: ModelRun, progress: str, reason: str) -> None:
        """Begin an attempt."""
        if run.progress not in {None, progress}:
            was_lost = reason == "recovery"
            run.attempt = 2 if was_lost and run.has_loss_counted else 1
            run.losses, run.pardoned = int(was_lost), 0
            run.is_isolated = False
        run.progress = progress

    def stop_of(self, run: ModelRun) -> str | None:
        """Return why the attempt of a run is to stop."""
        if run.is_cancelling:
            return "cancel"
        if run.deadline is not None and run.deadline <= self.now:
            return "deadline"
        return "pause" if self.is_paused(run) else None

    def rolled_back(self, thread: str) -> set[str]:
        """Return the runs of a thread whose checkpoints have to go."""
        return {run.id for run in self.of(C) if run.thread == thread and run.rollback == "pending"}

    def fire(self) -> int:
        """End what is past its time."""
        fired = 0
        for run in self.of(Q, W):
            if (
                run.status is Q
                and run.start_deadline is not None
                and run.start_deadline <= self.now
            ):
                run.cancel()
            elif run.deadline is not None and run.deadline <= self.now:
                run.fail("expired")
            else:
                continue
            fired += 1
        return fired
