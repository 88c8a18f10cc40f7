"""Which effects there are: of a run, to be undone, or not needed any more."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.tables import effects, runs
from agentflow.journal import GLOBAL, EffectStatus
from agentflow.storage.effect_objects import release
from agentflow.storage.payloads import Payloads
from agentflow.types import RunStatus

_UNDOABLE = {EffectStatus.SUCCEEDED.value, EffectStatus.INTENDED.value}


def listed(
    tenant: str,
    *,
    run_id: str | None,
    scope: str | None,
    status: EffectStatus | None = None,
    in_doubt: bool = False,
) -> sa.Select[Any]:
    """Return the query for rows of effects, in the order of their first intents."""
    query = sa.select(effects).where(effects.c.tenant == tenant).order_by(effects.c.seq)
    if status is not None:
        query = query.where(effects.c.status == status.value)
    if in_doubt:
        query = query.where(effects.c.status == EffectStatus.INTENDED.value, sa.not_(_is_owned()))
    if scope is not None:
        query = query.where(effects.c.scope == scope)
    if run_id is not None:
        query = query.where(effects.c.run_id == run_id)
    return query


def _is_owned() -> sa.Exists:
    """Return the condition that the attempt which has intended an effect still holds its lease."""
    return sa.exists().where(
        runs.c.tenant == effects.c.tenant,
        runs.c.run_id == effects.c.run_id,
        runs.c.status == RunStatus.RUNNING.value,
        runs.c.token == effects.c.token,
        runs.c.lease_expires_at > StoreNow(),
    )


def has_any_to_undo(connection: Connection, run: sa.Row[Any]) -> bool:
    """Whether a run has effects that can be undone and are not, or of which nobody knows."""
    return _exists(connection, run, _UNDOABLE)


def is_all_undone(connection: Connection, run: sa.Row[Any]) -> bool:
    """Whether every effect of a run that can be undone is."""
    return not _exists(connection, run, _UNDOABLE)


def _exists(connection: Connection, run: sa.Row[Any], statuses: set[str]) -> bool:
    query = sa.select(effects.c.seq).where(
        effects.c.tenant == run.tenant,
        effects.c.run_id == run.run_id,
        effects.c.compensate.is_not(None),
        effects.c.status.in_(sorted(statuses)),
    )
    return connection.execute(query.limit(1)).first() is not None


def doomed(
    tenant: str,
    ended_before: datetime,
    graphs: Collection[tuple[str, str]],
    *,
    are_others: bool,
    limit: int,
) -> sa.Select[Any]:
    """Return the query for the numbers of effects that need not be kept."""
    owner, fork = runs.alias("owner"), runs.alias("fork")
    is_shared = sa.exists().where(
        fork.c.tenant == effects.c.tenant,
        fork.c.root == effects.c.scope,
        fork.c.ended_at.is_(None),
    )
    is_named = sa.tuple_(owner.c.graph, owner.c.version).in_(sorted(graphs) or [("", "")])
    return (
        sa.select(effects.c.seq)
        .join(
            owner,
            sa.and_(owner.c.tenant == effects.c.tenant, owner.c.run_id == effects.c.run_id),
        )
        .where(
            effects.c.tenant == tenant,
            effects.c.scope != GLOBAL,
            owner.c.ended_at < ended_before,
            owner.c.is_dead_letter.is_(False),
            sa.not_(is_named) if are_others else is_named,
            sa.not_(is_shared),
        )
        .limit(limit)
    )


def prune_effects(connection: Connection, payloads: Payloads, doomed: sa.Select[Any]) -> int:
    """See `RunStore.prune_effects`; `doomed` is the query of that name."""
    del payloads
    numbers = connection.execute(doomed).scalars().all()
    connection.execute(sa.delete(effects).where(effects.c.seq.in_(numbers)))
    release(connection, numbers)
    return len(numbers)
