"""Which object holds which value: the table of references, and the folder of a database.

Objects go while who refers to them is locked out (`exclude_referrers`), and who commits a reference
sees, with collection locked out, that the object is there. A reference outlives its value, so that
who has read the row has time to read the object.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentflow.database.session import Session
from agentflow.types import new_id

EFFECTS = 0
"""What stands for the thread where an outcome is: the effect's number and attempt follow. Threads
are numbered from 1."""

_LOCK = 0x61676F626A  # any number that nobody else is likely to lock
_LEAVE = (
    "UPDATE agentflow_objects SET unneeded_at = 0 WHERE thread = ? AND series = ? AND start = ? "
    "AND unneeded_at IS NULL"
)
_REFER = (
    "INSERT INTO agentflow_objects (thread, series, start, object) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (thread, series, start, object) DO UPDATE SET unneeded_at = NULL"
)
IS_ABANDONED = (
    "(unneeded_at = 0 OR (unneeded_at IS NULL "
    "AND NOT EXISTS (SELECT 1 FROM agentflow_values v "
    "WHERE v.thread = agentflow_objects.thread AND v.series = agentflow_objects.series "
    "AND v.start = agentflow_objects.start) "
    "AND NOT (agentflow_objects.thread = 0 AND EXISTS (SELECT 1 FROM agentflow_effects e "
    "WHERE e.seq = agentflow_objects.series AND e.attempt = agentflow_objects.start "
    "AND e.outcome IS NOT NULL))))"
)
"""The condition that nothing is in an object any more that was."""

Place = tuple[int, int, int]
"""Where a value is: thread, series and start."""


def refer(
    session: Session, objects: Sequence[tuple[int, int, int, str]], released: Sequence[Place] = ()
) -> None:
    """Note which objects places have now; keeps collection out until the transaction ends."""
    lock_objects(session, is_exclusive=False)
    left = [*(row[:3] for row in objects), *released]
    if left:
        session.execute_many(_LEAVE, left)
    if objects:
        session.execute_many(_REFER, objects)


def lock_objects(session: Session, *, is_exclusive: bool) -> None:
    """Keep collection and referrers apart; one writer at a time needs nothing for that."""
    if session.dialect == "postgresql":
        lock = "pg_advisory_xact_lock" if is_exclusive else "pg_advisory_xact_lock_shared"
        session.fetch(f"SELECT {lock}(?::bigint)", (_LOCK,))


def find_space(session: Session, *, make: bool) -> tuple[str, bool] | None:
    """Return the folder of the database in its object tier, and whether it had one."""
    query = "SELECT name FROM agentflow_object_space"
    for was_there in (True, False):
        if rows := session.fetch(query):
            return rows[0][0], was_there
        if make and was_there:
            with session.transaction():
                session.execute(
                    "INSERT INTO agentflow_object_space (id, name) VALUES (1, ?) "
                    "ON CONFLICT (id) DO NOTHING",
                    (new_id(),),
                )
    return None
