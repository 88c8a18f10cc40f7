"""Storing new runs, and what becomes of those that are on the thread already."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.prepared import row_of
from agentflow.database.tables import runs
from agentflow.errors import IdempotencyConflictError, ThreadBusyError
from agentflow.storage.base import OnBusy, OnExisting
from agentflow.storage.claims import offer
from agentflow.storage.due import OFFERED_NEW
from agentflow.storage.endings import cancel_or_ask
from agentflow.storage.events import GENESIS
from agentflow.storage.holding import Hold
from agentflow.storage.letters import requeue
from agentflow.storage.opening import Claimant, Created
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import UNFINISHED, find_run, get_run, insert_run, to_run
from agentflow.storage.tokens import lock_thread, take_for_new_run
from agentflow.types import FencingToken, NewEvent, RunSpec, RunStatus

_COLUMNS = tuple(column.name for column in runs.c)


def new_run(payloads: Payloads, tenant: str, spec: RunSpec) -> dict[str, Any]:
    """Encode a submission; what depends on the time is added by `create_run`."""
    row: dict[str, Any] = {
        "tenant": tenant,
        "run_id": spec.run_id,
        "thread_id": spec.thread_id,
        "graph": spec.graph,
        "version": spec.version,
        "queue": spec.queue,
        "status": RunStatus.QUEUED.value,
        "priority": spec.priority,
        "wake_reason": "start",
        "attempt": 0,
        "claims": 0,
        "is_dead_letter": False,
        "timeout": spec.timeout,
        "root": spec.root_id,
        "forked_from": spec.forked_from,
        "effect_shift": spec.effect_shift,
        "resume_from": spec.resume_from,
        "submitted_by": spec.submitted_by,
        "traceparent": spec.traceparent,
        "fingerprint": spec.fingerprint,
        "event_seq": 0,
        "event_hash": GENESIS,
    }
    row["input"] = payloads.dump(spec.input, runs.c.input, row)
    row["config"] = payloads.dump(dict(spec.config), runs.c.config, row)
    row["metadata"] = payloads.dump(dict(spec.metadata), runs.c.metadata, row)
    if spec.retry is not None:
        row["retry"] = payloads.dump(dict(spec.retry), runs.c.retry, row)
    return row


def create_run(
    payloads: Payloads,
    tenant: str,
    spec: RunSpec,
    row: dict[str, Any],
    on_existing: OnExisting,
    on_busy: OnBusy,
    claimant: Claimant | None,
    connection: Connection,
) -> Created:
    """See `RunStore.create_run`; `row` is the encoded submission."""
    created = _create(payloads, tenant, spec, row, on_busy, claimant, connection)
    if created is not None:
        return created
    stored = get_run(connection, tenant, spec.run_id, lock=True)
    _check_same(payloads, stored, row)
    if on_existing == "reject":
        raise IdempotencyConflictError(spec.run_id, "submission (on_existing is 'reject')")
    if on_existing == "restart_if_failed" and stored.status == RunStatus.FAILED:
        by = spec.submitted_by
        requeue(connection, payloads, stored, stored.now, checkpoint_id=None, by=by)
        stored = get_run(connection, tenant, spec.run_id, lock=False)
    return Created(to_run(stored, payloads), is_new=False)


def _create(
    payloads: Payloads,
    tenant: str,
    spec: RunSpec,
    row: dict[str, Any],
    on_busy: OnBusy,
    claimant: Claimant | None,
    connection: Connection,
) -> Created | None:
    """Insert a run, claimed if it can be; `None` if there is one of this id."""
    # Under the lock the runs of a thread are numbered in the order in which they are committed.
    if claimant is not None and on_busy == "enqueue":
        thread, look = take_for_new_run(
            connection, tenant, spec.thread_id, OFFERED_NEW, _to_look_at(spec)
        )
    else:
        thread, look = lock_thread(connection, tenant, spec.thread_id), None
    now = thread.now
    if on_busy != "enqueue":
        if find_run(connection, tenant, spec.run_id, lock=False) is not None:
            return None
        _clear_thread(connection, payloads, tenant, spec, now, on_busy)
    new = {**row, "created_at": now, **_times(payloads.time(now), spec)}
    made, log = row_of(_COLUMNS, new), [_submitted(spec)]
    held: Hold | None = None
    if claimant is not None and look is not None:
        token = FencingToken(thread.token)
        held = offer(connection, payloads, made, look, now, claimant, token)
    if claimant is None or held is None:
        is_new = insert_run(connection, payloads, new, now, log)
        return Created(to_run(made, payloads), is_new=True) if is_new else None
    new |= {"status": RunStatus.RUNNING.value, **held.changes}
    if not insert_run(connection, payloads, new, now, [*log, *held.log]):
        # Stored meanwhile, on another thread: on this one, which is locked, it would be known.
        raise IdempotencyConflictError(spec.run_id, "thread")
    claimant.foretold(held.claimed)
    return Created(held.claimed.run, is_new=True, claimed=held.claimed)


def _to_look_at(spec: RunSpec) -> dict[str, str]:
    """Return what tells whether a run can be claimed whose thread is locked."""
    return {"run_id": spec.run_id, "graph": spec.graph, "queue": spec.queue}


def _submitted(spec: RunSpec) -> NewEvent:
    data = {"graph": spec.graph, "version": spec.version, "by": spec.submitted_by}
    if spec.forked_from is not None:
        data["forked_from"] = spec.forked_from
    return NewEvent(type="run.submitted", data=data)


def _times(at: datetime, spec: RunSpec) -> dict[str, datetime | None]:
    available = spec.start_at or at
    return {
        "available_at": available,
        "start_deadline_at": None
        if spec.start_timeout is None
        else max(available, at) + spec.start_timeout,
        "deadline_at": None if spec.timeout is None else at + spec.timeout,
    }


def _clear_thread(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    spec: RunSpec,
    now: datetime,
    on_busy: OnBusy,
) -> None:
    """Refuse a new run of a busy thread, or stop what is on it."""
    query = (
        sa.select(runs)
        .where(
            runs.c.tenant == tenant,
            runs.c.thread_id == spec.thread_id,
            runs.c.status.in_(UNFINISHED),
        )
        .order_by(runs.c.seq)
        .with_for_update()
    )
    busy = connection.execute(query).all()
    if busy and on_busy == "reject":
        raise ThreadBusyError(spec.thread_id, busy[0].run_id)
    facts = {"reason": f"{on_busy} by run {spec.run_id}", "by": spec.submitted_by}
    changes = {"rollback": "pending"} if on_busy == "rollback" else {}
    for row in busy:
        cancel_or_ask(connection, payloads, row, now, facts, **changes)


def _check_same(payloads: Payloads, stored: sa.Row[Any], new: Mapping[str, Any]) -> None:
    """Raise unless a known run id comes again with what it came with before."""
    for column in ("graph", "thread_id"):
        if getattr(stored, column) != new[column]:
            raise IdempotencyConflictError(stored.run_id, column.removesuffix("_id"))
    # Compared as values: equal inputs need not have equal bytes, a dictionary keeps its order.
    before, after = (payloads.load(runs.c.input, row) for row in (stored, new))
    if before != after:
        raise IdempotencyConflictError(stored.run_id, "input")
