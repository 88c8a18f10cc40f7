"""Waits: read, and resolved once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.prepared import On, Prepared, changed, row_of
from agentflow.database.tables import runs, waits
from agentflow.errors import (
    AlreadyResolvedError,
    CodecError,
    IdempotencyConflictError,
    NotFoundError,
    SupersededError,
    VersionChangedError,
)
from agentflow.journal import Resolution
from agentflow.storage.claims import offer
from agentflow.storage.due import OFFERED
from agentflow.storage.effect_rows import get_effect
from agentflow.storage.effects import give_up, resolve
from agentflow.storage.endings import COMPENSATING, cancel_or_ask
from agentflow.storage.holding import Hold
from agentflow.storage.marks import wait_event
from agentflow.storage.opening import Claimant, Resolved
from agentflow.storage.payloads import Payloads
from agentflow.storage.questions import to_approval
from agentflow.storage.rows import Beside, change_run, get_run
from agentflow.storage.tokens import lockable_token, set_beside
from agentflow.types import (
    Approval,
    ApprovalRequest,
    ClaimedRun,
    Decision,
    FencingToken,
    NewEvent,
    RunStatus,
    WaitStatus,
)

_FEW = 20
"""How many waits of its run a decision hands on at most to who goes on with it."""
_COLUMNS = tuple(column.name for column in waits.c)
_OF_WAIT = (waits.c.tenant == sa.bindparam("of_tenant"), waits.c.wait_id == sa.bindparam("of_id"))
_FIND_WAIT = Prepared(sa.select(waits).where(*_OF_WAIT))
_LOCK_WAIT = Prepared(sa.select(waits).where(*_OF_WAIT).with_for_update())
_ANSWERED = (
    "status",
    "decision",
    "decision_type",
    "decided_by",
    "decided_at",
    "comment",
    "idempotency_key",
)
"""The columns of a wait that a decision sets."""
_RESOLVE = (
    sa.update(waits)
    .where(
        waits.c.tenant == sa.bindparam("wait_tenant"), waits.c.wait_id == sa.bindparam("wait_id")
    )
    .values({name: sa.bindparam(f"wait_{name}", type_=waits.c[name].type) for name in _ANSWERED})
)


_LIST_OF_RUN = Prepared(
    sa.select(waits)
    .where(
        waits.c.tenant == sa.bindparam("of_tenant"),
        waits.c.run_id == sa.bindparam("of_run_id"),
        waits.c.seq > sa.bindparam("after"),
    )
    .order_by(waits.c.seq)
    .limit(sa.bindparam("count", type_=sa.Integer))
)
_seen = runs.alias("seen")
_others = waits.alias("others")
_LOCK_RUN_OF_WAIT, _LOCK_RUN_TO_OFFER = (
    Prepared(
        sa.select(
            runs,
            StoreNow().label("now"),
            _seen.c.event_seq.label("seen"),
            *(column.label(f"wait_{column.name}") for column in waits.c),
            *beside,
        )
        .join_from(
            waits, runs, sa.and_(runs.c.tenant == waits.c.tenant, runs.c.run_id == waits.c.run_id)
        )
        .join(_seen, _seen.c.seq == runs.c.seq)
        .where(*_OF_WAIT)
        .with_for_update(of=runs)
    )
    for beside in (
        (),
        (
            *OFFERED,
            lockable_token(runs),
            sa.select(sa.func.count())
            .select_from(_others)
            .where(_others.c.tenant == runs.c.tenant, _others.c.run_id == runs.c.run_id)
            .correlate(runs)
            .scalar_subquery()
            .label("asked"),
        ),
    )
)
"""Lock the run of a wait, and read the wait.

If the statement had to wait for the run, it sees the wait as it was before; then the run has other
events than those that it has `seen`.
"""


def list_of_run(
    on: On, tenant: str, run_id: str, *, after: int, count: int
) -> Sequence[sa.Row[Any]]:
    """Return rows of a run's waits with numbers above `after`, the oldest first."""
    named = {"of_tenant": tenant, "of_run_id": run_id, "after": after, "count": count}
    return _LIST_OF_RUN.all(on, named)


def get_wait(connection: On, tenant: str, wait_id: str, *, lock: bool = False) -> sa.Row[Any]:
    """Read a wait's row, locked if asked; `NotFoundError` if there is none."""
    query = _LOCK_WAIT if lock else _FIND_WAIT
    row = query.first(connection, {"of_tenant": tenant, "of_id": wait_id})
    if row is None:
        raise NotFoundError("approval", wait_id)
    return row


def resolve_wait(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    wait_id: str,
    decision: Decision,
    *,
    by: str,
    comment: str | None,
    version: int | None,
    idempotency_key: str | None,
    request: ApprovalRequest,
    claimant: Claimant | None,
) -> Resolved:
    """See `RunStore.resolve_wait`."""
    # The run first, then its waits: the order in which every verb locks them.
    lock = _LOCK_RUN_OF_WAIT if claimant is None else _LOCK_RUN_TO_OFFER
    run = lock.first(connection, {"of_tenant": tenant, "of_id": wait_id})
    if run is None:
        raise NotFoundError("approval", wait_id)
    now = run.now
    # Waits change only with their run locked.
    if run.seen == run.event_seq:
        row = row_of(_COLUMNS, {name: run._mapping[f"wait_{name}"] for name in _COLUMNS})
    else:
        row = get_wait(connection, tenant, wait_id, lock=True)
    stored = to_approval(row, payloads)
    is_known = bool(idempotency_key) and idempotency_key == row.idempotency_key
    if is_known and stored.status is WaitStatus.RESOLVED:
        if stored.decision == payloads.redacted(decision, waits.c.decision):
            return Resolved(stored)
        raise IdempotencyConflictError(run.run_id, "decision under this idempotency key")
    _check_is_open(row, stored, request, version)
    answer = {
        "status": WaitStatus.RESOLVED.value,
        "decision": payloads.dump(decision, waits.c.decision, row),
        "decision_type": decision.type,
        "decided_by": by,
        "decided_at": now,
        "comment": None if comment is None else payloads.dump(comment, waits.c.comment, row),
        "idempotency_key": idempotency_key,
    }
    answered = changed(row, answer)
    resolve = Beside(
        _RESOLVE,
        {"wait_tenant": tenant, "wait_id": wait_id}
        | {f"wait_{name}": value for name, value in answer.items()},
    )
    resolved = wait_event(
        "resolved",
        answered._mapping,
        decision=decision.type,
        by=by,
        proposal_hash=stored.proposal_hash,
    )
    if row.kind == "effect":
        _wake(connection, payloads, run, resolved, resolve, None, lambda: None)
        run = get_run(connection, tenant, run.run_id, lock=True)
        _answer_doubt(connection, payloads, run, row, decision, now, by=by, comment=comment)
        return Resolved(to_approval(get_wait(connection, tenant, wait_id), payloads))
    approval = replace(
        stored,
        status=WaitStatus.RESOLVED,
        decision=payloads.load(waits.c.decision, answered),
        decided_by=by,
        decided_at=now,
        comment=payloads.load(waits.c.comment, answered),
    )
    others = partial(_with_others, connection, payloads, run, approval)
    return Resolved(approval, _wake(connection, payloads, run, resolved, resolve, claimant, others))


def _wake(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    resolved: NewEvent,
    resolve: Beside,
    claimant: Claimant | None,
    others: Callable[[], tuple[Approval, ...] | None],
) -> ClaimedRun | None:
    """Store a decision, and queue the run if it waits, or give it to `claimant` at once.

    Then `others` reads what it has asked.
    """
    if run.status != RunStatus.WAITING:
        change_run(connection, run, payloads, run.now, log=[resolved], beside=[resolve])
        return None
    wake = {"wake_reason": "approval", "available_at": payloads.time(run.now)}
    queued = changed(run, {**wake, "status": RunStatus.QUEUED.value})
    held: Hold | None = None
    if claimant is not None and run.thread_token is not None:
        token = FencingToken(run.thread_token + 1)
        held = offer(connection, payloads, queued, run, run.now, claimant, token)
    if claimant is None or held is None:
        change_run(
            connection,
            run,
            payloads,
            run.now,
            status=RunStatus.QUEUED,
            log=[resolved],
            beside=[resolve],
            **wake,
        )
        return None
    claimed = replace(held.claimed, waits=others())
    if claimed.waits is not None:
        # Otherwise the attempt reads them from the database, where they are as they were.
        claimant.foretold(claimed)
    change_run(
        connection,
        queued,
        payloads,
        run.now,
        status=RunStatus.RUNNING,
        log=[resolved, *held.log],
        beside=[resolve, set_beside(held.claimed.lease)],
        **{**wake, **held.changes},
    )
    return claimed


def _with_others(
    connection: Connection, payloads: Payloads, run: sa.Row[Any], approval: Approval
) -> tuple[Approval, ...] | None:
    """Return all waits of a run, of which one was answered just now, if they are few and sound."""
    if run.asked == 1 and run.seen == run.event_seq:
        return (approval,)
    rows = list_of_run(connection, run.tenant, run.run_id, after=0, count=_FEW + 1)
    if len(rows) > _FEW:
        return None
    with suppress(CodecError):
        return tuple(
            approval if row.wait_id == approval.id else to_approval(row, payloads) for row in rows
        )
    return None


def _check_is_open(
    row: sa.Row[Any], stored: Approval, request: ApprovalRequest, version: int | None
) -> None:
    """Refuse a decision unless what was shown is what waits for one now."""
    if stored.status is WaitStatus.RESOLVED:
        raise AlreadyResolvedError(
            row.wait_id, stored.status.value, row.decision_type, row.decided_by
        )
    if stored.status is not WaitStatus.PENDING:
        raise SupersededError(row.wait_id, stored.status.value)
    if version is not None and version != row.version:
        raise VersionChangedError(row.wait_id, version, row.version)
    if stored.request != request:
        raise VersionChangedError(row.wait_id, row.version - 1, row.version)


def _answer_doubt(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    wait: sa.Row[Any],
    decision: Decision,
    now: datetime,
    *,
    by: str,
    comment: str | None,
) -> None:
    """Write what is said of an effect in doubt to its record, or cancel the run."""
    effect_id = wait.interrupt_id.rpartition(":")[0]
    if decision.type == "reject" and run.saga == COMPENSATING:
        effect = get_effect(connection, run.tenant, effect_id)
        give_up(connection, payloads, run, effect, now, by)
        return
    if decision.type == "reject":
        cancel_or_ask(connection, payloads, run, now, {"reason": "effect in doubt", "by": by})
        return
    said = Resolution(
        happened=decision.value["happened"],
        outcome=decision.value.get("outcome"),
        by=by,
        comment=comment,
        facts={"approval": wait.wait_id},
    )
    resolve(connection, payloads, run, get_effect(connection, run.tenant, effect_id), now, said)
