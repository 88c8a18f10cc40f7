"""What a SQL database knows of the objects in which values are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from agentflow.checkpoint.rows import ObjectRow, ObjectVerbs
from agentflow.checkpoint.sql.statements import fetch_for
from agentflow.database.objects import IS_ABANDONED, find_space, lock_objects, refer
from agentflow.database.session import Session


class SqlObjectVerbs(ObjectVerbs):
    """References to objects in a SQL database; the other verbs are `SqlRows`'."""

    _session: Session

    def refer(
        self, objects: Sequence[ObjectRow], released: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        refer(self._session, objects, released)

    def find_space(self, *, make: bool) -> tuple[str, bool] | None:
        return find_space(self._session, make=make)

    def has_objects(self, thread: int) -> bool:
        query = "SELECT 1 FROM agentflow_objects WHERE thread = ? LIMIT 1"
        return bool(self._session.fetch(query, (thread,)))

    def exclude_referrers(self) -> None:
        lock_objects(self._session, is_exclusive=True)

    def list_abandoned(self, limit: int) -> list[ObjectRow]:
        rows = self._session.fetch(
            f"SELECT {', '.join(ObjectRow._fields)} FROM agentflow_objects "
            f"WHERE {IS_ABANDONED} LIMIT ?",
            (limit,),
        )
        return [ObjectRow(*row) for row in rows]

    def abandon(self, rows: Sequence[ObjectRow], at: datetime) -> None:
        # The value may have come back meanwhile: a thread that was restored has its old numbers.
        self._session.execute_many(
            f"UPDATE agentflow_objects SET unneeded_at = ? WHERE thread = ? AND series = ? "
            f"AND start = ? AND object = ? AND {IS_ABANDONED}",
            [(_stamp(at), *row) for row in rows],
        )

    def forget_objects(self, before: datetime, limit: int) -> bool:
        found = self._session.fetch(
            f"SELECT {', '.join(ObjectRow._fields)} FROM agentflow_objects "
            "WHERE unneeded_at > 0 AND unneeded_at <= ? LIMIT ?",
            (_stamp(before), limit + 1),
        )
        if found:
            self._session.execute_many(
                "DELETE FROM agentflow_objects WHERE thread = ? AND series = ? AND start = ? "
                "AND object = ? AND unneeded_at > 0 AND unneeded_at <= ?",
                [(*row, _stamp(before)) for row in found[:limit]],
            )
        return len(found) <= limit

    def find_needed(self, names: Sequence[str], since: datetime) -> set[str]:
        rows = fetch_for(
            self._session,
            [(name,) for name in names],
            ("name text",),
            "SELECT DISTINCT w.name FROM {given} JOIN agentflow_objects o ON o.object = w.name "
            "WHERE o.unneeded_at IS NULL OR o.unneeded_at = 0 OR o.unneeded_at > ?",
            _stamp(since),
        )
        return {name for (name,) in rows}


def _stamp(at: datetime) -> int:
    """Return a time as the database has it: microseconds since 1970."""
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
