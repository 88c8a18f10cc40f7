"""Finding what is to be deleted in a SQL database, and deleting it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from agentflow.checkpoint.rows import (
    RETIRED,
    AnchorRow,
    CheckpointRow,
    DeadValue,
    DeletionVerbs,
    Link,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.checkpoint.sql.statements import DROP_VALUE, TABLES, fetch_for, given_table
from agentflow.database.session import Session

_REMOVE_WRITES = "DELETE FROM agentflow_writes WHERE thread = ? AND ns = ? AND checkpoint_id = ?"
_REMOVE_CHECKPOINT = "DELETE FROM agentflow_checkpoints WHERE thread = ? AND ns = ? AND seq = ?"
_REMOVE_ANCHOR = "DELETE FROM agentflow_anchors WHERE thread = ? AND ns = ? AND checkpoint_id = ?"
_LINK = (
    "ns, seq, checkpoint_id, parent_id, run_id, hash, parent_writes IS NOT NULL, "
    "length(data) + coalesce(length(parent_writes), 0) + coalesce(length(base), 0)"
)
_KINDS_OF_THREAD = (CheckpointRow, ValueRow, WritesRow, AnchorRow)
"""What goes with a thread; references stay until their objects are collected."""
_PAYLOADS: dict[type, tuple[str, ...]] = {
    kind: ("data", "parent_writes", "base") if kind is CheckpointRow else ("data",)
    for kind in _KINDS_OF_THREAD
}


class SqlDeletionVerbs(DeletionVerbs):
    """Deletion in a SQL database; the other verbs are `SqlRows`'."""

    _session: Session

    def list_threads_of_runs(self, tenant: str, run_ids: Collection[str]) -> list[ThreadKey]:
        rows = fetch_for(
            self._session,
            [(run_id,) for run_id in run_ids],
            ("run_id text",),
            "SELECT DISTINCT t.thread_id FROM {given} JOIN agentflow_checkpoints c "
            "ON c.run_id = w.run_id JOIN agentflow_threads t ON t.id = c.thread "
            "WHERE t.tenant = ?",
            tenant,
        )
        return sorted({(tenant, thread_id) for (thread_id,) in rows})

    def list_thread_ids(self, tenant: str, after: str, limit: int) -> list[str]:
        rows = self._session.fetch(
            "SELECT thread_id FROM agentflow_threads WHERE tenant = ? AND thread_id > ? "
            "AND seq > 0 ORDER BY thread_id LIMIT ?",
            (tenant, after, limit),
        )
        return [thread_id for (thread_id,) in rows]

    def list_namespaces(self, thread: int, after: str | None, limit: int) -> list[str]:
        # One step of the index for each namespace, however many checkpoints it has.
        beyond, given = ("", ()) if after is None else ("AND ns > ?", (after,))
        rows = self._session.fetch(
            f"WITH RECURSIVE n(ns, place) AS (SELECT (SELECT min(ns) FROM agentflow_checkpoints "
            f"WHERE thread = ? {beyond}), 1 UNION ALL SELECT (SELECT min(c.ns) "
            "FROM agentflow_checkpoints c WHERE c.thread = ? AND c.ns > n.ns), n.place + 1 "
            "FROM n WHERE n.ns IS NOT NULL AND n.place < ?) "
            "SELECT ns FROM n WHERE ns IS NOT NULL ORDER BY place",
            (thread, *given, thread, limit),
        )
        return [ns for (ns,) in rows]

    def find_newest(self, thread: int, ns: str, place: int) -> int | None:
        rows = self._session.fetch(
            "SELECT seq FROM agentflow_checkpoints WHERE thread = ? AND ns = ? "
            "ORDER BY seq DESC LIMIT 1 OFFSET ?",
            (thread, ns, place - 1),
        )
        return rows[0][0] if rows else None

    def count_older(self, thread: int, ns: str, seq: int) -> int:
        ((count,),) = self._session.fetch(
            "SELECT count(*) FROM agentflow_checkpoints WHERE thread = ? AND ns = ? AND seq < ?",
            (thread, ns, seq),
        )
        return int(count)

    def list_links(
        self,
        thread: int,
        ns: str,
        *,
        limit: int,
        after: int | None = None,
        below: int | None = None,
        run_ids: Collection[str] | None = None,
    ) -> list[Link]:
        conditions, parameters = ["thread = ?", "ns = ?"], [thread, ns]
        if after is not None:
            conditions.append("seq > ?")
            parameters.append(after)
        if below is not None:
            conditions.append("seq < ?")
            parameters.append(below)
        if run_ids is not None:
            conditions.append(f"run_id IN ({', '.join('?' for _ in run_ids)})")
            parameters += run_ids
        rows = self._session.fetch(
            f"SELECT {_LINK} FROM agentflow_checkpoints WHERE {' AND '.join(conditions)} "
            f"ORDER BY seq {'DESC' if after is None else ''} LIMIT ?",
            (*parameters, limit),
        )
        return [_link(row) for row in rows]

    def find_links(self, thread: int, ns: str, ids: Collection[str]) -> list[Link]:
        if not ids:
            return []
        rows = self._session.fetch(
            f"SELECT {_LINK} FROM agentflow_checkpoints WHERE thread = ? AND ns = ? "
            f"AND checkpoint_id IN ({', '.join('?' for _ in ids)})",
            (thread, ns, *ids),
        )
        return [_link(row) for row in rows]

    def find_anchor(self, thread: int, ns: str, checkpoint_id: str) -> AnchorRow | None:
        rows = self._session.fetch(
            f"SELECT {', '.join(AnchorRow._fields)} FROM agentflow_anchors "
            "WHERE thread = ? AND ns = ? AND checkpoint_id = ?",
            (thread, ns, checkpoint_id),
        )
        return AnchorRow(*rows[0]) if rows else None

    def remove(
        self, thread: int, checkpoints: Collection[Link], anchors: Collection[AnchorRow] = ()
    ) -> None:
        for statement, places in (
            (_REMOVE_WRITES, [(thread, link.ns, link.checkpoint_id) for link in checkpoints]),
            (_REMOVE_CHECKPOINT, [(thread, link.ns, link.seq) for link in checkpoints]),
            (_REMOVE_ANCHOR, [(thread, row.ns, row.checkpoint_id) for row in anchors]),
        ):
            if places:
                self._session.execute_many(statement, places)

    def list_series(
        self, thread: int, after: int, through: int, limit: int
    ) -> list[tuple[int, int]]:
        rows = self._session.fetch(
            "SELECT series, max(start) FROM agentflow_values WHERE thread = ? AND series > ? "
            "AND series <= ? GROUP BY series ORDER BY series LIMIT ?",
            (thread, after, through, limit),
        )
        return [(series, start) for series, start in rows]

    def remove_values(
        self, thread: int, dead: Sequence[DeadValue], *, limit: int, max_bytes: int
    ) -> bool:
        columns = ("series bigint", "start bigint", "last bigint")
        given = given_table(columns, len(dead), self._session.dialect)
        # CROSS JOIN keeps SQLite from going through all values of the thread instead.
        found = self._session.fetch(
            f"SELECT v.series, v.start, length(v.data) FROM {given} "
            "CROSS JOIN agentflow_values v WHERE v.thread = ? AND v.series = w.series "
            "AND v.start >= w.start AND v.start <= w.last LIMIT ?",
            [*(number for each in dead for number in each), thread, limit + 1],
        )
        some = _up_to(found, limit, max_bytes)
        if some:
            self._session.execute_many(DROP_VALUE, [(thread, *key) for key in some])
        return len(some) == len(found)

    def remove_some(self, thread: int, *, limit: int, max_bytes: int) -> bool:
        for kind in _KINDS_OF_THREAD:
            table, key = TABLES[kind]
            payload = " + ".join(f"coalesce(length({name}), 0)" for name in _PAYLOADS[kind])
            found = self._session.fetch(
                f"SELECT {', '.join(key)}, {payload} FROM {table} WHERE thread = ? LIMIT ?",
                (thread, limit + 1),
            )
            some = _up_to(found, limit, max_bytes)
            if some:
                self._session.execute_many(
                    f"DELETE FROM {table} WHERE thread = ? "
                    f"AND {' AND '.join(f'{name} = ?' for name in key)}",
                    [(thread, *each) for each in some],
                )
            if len(some) < len(found):
                return False
            limit -= len(some)
        return True

    def retire(self, thread: ThreadState) -> None:
        number, session = thread.number, self._session
        ((tenant, thread_id),) = session.fetch(
            "SELECT tenant, thread_id FROM agentflow_threads WHERE id = ?", (number,)
        )
        # Its number goes up as well, for those who remember its state.
        session.execute(
            "UPDATE agentflow_threads SET tenant = ?, thread_id = ?, seq = seq + 1 WHERE id = ?",
            (RETIRED, str(number), number),
        )
        session.execute(
            "INSERT INTO agentflow_threads (tenant, thread_id, token, is_leased, seq) "
            "VALUES (?, ?, ?, ?, ?)",
            (tenant, thread_id, thread.token, thread.is_leased, thread.seq + 1),
        )

    def find_retired(self) -> int | None:
        rows = self._session.fetch(
            "SELECT id FROM agentflow_threads WHERE tenant = ? ORDER BY id LIMIT 1", (RETIRED,)
        )
        return rows[0][0] if rows else None

    def forget_retired(self, thread: int) -> None:
        self._session.execute(
            "DELETE FROM agentflow_threads WHERE id = ? AND tenant = ?", (thread, RETIRED)
        )


def _link(row: Sequence[Any]) -> Link:
    ns, seq, checkpoint_id, parent_id, run_id, digest, carries, size = row
    return Link(ns, seq, checkpoint_id, parent_id, run_id, digest, bool(carries), size)


def _up_to(found: Sequence[tuple[Any, ...]], limit: int, max_bytes: int) -> list[tuple[Any, ...]]:
    """Return the keys of the first rows that are not too many and not too large; one at least.

    The last column of a row is its size.
    """
    keys: list[tuple[Any, ...]] = []
    size = 0
    for *key, length in found[:limit]:
        size += length
        if keys and size > max_bytes:
            break
        keys.append(tuple(key))
    return keys
