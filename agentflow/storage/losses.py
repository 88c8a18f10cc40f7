"""Whose fault it is that a worker died: which lost attempts count against their runs.

A worker that dies takes all of its runs with it, and one of them may have killed it. An attempt
that was lost with it counts only if there is nobody else to blame: if the run was the only one
there, or if it was in isolation. Runs that were lost repeatedly without progress are suspects, and
are driven in isolation. One that outlives it is pardoned: it is under suspicion again only when it
is lost as often once more. Without that the innocent would be isolated time and again, and each
time for as long as all of them together the time before.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.statements import insert_new
from agentflow.database.tables import runs, workers

_SUSPECT = 2
"""Losses without progress that make a suspect. One is what any restart of a machine does."""
_LONGEST = timedelta(minutes=5)


def is_suspect(row: sa.Row[Any]) -> bool:
    """Whether a run that is claimed now is to be driven in isolation."""
    return losses_of(row) - (row.pardoned or 0) >= _SUSPECT


def losses_of(row: sa.Row[Any]) -> int:
    """Return the losses of a run that is claimed now, with the one that the claim finds."""
    return (row.losses or 0) + (row.lease_expires_at is not None)


def isolation_of(row: sa.Row[Any], lease: timedelta) -> timedelta:
    """Return how long a suspect is isolated: as long as its lost attempt may have lived."""
    if row.lease_expires_at is None or row.claimed_at is None:
        return lease
    lived: timedelta = row.lease_expires_at - row.claimed_at
    return min(max(lived, lease), _LONGEST)


def has_counted(connection: Connection, row: sa.Row[Any], now: datetime) -> bool:
    """Whether the attempt counts that a locked, expired run has lost."""
    if row.instance is None:
        return True
    # Asked in any case: the first of its runs to be claimed again settles it for the others.
    held = _held_at_death(connection, row, now)
    return bool(row.is_isolated) or held <= 1


def _held_at_death(connection: Connection, row: sa.Row[Any], now: datetime) -> int:
    """Return how many runs an instance held when the first of them was found to have expired.

    The verdict is passed once and kept, under the lock on the worker's row: as its runs are claimed
    one after the other, there are fewer and fewer to be seen. It is passed again if the worker has
    shown a sign of life since, since then it had only lost some leases.
    """
    of_worker = (workers.c.tenant == row.tenant, workers.c.instance == row.instance)
    begun = row.claimed_at or now
    unknown = {
        "tenant": row.tenant,
        "instance": row.instance,
        "name": row.worker,
        "report": "",
        "started_at": begun,
        "beat_at": begun,
    }
    insert_new(connection, workers, [unknown])
    worker = connection.execute(sa.select(workers).where(*of_worker).with_for_update()).one()
    if worker.lost is not None and worker.lost_at >= worker.beat_at:
        return int(worker.lost)
    held = sa.select(sa.func.count()).where(
        runs.c.instance == row.instance, runs.c.status == sa.literal_column("'running'")
    )
    lost = int(connection.execute(held).scalar_one())
    connection.execute(sa.update(workers).where(*of_worker).values(lost=lost, lost_at=now))
    return lost
