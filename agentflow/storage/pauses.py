"""What is not to be driven for now: single runs, graphs, queues, tenants, or a restored store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.prepared import Prepared
from agentflow.database.tables import pauses
from agentflow.errors import CodecError, IllegalTransitionError, PausedError
from agentflow.storage.events import append_to_log, lock_log
from agentflow.storage.marks import GONE, marked, of_pause
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import CLEARED, change_run, get_run, to_run
from agentflow.types import NewEvent, Pause, PauseScope, Run, RunStatus, StopReason

STORE: PauseScope = "store"
_EVERYTHING = {"all", STORE}


@dataclass(frozen=True, slots=True)
class Paused:
    """What is paused for a tenant."""

    scopes: frozenset[tuple[str, str]]

    def scope_of(self, graph: str, queue: str) -> tuple[str, str] | None:
        """Return what keeps a run of this graph and queue from being driven, if anything."""
        for scope in (("store", ""), ("all", ""), ("graph", graph), ("queue", queue)):
            if scope in self.scopes:
                return scope
        return None

    def without(
        self, queues: Collection[str], graphs: Collection[tuple[str, str]]
    ) -> tuple[list[str], list[tuple[str, str]]]:
        """Return those queues and graphs that are not paused, in order."""
        if any(scope in _EVERYTHING for scope, _ in self.scopes):
            return [], []
        return (
            sorted(queue for queue in queues if ("queue", queue) not in self.scopes),
            sorted(graph for graph in graphs if ("graph", graph[0]) not in self.scopes),
        )


def paused(connection: Connection, tenant: str) -> Paused:
    """Read what is paused."""
    return paused_of(_FIND_PAUSED.all(connection, {"tenant": tenant}))


def paused_of(found: Sequence[sa.Row[Any]]) -> Paused:
    """Return what is paused by rows with `scope` and `name`; one that has none says nothing."""
    return Paused(frozenset((row.scope, row.name) for row in found if row.scope is not None))


def concerns(tenant: Any) -> sa.ColumnElement[bool]:
    """Whether a pause concerns a tenant."""
    return sa.or_(pauses.c.tenant == tenant, pauses.c.scope == STORE)


def is_paused(tenant: Any, graph: Any, queue: Any) -> sa.ColumnElement[bool]:
    """Whether a pause keeps runs of a graph and a queue from being driven."""
    scope, name = pauses.c.scope, pauses.c.name
    is_everything = scope.in_([sa.literal_column(f"'{each}'") for each in sorted(_EVERYTHING)])
    is_of_graph = sa.and_(scope == sa.literal_column("'graph'"), name == graph)
    is_of_queue = sa.and_(scope == sa.literal_column("'queue'"), name == queue)
    return sa.exists(
        sa.select(sa.literal_column("1"))
        .select_from(pauses)
        .where(concerns(tenant), sa.or_(is_everything, is_of_graph, is_of_queue))
    )


_FIND_PAUSED = Prepared(
    sa.select(pauses.c.scope, pauses.c.name).where(concerns(sa.bindparam("tenant")))
)


def check_not_paused(connection: Connection, row: sa.Row[Any]) -> None:
    """Raise `PausedError` if a run is not to be driven."""
    if row.paused_at is not None:
        raise PausedError(row.run_id, "run")
    scope = paused(connection, row.tenant).scope_of(row.graph, row.queue)
    if scope is not None:
        raise PausedError(row.run_id, *scope)


def reason_to_stop(
    row: sa.Row[Any], at: datetime, paused: Paused | None = None
) -> StopReason | None:
    """Return the most urgent reason for the attempt of a run to stop; timers go by `at`."""
    if row.cancel_requested_at is not None:
        return "cancel"
    if row.deadline_at is not None and row.deadline_at <= at:
        return "deadline"
    if row.paused_at is not None:
        return "pause"
    return "pause" if paused is not None and paused.scope_of(row.graph, row.queue) else None


def pause_run(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    run_id: str,
    *,
    reason: str | None,
    by: str | None,
) -> Run:
    """See `RunStore.pause_run`."""
    now = database_now(connection)
    row = get_run(connection, tenant, run_id, lock=True)
    if RunStatus(row.status).is_ended:
        raise IllegalTransitionError(run_id, row.status, "paused")
    if row.paused_at is None:
        event = NewEvent(type="run.paused", data={"reason": reason, "by": by})
        change_run(connection, row, payloads, now, log=[event], paused_at=now)
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)


def resume_run(
    connection: Connection, payloads: Payloads, tenant: str, run_id: str, *, by: str | None
) -> Run:
    """See `RunStore.resume_run`."""
    now = database_now(connection)
    row = get_run(connection, tenant, run_id, lock=True)
    if RunStatus(row.status).is_ended:
        raise IllegalTransitionError(run_id, row.status, "resumed")
    if row.paused_at is not None:
        changes: dict[str, Any] = {"paused_at": None, "is_paused_by_failure": None}
        if row.is_paused_by_failure:
            changes |= {**CLEARED, "failures": None}
        event = NewEvent(type="run.unpaused", data={"by": by})
        change_run(connection, row, payloads, now, log=[event], **changes)
    return to_run(get_run(connection, tenant, run_id, lock=False), payloads)


def pause(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    scope: PauseScope,
    name: str,
    *,
    reason: str | None,
    by: str | None,
) -> Pause:
    """See `RunStore.pause`."""
    now = database_now(connection)
    key = {"tenant": _owner(tenant, scope), "scope": scope, "name": name}
    lock_log(connection, key["tenant"])
    if (known := _find(connection, key)) is not None:
        return to_pause(known, payloads)
    sealed = None if reason is None else payloads.dump(reason, pauses.c.reason, key)
    row = {**key, "at": now, "paused_by": by, "reason": sealed}
    connection.execute(sa.insert(pauses).values(row))
    event = NewEvent(type=f"{scope}.paused", data={"name": name, "reason": reason, "by": by})
    event = marked(event, of_pause(scope, name), pauses, row)
    append_to_log(connection, payloads, key["tenant"], now, event)
    return Pause(scope=scope, name=name, at=now, by=by, reason=reason)


def resume(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    scope: PauseScope,
    name: str,
    *,
    by: str | None,
) -> bool:
    """See `RunStore.resume`."""
    now = database_now(connection)
    key = {"tenant": _owner(tenant, scope), "scope": scope, "name": name}
    lock_log(connection, key["tenant"])
    gone = connection.execute(sa.delete(pauses).where(*_is(key)))
    if gone.rowcount == 0:
        return False
    event = NewEvent(
        type=f"{scope}.unpaused",
        data={"name": name, "by": by},
        marks={of_pause(scope, name): GONE},
    )
    append_to_log(connection, payloads, key["tenant"], now, event)
    return True


def _owner(tenant: str, scope: PauseScope) -> str:
    """Return the tenant in whose name a pause stands; that of the store concerns all."""
    return "" if scope == STORE else tenant


def _is(key: dict[str, str]) -> list[sa.ColumnElement[bool]]:
    return [pauses.c[name] == value for name, value in key.items()]


def _find(connection: Connection, key: dict[str, str]) -> sa.Row[Any] | None:
    return connection.execute(sa.select(pauses).where(*_is(key))).first()


def list_pauses(connection: Connection, payloads: Payloads, tenant: str) -> tuple[Pause, ...]:
    """See `RunStore.list_pauses`."""
    query = sa.select(pauses).where(concerns(tenant)).order_by(pauses.c.at, pauses.c.name)
    return tuple(to_pause(row, payloads) for row in connection.execute(query))


def to_pause(row: sa.Row[Any], payloads: Payloads) -> Pause:
    """Build the record of a pause; it holds, whether its reason can be read or not."""
    reason = damage = None
    try:
        reason = payloads.load(pauses.c.reason, row)
    except CodecError as exc:
        damage = f"{type(exc).__name__}: {exc}"
    return Pause(
        scope=row.scope,
        name=row.name,
        at=row.at,
        by=row.paused_by,
        reason=reason,
        damage=damage,
    )
