"""Attempts that begin with their claim, where there is no doubt of where they go on.

Any other one begins with `start_attempt`, after its driver has read the thread and brought it to
where the run is to go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from agentflow.database.tables import runs
from agentflow.errors import CodecError
from agentflow.storage.opening import Opening
from agentflow.storage.pauses import reason_to_stop
from agentflow.storage.payloads import Payloads
from agentflow.telemetry import is_traced
from agentflow.types import AttemptStart, NewEvent, RunStatus, TakenThread, progress_of


@dataclass(frozen=True, slots=True)
class Beginning:
    """What noting that an attempt begins does to its run."""

    event: NewEvent
    changes: Mapping[str, Any]
    started: AttemptStart


def begin_event(
    reason: str, *, attempt: int, checkpoint_id: str | None, step: int | None, worker: str
) -> NewEvent:
    """Return the event of an attempt that begins."""
    facts = {"attempt": attempt, "checkpoint": checkpoint_id, "step": step, "worker": worker}
    if reason == "start":
        return NewEvent(type="run.started", data=facts)
    return NewEvent(type="run.resumed", data={**facts, "reason": reason})


def beginning(
    opening: Opening,
    payloads: Payloads,
    row: sa.Row[Any],
    thread: TakenThread,
    now: datetime,
    *,
    worker: str,
    attempt: int,
    losses: int,
) -> Beginning | None:
    """Return how an attempt begins whose run is being claimed; `None` if it does so by itself.

    Args:
        opening: What the claim is to open.
        payloads: How the store encodes.
        row: The run as it was, locked, neither damaged nor to be rolled back.
        thread: Its thread, which was taken.
        now: The database's time.
        worker: Who claims it.
        attempt: Counted with this one.
        losses: Counted with the last attempt.
    """
    fingerprint = opening.fingerprints.get((row.graph, row.version))
    # What traces an attempt is known only when that has begun.
    is_as_it_was = fingerprint is not None and fingerprint == row.fingerprint and not is_traced()
    if not is_as_it_was or not _is_plain(row, thread) or reason_to_stop(row, payloads.time(now)):
        return None
    try:
        failures = payloads.load(runs.c.failures, row) or {}
    except CodecError:
        return None  # its own attempt fails at that, and not the claim of all others
    place = {"checkpoint_id": row.checkpoint_id, "step": row.step}
    changes: dict[str, Any] = {}
    if row.wake_reason == "start":
        changes["progress"] = progress_of(None, 0, 0)
        changes["failures"] = payloads.dump(failures, runs.c.failures, row)
    return Beginning(
        begin_event(row.wake_reason, attempt=attempt, worker=worker, **place),
        changes,
        AttemptStart(attempt=attempt, failures=failures, losses=losses),
    )


def _is_plain(row: sa.Row[Any], thread: TakenThread) -> bool:
    """Whether it goes on where the run's row says, and nothing has to be done before."""
    if row.status == RunStatus.RUNNING or row.resume_from is not None or row.saga is not None:
        return False
    if row.wake_reason == "start":
        return thread.is_new and row.checkpoint_id is None and row.forked_from is None
    is_there = row.checkpoint_id is not None and row.checkpoint_id == thread.checkpoint_id
    return is_there and row.wake_reason == "approval"
