"""Seeing that the keys are those of the database, before anything is written by them.

A process with another key under the name of the right one reads nothing; but what it wrote (an
event of a run that it could not read, say) nobody else could read.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.tables import runs
from agentflow.storage.payloads import Payloads, context_in, place_of

_LOOKED_AT = 20
"""How many of the newest runs."""


def check_keys(payloads: Payloads, connection: Connection) -> None:
    """Try the keys on the newest runs.

    Raises:
        HashMismatchError: Nothing that was sealed by a key of this name opens.
    """
    column = runs.c.config
    query = sa.select(runs.c.tenant, runs.c.run_id, column).order_by(runs.c.seq.desc())
    found = [dict(row) for row in connection.execute(query.limit(_LOOKED_AT)).mappings()]
    payloads.strict.check_keys(
        (row["config"], context_in(column, row), place_of(column, row)) for row in found
    )
