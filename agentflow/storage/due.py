"""What is due: statements that workers ask over and over, put together once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from agentflow.database.engine import StoreNow
from agentflow.database.prepared import On, Prepared
from agentflow.database.tables import Timestamp, pauses, runs
from agentflow.storage.pauses import concerns, is_paused, paused_of
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import UNFINISHED
from agentflow.types import NextDue


def is_expired(now: Any) -> sa.ColumnElement[bool]:
    """Whether a run is held under a lease that has expired."""
    # Statuses are literals where an index covers only the rows that have them.
    return sa.and_(runs.c.status == sa.literal_column("'running'"), runs.c.lease_expires_at <= now)


_other = runs.alias("other")
IS_BEHIND = sa.exists(
    sa.select(sa.literal_column("1"))
    .where(
        _other.c.tenant == runs.c.tenant,
        _other.c.thread_id == runs.c.thread_id,
        _other.c.seq != runs.c.seq,
        _other.c.status.in_([sa.literal_column(f"'{status}'") for status in UNFINISHED]),
        sa.or_(
            _other.c.seq < runs.c.seq,
            _other.c.status.in_([sa.literal_column("'running'"), sa.literal_column("'waiting'")]),
        ),
    )
    .correlate(runs)
    # Keeps PostgreSQL from reading all runs at once instead of those of one thread.
    .offset(0)
)
"""Whether an older run of the thread is unfinished, or any other one holds it."""

_marked = runs.alias("marked")
HAS_ROLLBACK = (
    sa.exists()
    .where(
        _marked.c.tenant == runs.c.tenant,
        _marked.c.thread_id == runs.c.thread_id,
        _marked.c.rollback == sa.literal_column("'pending'"),
    )
    .correlate(runs)
)
"""Whether checkpoints of the thread have to go."""

_now = sa.bindparam("now", type_=Timestamp())
_at = sa.bindparam("at", type_=Timestamp())
_IS_QUEUED = sa.and_(
    runs.c.status == sa.literal_column("'queued'"),
    runs.c.available_at <= _at,
    sa.or_(runs.c.start_deadline_at.is_(None), runs.c.start_deadline_at > _at),
)


OFFERED = (
    IS_BEHIND.label("is_behind"),
    HAS_ROLLBACK.label("has_rollback"),
    is_paused(runs.c.tenant, runs.c.graph, runs.c.queue).label("is_paused"),
)
"""What is to be known of a run that is offered, beside its columns."""


_of_thread = (
    runs.c.tenant == sa.bindparam("of_tenant"),
    runs.c.thread_id == sa.bindparam("of_thread"),
)
OFFERED_NEW = (
    sa.or_(
        sa.exists(
            sa.select(sa.literal_column("1")).where(
                *_of_thread,
                runs.c.status.in_([sa.literal_column(f"'{status}'") for status in UNFINISHED]),
            )
        ),
        sa.exists(
            sa.select(sa.literal_column("1")).where(
                runs.c.tenant == sa.bindparam("of_tenant"),
                runs.c.run_id == sa.bindparam("run_id"),
            )
        ),
    ).label("is_behind"),
    sa.exists(
        sa.select(sa.literal_column("1")).where(
            *_of_thread, runs.c.rollback == sa.literal_column("'pending'")
        )
    ).label("has_rollback"),
    is_paused(sa.bindparam("of_tenant"), sa.bindparam("graph"), sa.bindparam("queue")).label(
        "is_paused"
    ),
)
"""The same of a run that is going to be stored, whose thread is locked; a known one is behind."""


class Asking(NamedTuple):
    """What workers ask about runs of so many queues and so many graphs."""

    lock_expired: Prepared
    """Lock expired runs behind a place in the order."""
    lock_queued: Prepared
    """Lock queued runs of one `queue`, behind a place in the order."""
    next_due: Prepared


@lru_cache(maxsize=100)
def asking(queues: int, graphs: int) -> Asking:
    """Return what workers ask of so many queues and so many graphs."""
    is_in_queues = sa.or_(
        sa.false(), *(runs.c.queue == sa.bindparam(f"queue_{i}") for i in range(queues))
    )
    is_wanted_anywhere = sa.and_(
        runs.c.tenant == sa.bindparam("tenant"),
        sa.or_(
            sa.false(),
            *(
                sa.and_(
                    runs.c.graph == sa.bindparam(f"graph_{i}"),
                    runs.c.version == sa.bindparam(f"version_{i}"),
                )
                for i in range(graphs)
            ),
        ),
        runs.c.paused_at.is_(None),
    )
    is_wanted = sa.and_(is_wanted_anywhere, is_in_queues)
    expired, queued = (
        sa.and_(is_wanted, each, ~IS_BEHIND) for each in (is_expired(_now), _IS_QUEUED)
    )
    # Of all queues together, an index would not give them in their order.
    queued_in_one = sa.and_(
        is_wanted_anywhere, runs.c.queue == sa.bindparam("queue"), _IS_QUEUED, ~IS_BEHIND
    )
    is_behind_place = sa.or_(
        runs.c.priority < sa.bindparam("priority"),
        sa.and_(
            runs.c.priority == sa.bindparam("priority"),
            runs.c.seq > sa.bindparam("after"),
        ),
    )
    lock_expired, lock_queued = (
        Prepared(
            sa.select(runs)
            .where(each, is_behind_place)
            .order_by(runs.c.priority.desc(), runs.c.seq)
            .limit(sa.bindparam("room", type_=sa.Integer))
            .with_for_update(of=runs, skip_locked=True)
        )
        for each in (expired, queued_in_one)
    )
    return Asking(
        lock_expired=lock_expired,
        lock_queued=lock_queued,
        next_due=Prepared(
            sa.select(
                sa.or_(
                    *(sa.exists(sa.select(runs.c.seq).where(each)) for each in (expired, queued))
                ).label("is_claimable"),
                _soonest(
                    runs.c.lease_expires_at,
                    "status = 'running'",
                    runs.c.lease_expires_at > _now,
                    is_wanted,
                ).label("expiry"),
                _soonest(
                    runs.c.start_deadline_at,
                    "status = 'queued' AND start_deadline_at IS NOT NULL",
                ).label("start_deadline"),
                _soonest(
                    runs.c.deadline_at,
                    "status IN ('queued', 'waiting') AND deadline_at IS NOT NULL",
                ).label("deadline"),
            )
        ),
    )


def _soonest(column: sa.Column[Any], where: str, *conditions: Any) -> Any:
    # In literals, as the partial indexes have it.
    of_tenant = runs.c.tenant == sa.bindparam("tenant")
    query = sa.select(sa.func.min(column)).where(sa.text(where), of_tenant, *conditions)
    return query.scalar_subquery()


def named(queues: Sequence[str], graphs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return queues and graphs as parameters."""
    return {
        **{f"queue_{i}": queue for i, queue in enumerate(queues)},
        **{f"graph_{i}": graph for i, (graph, _) in enumerate(graphs)},
        **{f"version_{i}": version for i, (_, version) in enumerate(graphs)},
    }


# What is paused, if anything, and whether looking for expired runs is worth it.
LOOK = Prepared(
    sa.select(
        pauses.c.scope,
        pauses.c.name,
        StoreNow().label("now"),
        _soonest(runs.c.lease_expires_at, "status = 'running'").label("expiry"),
    ).select_from(
        sa.select(sa.literal_column("1").label("one"))
        .subquery()
        .outerjoin(pauses, concerns(sa.bindparam("tenant")))
    )
)
IS_DUE = Prepared(
    sa.select(runs.c.run_id).where(
        runs.c.tenant == sa.bindparam("tenant"),
        runs.c.run_id == sa.bindparam("run_id"),
        sa.or_(is_expired(_now), _IS_QUEUED),
        ~IS_BEHIND,
    )
)


def next_due(
    connection: On,
    payloads: Payloads,
    tenant: str,
    queues: Collection[str],
    graphs: Collection[tuple[str, str]],
) -> NextDue:
    """See `RunStore.next_due`."""
    found = LOOK.all(connection, {"tenant": tenant})
    now = found[0].now
    open_queues, open_graphs = paused_of(found).without(queues, graphs)
    at = payloads.time(now)
    wanted = {"tenant": tenant, "now": now, "at": at, **named(open_queues, open_graphs)}
    due = asking(len(open_queues), len(open_graphs)).next_due.one(connection, wanted)
    deadlines = [each for each in (due.start_deadline, due.deadline) if each is not None]
    return NextDue(
        is_claimable=bool(due.is_claimable),
        expiry=None if due.expiry is None else due.expiry - now,
        deadline=min(deadlines) - at if deadlines else None,
    )
