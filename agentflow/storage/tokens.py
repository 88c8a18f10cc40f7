"""The row of a thread: what locks it against claims and submissions, and its fencing token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import StoreNow
from agentflow.database.prepared import Prepared
from agentflow.database.statements import insert_of
from agentflow.database.tables import epochs, leases
from agentflow.storage.rows import Beside
from agentflow.types import FencingToken, Lease

_OF_THREAD = (
    leases.c.tenant == sa.bindparam("of_tenant"),
    leases.c.thread_id == sa.bindparam("of_thread"),
)
_IS_KNOWN = Prepared(sa.select(leases.c.token).where(*_OF_THREAD))
_SET_TOKEN = Prepared(sa.update(leases).where(*_OF_THREAD).values(token=sa.bindparam("token")))
_locked = leases.alias("locked")
_TRY_THREAD = Prepared(
    sa.update(leases)
    .where(
        leases.c.tenant == sa.bindparam("of_tenant"),
        leases.c.thread_id
        == sa.select(_locked.c.thread_id)
        .where(
            _locked.c.tenant == sa.bindparam("of_tenant"),
            _locked.c.thread_id == sa.bindparam("of_thread"),
        )
        .with_for_update(skip_locked=True)
        .scalar_subquery(),
    )
    .values(token=leases.c.token + 1)
    .returning(leases.c.token)
)
"""Lock a thread, unless somebody else has, and give it the next token."""
_SET_BESIDE = (
    sa.update(leases)
    .where(*_OF_THREAD)
    .values(token=sa.bindparam("thread_token", type_=leases.c.token.type))
)


def lockable_token(run: sa.Table) -> sa.Label[Any]:
    """Return the token of a run's thread, which is locked by that; none if somebody else has it."""
    return (
        sa.select(_locked.c.token)
        .where(_locked.c.tenant == run.c.tenant, _locked.c.thread_id == run.c.thread_id)
        .with_for_update(skip_locked=True)
        .correlate(run)
        .scalar_subquery()
        .label("thread_token")
    )


_LEAST_TOKEN = sa.select(sa.func.coalesce(sa.func.max(epochs.c.token), 0)).scalar_subquery()


@cache
def _lock_thread(dialect: str, step: int, *look: sa.ColumnElement[Any]) -> Prepared:
    """Return the statement that makes or locks the row of a thread, and raises its token.

    On PostgreSQL it may look at something else as well, and say whether the row was made: then
    nobody else has had it locked, and what it finds is what stands there.
    """
    new: dict[str, Any] = {
        "tenant": sa.bindparam("of_tenant"),
        "thread_id": sa.bindparam("of_thread"),
        "token": _LEAST_TOKEN + step if step else _LEAST_TOKEN,
    }
    # A row is locked by writing to it what stands there.
    known = leases.c.token + step if step else leases.c.token
    return Prepared(
        insert_of(dialect, leases)
        .values(new)
        .on_conflict_do_update(index_elements=["tenant", "thread_id"], set_={"token": known})
        .returning(
            leases.c.token,
            StoreNow().label("now"),
            *((sa.literal_column("xmax = 0").label("is_new"), *look) if look else ()),
        )
    )


def lock_thread(connection: Connection, tenant: str, thread_id: str) -> sa.Row[Any]:
    """Lock a thread against claims and submissions; return its `token`, and what time it is."""
    named: dict[str, Any] = {"of_tenant": tenant, "of_thread": thread_id}
    return _lock_thread(connection.dialect.name, 0).one(connection, named)


def take_for_new_run(
    connection: Connection,
    tenant: str,
    thread_id: str,
    look: Sequence[sa.ColumnElement[Any]],
    parameters: Mapping[str, Any],
) -> tuple[sa.Row[Any], sa.Row[Any]]:
    """Lock a thread as `lock_thread` does, give it the next token, and look at something.

    Args:
        connection: The transaction's.
        tenant: Whose thread.
        thread_id: The thread.
        look: What is looked at, by `of_tenant`, `of_thread` and other parameters.
        parameters: The other ones.

    Returns:
        What `lock_thread` returns, and what `look` has found under the lock.
    """
    named = {"of_tenant": tenant, "of_thread": thread_id, **parameters}
    dialect = connection.dialect.name
    if dialect == "postgresql":
        # Each statement is a round trip.
        thread = _lock_thread(dialect, 1, *look).one(connection, named)
        if thread.is_new:
            return thread, thread
    else:
        thread = _lock_thread(dialect, 1).one(connection, named)
    # A statement of its own: that which locked the thread sees nothing of what it has waited for.
    return thread, _look(*look).one(connection, named)


@cache
def _look(*look: sa.ColumnElement[Any]) -> Prepared:
    return Prepared(sa.select(*look))


def take_thread(connection: Connection, row: sa.Row[Any]) -> FencingToken | None:
    """Lock the thread of a run and give it the next token; `None` if somebody else has it locked.

    Whoever asked for this run alone has locked its thread already.
    """
    of_thread = {"of_tenant": row.tenant, "of_thread": row.thread_id}
    taken = _TRY_THREAD.first(connection, of_thread)
    if taken is None:
        if _IS_KNOWN.first(connection, of_thread) is not None:
            return None  # somebody is about to take it, or to add a run to its thread
        lock_thread(connection, row.tenant, row.thread_id)
        taken = _TRY_THREAD.one(connection, of_thread)
    return FencingToken(taken.token)


def set_token(connection: Connection, tenant: str, thread_id: str, token: int) -> FencingToken:
    """Give a locked thread a token, and return it."""
    _SET_TOKEN.run(connection, {"of_tenant": tenant, "of_thread": thread_id, "token": token})
    return FencingToken(token)


def set_beside(lease: Lease) -> Beside:
    """Return how a locked thread is given the token of a lease beside a change of its run."""
    named = {"of_tenant": lease.tenant, "of_thread": lease.thread_id}
    return Beside(_SET_BESIDE, {**named, "thread_token": lease.token})
