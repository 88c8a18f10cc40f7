"""Outcomes that are too large for their rows, as objects that these refer to.

See `agentflow.apart`. An outcome matters more than where it is: if the object store is down, it
goes into its row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow import apart
from agentflow.apart import Reference, Sealed
from agentflow.codec import is_apart
from agentflow.database import Database
from agentflow.database.objects import EFFECTS, find_space, lock_objects, refer
from agentflow.database.session import Session
from agentflow.database.tables import effects, objects
from agentflow.errors import ObjectStoreError
from agentflow.objects import ObjectTier
from agentflow.storage.payloads import Keyed, Payloads, context_in, place_of

logger = logging.getLogger(__name__)

_COLUMN = effects.c.outcome


async def seal_body(database: Database, payloads: Payloads, row: Keyed, body: bytes) -> Sealed:
    """Seal a serialized outcome for its row, and put it into an object if it is too large."""
    codec = payloads.strict
    if codec.tier is None or not apart.is_large(codec, body):
        return Sealed(payloads.seal(body, _COLUMN, row))
    try:
        space = await _space(database, codec.tier)
        return await asyncio.to_thread(put_apart, payloads, codec.tier, space, row, body)
    except ObjectStoreError as exc:
        logger.warning(
            "outcome is stored in the database: the object store has refused it",
            extra={"place": place_of(_COLUMN, row), "error": type(exc).__name__},
        )
        return Sealed(payloads.seal(body, _COLUMN, row))


def put_apart(payloads: Payloads, tier: ObjectTier, space: str, row: Keyed, body: bytes) -> Sealed:
    """Put a large outcome into an object, and seal the reference to it for its row."""
    context = context_in(_COLUMN, row)
    return apart.put_apart(payloads.strict, tier, space, _columns(row)["tenant"], body, context)


def open_apart(payloads: Payloads, row: Keyed) -> bytes:
    """Return the serialized outcome to which a row refers; see `apart.fetch_apart`."""
    reference, where = read_reference(payloads, row), place_of(_COLUMN, row)
    return apart.fetch_apart(payloads.strict, _columns(row)["tenant"], reference, where)


def read_reference(payloads: Payloads, row: Keyed) -> Reference:
    """Verify and open what a row has in the place of an outcome."""
    where = place_of(_COLUMN, row)
    data = _columns(row)["outcome"]
    return apart.read_reference(payloads.strict, data, context_in(_COLUMN, row), where)


def hold(connection: Connection, payloads: Payloads, seq: int, attempt: int, name: str) -> bool:
    """Refer to an object for an effect; `False`, and nothing changes, if it was collected."""
    tier = payloads.strict.tier
    session = Session.inside(connection)
    lock_objects(session, is_exclusive=False)
    if tier is None or not tier.store.has(name):
        return False
    refer(session, [(EFFECTS, seq, attempt, name)])
    return True


def release(connection: Connection, numbers: Iterable[int]) -> None:
    """Note that effects, which are deleted, need no objects any more."""
    connection.execute(
        sa.update(objects)
        .where(objects.c.thread == EFFECTS, objects.c.series.in_(numbers))
        .where(objects.c.unneeded_at.is_(None))
        .values(unneeded_at=sa.text("0"))
    )


def has_any(rows: Iterable[sa.Row[Any]]) -> bool:
    """Whether to read some of these rows takes reading objects."""
    return any(row.outcome is not None and is_apart(row.outcome) for row in rows)


def _columns(row: Keyed) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", row._mapping) if isinstance(row, sa.Row) else row


async def _space(database: Database, tier: ObjectTier) -> str:
    if tier.space is None:
        found = await database.write(lambda each: find_space(Session.inside(each), make=True))
        assert found is not None
        tier.space = found[0]  # it is durable by now
    return tier.space
