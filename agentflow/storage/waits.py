"""Waits: read, and resolved once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.prepared import On, Prepared
from agentflow.database.tables import runs, waits
from agentflow.errors import (
    AlreadyResolvedError,
    IdempotencyConflictError,
    NotFoundError,
    SupersededError,
    VersionChangedError,
)
from agentflow.journal import Resolution
from agentflow.storage.effect_rows import get_effect
from agentflow.storage.effects import give_up, resolve
from agentflow.storage.endings import COMPENSATING, cancel_or_ask
from agentflow.storage.marks import wait_event
from agentflow.storage.questions import to_approval
from agentflow.storage.rows import Payloads, change_run, get_run
from agentflow.types import (
    Approval,
    ApprovalRequest,
    Decision,
    RunStatus,
    WaitStatus,
)

_OF_WAIT = (waits.c.tenant == sa.bindparam("of_tenant"), waits.c.wait_id == sa.bindparam("of_id"))
_FIND_WAIT = Prepared(sa.select(waits).where(*_OF_WAIT))
_LOCK_WAIT = Prepared(sa.select(waits).where(*_OF_WAIT).with_for_update())
_RESOLVE = Prepared(
    sa.update(waits)
    .where(*_OF_WAIT)
    .values(
        {
            name: sa.bindparam(name, type_=waits.c[name].type)
            for name in (
                "status",
                "decision",
                "decision_type",
                "decided_by",
                "decided_at",
                "comment",
                "idempotency_key",
            )
        }
    )
    .returning(waits)
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
_LOCK_RUN_OF_WAIT = Prepared(
    sa.select(runs, StoreNow().label("now"))
    .where(
        runs.c.tenant == sa.bindparam("of_tenant"),
        runs.c.run_id == sa.select(waits.c.run_id).where(*_OF_WAIT).scalar_subquery(),
    )
    .with_for_update(of=runs)
)


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
) -> Approval:
    """See `RunStore.resolve_wait`."""
    # The run first, then its waits: the order in which every verb locks them.
    run = _LOCK_RUN_OF_WAIT.first(connection, {"of_tenant": tenant, "of_id": wait_id})
    if run is None:
        raise NotFoundError("approval", wait_id)
    now = run.now
    row = get_wait(connection, tenant, wait_id, lock=True)
    stored = to_approval(row, payloads)
    is_known = bool(idempotency_key) and idempotency_key == row.idempotency_key
    if is_known and stored.status is WaitStatus.RESOLVED:
        if stored.decision == payloads.redacted(decision, waits.c.decision):
            return stored
        raise IdempotencyConflictError(run.run_id, "decision under this idempotency key")
    _check_is_open(row, stored, request, version)
    comment_data = None if comment is None else payloads.dump(comment, waits.c.comment, row)
    changed = _RESOLVE.one(
        connection,
        {
            "of_tenant": tenant,
            "of_id": wait_id,
            "status": WaitStatus.RESOLVED.value,
            "decision": payloads.dump(decision, waits.c.decision, row),
            "decision_type": decision.type,
            "decided_by": by,
            "decided_at": now,
            "comment": comment_data,
            "idempotency_key": idempotency_key,
        },
    )
    resolved = wait_event(
        "resolved",
        changed._mapping,
        decision=decision.type,
        by=by,
        proposal_hash=stored.proposal_hash,
    )
    wake: dict[str, Any] = {}
    if run.status == RunStatus.WAITING:
        wake = {
            "status": RunStatus.QUEUED,
            "wake_reason": "approval",
            "available_at": payloads.time(now),
        }
    change_run(connection, run, payloads, now, log=[resolved], **wake)
    if row.kind == "effect":
        run = get_run(connection, tenant, run.run_id, lock=True)
        _answer_doubt(connection, payloads, run, row, decision, now, by=by, comment=comment)
        changed = get_wait(connection, tenant, wait_id)
    return to_approval(changed, payloads)


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
