"""Waits: read, and resolved once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.tables import waits
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
from agentflow.storage.questions import to_approval
from agentflow.storage.rows import Payloads, change_run, get_run
from agentflow.types import (
    Approval,
    ApprovalRequest,
    Decision,
    NewEvent,
    RunStatus,
    WaitStatus,
)


def get_wait(
    connection: Connection, tenant: str, wait_id: str, *, lock: bool = False
) -> sa.Row[Any]:
    """Read a wait's row, locked if asked; `NotFoundError` if there is none."""
    query = sa.select(waits).where(waits.c.tenant == tenant, waits.c.wait_id == wait_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
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
    now = database_now(connection)
    # The run first, then its waits: the order in which every verb locks them.
    run_id = get_wait(connection, tenant, wait_id).run_id
    run = get_run(connection, tenant, run_id, lock=True)
    row = get_wait(connection, tenant, wait_id, lock=True)
    stored = to_approval(row, payloads)
    if stored.status is WaitStatus.RESOLVED:
        if idempotency_key and idempotency_key == row.idempotency_key:
            if stored.decision == payloads.redacted(decision, waits.c.decision):
                return stored
            raise IdempotencyConflictError(run_id, "decision under this idempotency key")
        raise AlreadyResolvedError(wait_id, stored.status.value, row.decision_type, row.decided_by)
    if stored.status is not WaitStatus.PENDING:
        raise SupersededError(wait_id, stored.status.value)
    if version is not None and version != row.version:
        raise VersionChangedError(wait_id, version, row.version)
    if stored.request != request:
        raise VersionChangedError(wait_id, row.version - 1, row.version)
    connection.execute(
        sa.update(waits)
        .where(waits.c.tenant == tenant, waits.c.wait_id == wait_id)
        .values(
            status=WaitStatus.RESOLVED.value,
            decision=payloads.dump(decision, waits.c.decision, row),
            decision_type=decision.type,
            decided_by=by,
            decided_at=now,
            comment=None if comment is None else payloads.dump(comment, waits.c.comment, row),
            idempotency_key=idempotency_key,
        )
    )
    resolved = NewEvent(
        type="approval.resolved",
        data={
            "approval": wait_id,
            "decision": decision.type,
            "by": by,
            "proposal_hash": stored.proposal_hash,
        },
    )
    log = [resolved]
    if row.kind == "effect":
        change_run(connection, run, payloads, now, log=log)
        log = []
        run = get_run(connection, tenant, run_id, lock=True)
        _answer_doubt(connection, payloads, run, row, decision, now, by=by, comment=comment)
        run = get_run(connection, tenant, run_id, lock=True)
    wake: dict[str, Any] = {}
    if run.status == RunStatus.WAITING:
        wake = {
            "status": RunStatus.QUEUED,
            "wake_reason": "approval",
            "available_at": payloads.time(now),
        }
    change_run(connection, run, payloads, now, log=log, **wake)
    return to_approval(get_wait(connection, tenant, wait_id), payloads)


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
