"""The rows of checkpoints in a database that speaks SQL: what the databases have in common.

Written for the bare driver: these statements run with every step of every graph. A change of a
thread compares token, lease and number of the thread's row in the statement that raises the number,
which locks the row; whoever raises the token waits for it, and comes before or after it as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from agentflow.checkpoint.layout import WHOLE, Part
from agentflow.checkpoint.rows import (
    AnyRow,
    CheckpointRow,
    FoundCheckpoint,
    FoundThread,
    HeadKey,
    Logged,
    Query,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    ValueRow,
)
from agentflow.checkpoint.sql.deletion import SqlDeletionVerbs
from agentflow.checkpoint.sql.objects import SqlObjectVerbs
from agentflow.checkpoint.sql.statements import (
    ANCHORS,
    CHECKPOINTS,
    DROP_VALUE,
    MAX_PARAMETERS,
    REPEATED,
    TABLES,
    VALUES,
    WRITES,
    Insert,
    extreme,
    fetch_for,
    given_table,
    insert_sql,
)
from agentflow.database.session import Session
from agentflow.failpoints import failpoint

C = ", ".join(f"c.{name}" for name in CheckpointRow._fields)
_THREAD = "t.id, t.token, t.is_leased, t.seq"
THREAD_WIDTH = 4
TAKE_THREAD = (
    "INSERT INTO agentflow_threads AS t (tenant, thread_id, token, is_leased, seq) "
    "VALUES (?, ?, ?, TRUE, 0) ON CONFLICT (tenant, thread_id) DO UPDATE "
    "SET token = excluded.token, is_leased = TRUE WHERE t.token <= excluded.token "
    "RETURNING id, token, is_leased, seq"
)
_GIVE_THREAD_BACK = (
    "UPDATE agentflow_threads SET is_leased = FALSE "
    "WHERE tenant = ? AND thread_id = ? AND token = ? RETURNING id, token, is_leased, seq"
)


class SqlRows(SqlDeletionVerbs, SqlObjectVerbs, Rows):
    """What the databases have in common."""

    _lock_clause = ""

    def __init__(self, session: Session) -> None:
        """Run statements on `session`."""
        self._session = session

    def exclusive(self) -> AbstractContextManager[None]:
        return self._session.transaction()

    def load_states(
        self, wanted: Mapping[ThreadKey, Collection[str]], *, lock: bool = False
    ) -> dict[ThreadKey, tuple[ThreadState, list[CheckpointRow]]]:
        keys = sorted(wanted)
        states = self._load_threads(keys, lock=lock)
        missing = [key for key in keys if key not in states]
        if missing:
            self._insert_threads(missing)
            states |= self._load_threads(missing, lock=lock)
        # By the number, not by who made the row: another process may have been faster.
        heads = [(states[key].number, ns) for key in keys if states[key].seq for ns in wanted[key]]
        found: dict[int, list[CheckpointRow]] = {}
        for row in self._load_heads(heads) if heads else ():
            found.setdefault(row.thread, []).append(row)
        return {key: (state, found.get(state.number, [])) for key, state in states.items()}

    def _load_threads(
        self, keys: Sequence[ThreadKey], *, lock: bool
    ) -> dict[ThreadKey, ThreadState]:
        rows = fetch_for(
            self._session,
            keys,
            ("tenant text", "thread_id text"),
            f"SELECT t.tenant, t.thread_id, {_THREAD} FROM {{given}} "
            "JOIN agentflow_threads t ON t.tenant = w.tenant AND t.thread_id = w.thread_id "
            f"ORDER BY t.id {self._lock_clause if lock else ''}",
        )
        return {(row[0], row[1]): thread_state(row[2:]) for row in rows}

    def _insert_threads(self, keys: Sequence[ThreadKey]) -> None:
        with self._session.transaction():
            self._session.execute_many(
                "INSERT INTO agentflow_threads (tenant, thread_id, token, is_leased, seq) "
                "VALUES (?, ?, 0, FALSE, 0) ON CONFLICT (tenant, thread_id) DO NOTHING",
                keys,
            )

    def _load_heads(self, places: Sequence[tuple[int, str]]) -> list[CheckpointRow]:
        rows = fetch_for(
            self._session,
            places,
            ("thread bigint", "ns text"),
            f"SELECT {C} FROM {{given}} JOIN {head(self._session.dialect, 'w.thread', 'w.ns')}",
        )
        return [CheckpointRow(*row) for row in rows]

    def apply(self, changes: Sequence[ThreadChange]) -> set[int]:
        session = self._session
        with session.transaction():
            applied = self._raise(changes)
            fresh = [change for change in changes if change.before.number in applied]
            for insert, rows in (
                (CHECKPOINTS, [row for change in fresh for row in change.checkpoints]),
                (REPEATED, [row for change in fresh for row in change.repeated]),
                (VALUES, [row for change in fresh for row in change.values]),
                (WRITES, [row for change in fresh for row in change.writes]),
            ):
                self._insert(insert, rows)
            anchors = [row for change in fresh for row in change.anchors]
            self._insert(ANCHORS, anchors)
            replaced = [_replacement(row) for change in fresh for row in change.replaced]
            dropped = [(c.before.number, *place) for c in fresh for place in c.dropped]
            for statement, parameters in ((_REPLACE_VALUE, replaced), (DROP_VALUE, dropped)):
                if parameters:
                    session.execute_many(statement, parameters)
            referring = [change for change in fresh if change.objects or change.released]
            if referring:
                self._refer(referring)
            if any(change.checkpoints or change.repeated for change in fresh):
                failpoint("checkpoint.after_insert")
        return applied

    def _refer(self, changes: Sequence[ThreadChange]) -> None:
        self.refer(
            [row for change in changes for row in change.objects],
            [(c.before.number, *place) for c in changes for place in c.released],
        )
        for change in changes:
            if change.confirm is not None:
                change.confirm()

    def _raise(self, changes: Sequence[ThreadChange]) -> set[int]:
        """Raise the numbers of the threads that are as they were, and say which these are."""
        session = self._session
        rows = [(c.before.number, *c.before.version, c.after.seq) for c in changes]
        if 1 < len(rows) <= MAX_PARAMETERS // len(_RAISED):
            given = given_table(_RAISED, len(rows), session.dialect)
            # The driver gives up the interpreter with each statement and waits to get it back.
            flat = [value for row in rows for value in row]
            ((count,),) = session.fetch(f"SELECT count(*) FROM {given} {_AS_IT_WAS}", flat)
            if count == len(rows):
                session.execute(
                    f"UPDATE agentflow_threads SET seq = w.after FROM {given} "
                    "WHERE agentflow_threads.id = w.id",
                    flat,
                )
                return {change.before.number for change in changes}
        return {row[0] for row in rows if session.execute(_RAISE, (row[-1], *row[:-1]))}

    def _insert(self, insert: Insert, rows: Sequence[tuple[Any, ...]]) -> None:
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[begin : begin + _ROWS_AT_ONCE]
            self._session.execute(
                insert_sql(insert, len(some)), [value for row in some for value in row]
            )

    def find_checkpoint(
        self, key: HeadKey, checkpoint_id: str | None
    ) -> FoundCheckpoint | FoundThread | None:
        tenant, thread_id, ns = key
        if checkpoint_id is None:
            sql = _find_head(self._session.dialect)
            rows = self._session.fetch(sql, (ns, tenant, thread_id))
        else:
            rows = self._session.fetch(_FIND_BY_ID, (ns, checkpoint_id, ns, tenant, thread_id))
        if not rows:
            return None
        thread = thread_state(rows[0][:THREAD_WIDTH])
        head_seq, *columns = rows[0][THREAD_WIDTH:]
        if columns[0] is None:
            return FoundThread(thread)
        return FoundCheckpoint(tenant, thread_id, thread, CheckpointRow(*columns), head_seq)

    def list_checkpoints(self, query: Query) -> list[FoundCheckpoint]:
        conditions, parameters = ["t.tenant = ?"], [query.tenant]
        order = "c.checkpoint_id DESC, t.thread_id DESC, c.ns DESC"

        def narrow(condition: str, *values: Any) -> None:
            conditions.append(condition)
            parameters.extend(values)

        if query.thread_id is not None:
            narrow("t.thread_id = ?", query.thread_id)
            order = "c.seq DESC"
        if query.ns is not None:
            narrow("c.ns = ?", query.ns)
        if query.checkpoint_id is not None:
            narrow("c.checkpoint_id = ?", query.checkpoint_id)
        if query.run_id is not None:
            narrow("c.run_id = ?", query.run_id)
        if isinstance(query.before, int):
            narrow("c.seq < ?", query.before)
        elif query.before is not None:
            narrow("c.checkpoint_id < ?", query.before)
        if isinstance(query.after, tuple):
            narrow("(c.checkpoint_id, t.thread_id, c.ns) < (?, ?, ?)", *query.after)
        elif query.after is not None:
            narrow("c.seq < ?", query.after)
        # The page is chosen from the indexes before any row is read.
        rows = self._session.fetch(
            f"SELECT t.thread_id, {_THREAD}, {C}, (SELECT max(h.seq) FROM agentflow_checkpoints h "
            "WHERE h.thread = c.thread AND h.ns = c.ns) FROM (SELECT c.thread, c.ns, c.seq "
            "FROM agentflow_threads t JOIN agentflow_checkpoints c ON c.thread = t.id "
            f"WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT ?) p "
            "JOIN agentflow_checkpoints c ON c.thread = p.thread AND c.ns = p.ns AND c.seq = p.seq "
            f"JOIN agentflow_threads t ON t.id = c.thread ORDER BY {order}",
            [*parameters, query.limit],
        )
        return [
            FoundCheckpoint(
                query.tenant,
                row[0],
                thread_state(row[1 : 1 + THREAD_WIDTH]),
                CheckpointRow(*row[1 + THREAD_WIDTH : -1]),
                row[-1],
            )
            for row in rows
        ]

    def locate(self, tenant: str, thread_id: str, checkpoint_id: str) -> tuple[str, int] | None:
        rows = self._session.fetch(
            "SELECT c.ns, c.seq FROM agentflow_threads t JOIN agentflow_checkpoints c "
            "ON c.thread = t.id WHERE t.tenant = ? AND t.thread_id = ? AND c.checkpoint_id = ? "
            "ORDER BY c.seq DESC LIMIT 1",
            (tenant, thread_id, checkpoint_id),
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def list_values(
        self, wanted: Iterable[tuple[int, Part]]
    ) -> dict[tuple[int, int], list[ValueRow]]:
        reach: dict[tuple[int, int], int] = {}
        for thread, part in wanted:
            end = 1 if part.length == WHOLE else part.length
            reach[thread, part.series] = max(end, reach.get((thread, part.series), 0))
        if not reach:
            return {}
        rows = fetch_for(
            self._session,
            [(*place, end) for place, end in reach.items()],
            ("thread bigint", "series bigint", "reach bigint"),
            "SELECT v.thread, v.series, v.start, v.data FROM {given} JOIN agentflow_values v "
            "ON v.thread = w.thread AND v.series = w.series AND v.start < w.reach "
            "ORDER BY v.thread, v.series, v.start",
        )
        found: dict[tuple[int, int], list[ValueRow]] = {}
        for row in rows:
            found.setdefault(row[:2], []).append(ValueRow(*row))
        return found

    def list_stretches(
        self, wanted: Collection[tuple[int, int, int]]
    ) -> dict[tuple[int, int, int], ValueRow]:
        rows = fetch_for(
            self._session,
            list(wanted),
            ("thread bigint", "series bigint", "place bigint"),
            "SELECT w.place, v.thread, v.series, v.start, v.data FROM {given} JOIN "
            + extreme(
                self._session.dialect,
                "agentflow_values",
                "v",
                "{}.thread = w.thread AND {}.series = w.series AND {}.start <= w.place",
                "start",
            ),
        )
        found = ((row[0], ValueRow(*row[1:])) for row in rows)
        return {(row.thread, row.series, place): row for place, row in found}

    def list_tail(self, thread: int, series: int, start: int) -> list[ValueRow]:
        rows = self._session.fetch(
            "SELECT thread, series, start, data FROM agentflow_values "
            "WHERE thread = ? AND series = ? AND start >= ? ORDER BY start",
            (thread, series, start),
        )
        return [ValueRow(*row) for row in rows]

    def list_writes(
        self, rows: Sequence[FoundCheckpoint]
    ) -> dict[tuple[int, str, str], list[Logged]]:
        if not rows:
            return {}
        places = [(f.row.thread, f.row.ns, f.row.checkpoint_id, f.row.seq) for f in rows]
        columns = ("thread bigint", "ns text", "id text", "seq bigint")
        logged = fetch_for(
            self._session,
            places,
            columns,
            "SELECT w.thread, w.ns, w.id, l.seq, '', l.data FROM {given} JOIN agentflow_writes l "
            "ON l.thread = w.thread AND l.ns = w.ns AND l.checkpoint_id = w.id",
        )
        followed = [p for p, f in zip(places, rows, strict=True) if f.row.seq < f.head_seq]
        if followed:
            # A checkpoint carries its parent's writes only if the parent was the head until then;
            # it is the next one of their namespace.
            logged += fetch_for(
                self._session,
                followed,
                columns,
                "SELECT w.thread, w.ns, w.id, s.seq, s.checkpoint_id, s.parent_writes "
                "FROM {given} JOIN "
                + extreme(
                    self._session.dialect,
                    "agentflow_checkpoints",
                    "s",
                    "{}.thread = w.thread AND {}.ns = w.ns AND {}.seq > w.seq",
                    "seq",
                    is_last=False,
                )
                + " WHERE s.parent_id = w.id AND s.parent_writes IS NOT NULL",
            )
        found: dict[tuple[int, str, str], list[Logged]] = {}
        for row in logged:
            found.setdefault(row[:3], []).append(Logged(*row[3:]))
        return found

    def list_threads(
        self, tenant: str | None, thread_id: str | None, after: int, limit: int
    ) -> list[tuple[ThreadKey, ThreadState]]:
        narrowed, parameters = _narrowed(tenant, thread_id)
        rows = self._session.fetch(
            f"SELECT t.tenant, t.thread_id, {_THREAD} FROM agentflow_threads t "
            f"WHERE {narrowed} AND t.id > ? ORDER BY t.id LIMIT ?",
            [*parameters, after, limit],
        )
        return [((row[0], row[1]), thread_state(row[2:])) for row in rows]

    def count_checkpoints(self, tenant: str | None, thread_id: str | None) -> int:
        sql = "SELECT count(*) FROM agentflow_checkpoints"
        parameters: list[Any] = []
        if tenant is not None or thread_id is not None:
            narrowed, parameters = _narrowed(tenant, thread_id)
            sql += f" WHERE thread IN (SELECT t.id FROM agentflow_threads t WHERE {narrowed})"
        ((count,),) = self._session.fetch(sql, parameters)
        return int(count)

    def count_by_namespace(self, thread: ThreadKey) -> dict[str, int]:
        rows = self._session.fetch(
            "SELECT c.ns, count(*) FROM agentflow_threads t JOIN agentflow_checkpoints c "
            "ON c.thread = t.id WHERE t.tenant = ? AND t.thread_id = ? GROUP BY c.ns",
            thread,
        )
        return {row[0]: row[1] for row in rows}

    def sweep(
        self, between: tuple[int, int], kind: type[AnyRow], after: AnyRow | None, limit: int
    ) -> list[AnyRow]:
        table: str
        key: tuple[str, ...]
        table, key = TABLES[kind]
        order = f"thread, {', '.join(key)}"
        begin: str = "thread > ?"
        parameters: list[Any] = [between[0]]
        if after is not None:
            begin = f"({order}) > (?, {', '.join('?' for _ in key)})"
            parameters = [after.thread, *(getattr(after, name) for name in key)]
        rows = self._session.fetch(
            f"SELECT {', '.join(kind._fields)} FROM {table} WHERE {begin} AND thread <= ? "
            f"ORDER BY {order} LIMIT ?",
            [*parameters, between[1], limit],
        )
        return [kind(*row) for row in rows]

    def list_line(self, key: HeadKey, checkpoint_id: str, limit: int) -> list[FoundCheckpoint]:
        tenant, thread_id, ns = key
        rows = self._session.fetch(_LINE, (tenant, thread_id, ns, checkpoint_id, limit))
        return [
            FoundCheckpoint(
                tenant,
                thread_id,
                thread_state(row[:THREAD_WIDTH]),
                CheckpointRow(*row[THREAD_WIDTH:-1]),
                row[-1],
            )
            for row in rows
        ]

    def scan(self, thread: ThreadState, kind: type[AnyRow], after: AnyRow | None) -> list[AnyRow]:
        table, key = TABLES[kind]
        columns = ", ".join(kind._fields)
        beyond, parameters = "", [thread.number]
        if after is not None:
            beyond = f"AND ({', '.join(key)}) > ({', '.join('?' for _ in key)})"
            parameters += [getattr(after, name) for name in key]
        rows = self._session.fetch(
            f"SELECT {columns} FROM {table} WHERE thread = ? {beyond} "
            f"ORDER BY {', '.join(key)} LIMIT {_PAGE}",
            parameters,
        )
        return [kind(*row) for row in rows]

    def rewrite(self, rows: Sequence[AnyRow]) -> None:
        if not rows:
            return
        table = TABLES[type(rows[0])][0]
        key: tuple[str, ...] = ("thread", *TABLES[type(rows[0])][1])
        others: list[str] = [name for name in rows[0]._fields if name not in key]
        self._session.execute_many(
            f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in others)} "
            f"WHERE {' AND '.join(f'{name} = ?' for name in key)}",
            [[getattr(row, name) for name in (*others, *key)] for row in rows],
        )

    def set_lease(self, thread: ThreadKey, token: int, *, is_leased: bool) -> ThreadState | None:
        sql = TAKE_THREAD if is_leased else _GIVE_THREAD_BACK
        rows = self._session.commit_by(sql, (*thread, token))
        if rows:
            return thread_state(rows[0])
        return self.load_states({thread: ()})[thread][0] if is_leased else None

    def raise_tokens(self, by: int) -> None:
        self._session.execute("UPDATE agentflow_threads SET token = token + ?", (by,))


def _narrowed(tenant: str | None, thread_id: str | None) -> tuple[str, list[Any]]:
    conditions = {"t.tenant = ?": tenant, "t.thread_id = ?": thread_id}
    given = {text: value for text, value in conditions.items() if value is not None}
    return " AND ".join(given) or "TRUE", list(given.values())


def _replacement(row: ValueRow) -> tuple[bytes, int, int, int]:
    return (row.data, row.thread, row.series, row.start)


def thread_state(row: Sequence[Any]) -> ThreadState:
    """Return the state of a thread by the columns of `_THREAD`."""
    number, token, is_leased, seq = row
    return ThreadState(number, token, bool(is_leased), seq)


_ROWS_AT_ONCE = 64
_RAISED = ("id bigint", "token bigint", "is_leased boolean", "seq bigint", "after bigint")
_AS_IT_WAS = (
    "JOIN agentflow_threads t ON t.id = w.id AND t.token = w.token "
    "AND t.is_leased = w.is_leased AND t.seq = w.seq"
)
_RAISE = (
    "UPDATE agentflow_threads SET seq = ? WHERE id = ? AND token = ? AND is_leased = ? AND seq = ?"
)
_REPLACE_VALUE = (
    "UPDATE agentflow_values SET data = ? WHERE thread = ? AND series = ? AND start = ?"
)
_HEAD_SEQ = "(SELECT max(h.seq) FROM agentflow_checkpoints h WHERE h.thread = t.id AND h.ns = ?)"
_FIND_BY_ID = (
    f"SELECT {_THREAD}, {_HEAD_SEQ}, {C} FROM agentflow_threads t "
    "LEFT JOIN agentflow_checkpoints c ON c.thread = t.id AND c.checkpoint_id = ? AND c.ns = ? "
    "WHERE t.tenant = ? AND t.thread_id = ?"
)
_LINE = (
    "WITH RECURSIVE line AS (SELECT c.thread, c.ns, c.seq, c.parent_id, 1 AS depth "
    "FROM agentflow_threads t JOIN agentflow_checkpoints c ON c.thread = t.id "
    "WHERE t.tenant = ? AND t.thread_id = ? AND c.ns = ? AND c.checkpoint_id = ? "
    "UNION ALL SELECT c.thread, c.ns, c.seq, c.parent_id, l.depth + 1 "
    "FROM line l JOIN agentflow_checkpoints c "
    "ON c.thread = l.thread AND c.ns = l.ns AND c.checkpoint_id = l.parent_id WHERE l.depth < ?) "
    f"SELECT {_THREAD}, {C}, (SELECT max(h.seq) FROM agentflow_checkpoints h "
    "WHERE h.thread = c.thread AND h.ns = c.ns) FROM line l JOIN agentflow_checkpoints c "
    "ON c.thread = l.thread AND c.ns = l.ns AND c.seq = l.seq "
    "JOIN agentflow_threads t ON t.id = l.thread ORDER BY l.depth"
)
_PAGE = 500


def head(dialect: str, thread: str, ns: str) -> str:
    """Return the right side of a join with the head `c` of a thread's namespace."""
    return extreme(
        dialect, "agentflow_checkpoints", "c", f"{{}}.thread = {thread} AND {{}}.ns = {ns}", "seq"
    )


@cache
def _find_head(dialect: str) -> str:
    return (
        f"SELECT {_THREAD}, c.seq, {C} FROM (SELECT CAST(? AS text) AS ns) w "
        "CROSS JOIN agentflow_threads t "
        f"LEFT JOIN {head(dialect, 't.id', 'w.ns')} WHERE t.tenant = ? AND t.thread_id = ?"
    )
