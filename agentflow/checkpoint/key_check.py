"""Seeing that the keys are those of the database, before anything is written by them.

A process with another key under the name of the right one reads nothing; but what it wrote nobody
else could read.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import RETIRED, CheckpointRow
from agentflow.codec import Codec
from agentflow.database.tables import checkpoints, threads

_LOOKED_AT = 20
"""How many checkpoints of the newest threads."""


def check_keys(codec: Codec, connection: Connection) -> None:
    """Try the keys on the checkpoints of the newest threads.

    Raises:
        HashMismatchError: Nothing that was sealed by a key of this name opens.
    """
    query = (
        sa.select(threads.c.tenant, threads.c.thread_id, checkpoints)
        .join(threads, threads.c.id == checkpoints.c.thread)
        .where(threads.c.tenant != RETIRED)
        .order_by(checkpoints.c.thread.desc())
        .limit(_LOOKED_AT)
    )
    found = []
    for tenant, thread_id, *columns in connection.execute(query):
        row = CheckpointRow(*columns)
        place = Place(tenant, thread_id, row.ns)
        where = place.of(f"checkpoint {row.checkpoint_id!r}")
        found.append((row.data, place.context_of_row(row), where))
    codec.check_keys(found)
