"""The rows of checkpoints in PostgreSQL."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from agentflow.checkpoint.rows import (
    CheckpointRow,
    FoundCheckpoint,
    Logged,
    ThreadChange,
    ThreadKey,
    ThreadState,
)
from agentflow.checkpoint.sql.rows import (
    TAKE_THREAD,
    THREAD_WIDTH,
    C,
    SqlRows,
    head,
    thread_state,
)
from agentflow.checkpoint.sql.statements import (
    CHECKPOINTS,
    MAX_PARAMETERS,
    VALUES,
    WRITES,
    changes_rows,
    padded,
)

_TYPES = {
    "id": "bigint", "token": "bigint", "is_leased": "boolean", "after": "bigint",
    "thread": "bigint", "ns": "text", "seq": "bigint", "checkpoint_id": "text",
    "parent_id": "text", "attempt": "text", "run_id": "text", "step": "int", "data": "bytea",
    "hash": "bytea", "parent_writes": "bytea", "base": "bytea", "series": "bigint",
    "start": "bigint",
}  # fmt: skip
_THREAD_COLUMNS = ("after", "id", "token", "is_leased", "seq")
_INSERTS = (CHECKPOINTS, VALUES, WRITES)
_WIDTHS = (len(_THREAD_COLUMNS), *(len(insert.columns) for insert in _INSERTS))


_WRITES_OF_HEAD = ", ".join(
    f"ARRAY(SELECT l.{column} FROM agentflow_writes l WHERE l.thread = c.thread AND l.ns = c.ns "
    "AND l.checkpoint_id = c.checkpoint_id ORDER BY l.seq)"
    for column in ("seq", "data")
)
_ROOT = "''"
_TAKE_AT_HEAD = (
    f"WITH taken AS ({TAKE_THREAD}) "
    f"SELECT taken.id, taken.token, taken.is_leased, taken.seq, seen.seq, {_WRITES_OF_HEAD}, "
    f"c.seq, {C} FROM taken "
    "LEFT JOIN agentflow_threads seen ON seen.id = taken.id "
    f"LEFT JOIN {head('postgresql', 'taken.id', _ROOT)}"
)


class PostgresRows(SqlRows):
    """PostgreSQL: a batch is one statement, and so one round trip, which commits by itself.

    One with too many rows for that, or with rows to be replaced, is a transaction.
    """

    _lock_clause = "FOR UPDATE OF t"

    def apply(self, changes: Sequence[ThreadChange]) -> set[int]:
        tables: tuple[list[tuple[Any, ...]], ...] = (
            [(c.after.seq, c.before.number, *c.before.version) for c in changes],
            [row for change in changes for row in change.checkpoints],
            [row for change in changes for row in change.values],
            [row for change in changes for row in change.writes],
        )
        sizes = tuple(map(padded, map(len, tables)))
        parameters: list[Any] = []
        is_large = sum(map(operator.mul, sizes, _WIDTHS)) > MAX_PARAMETERS
        if is_large or any(map(changes_rows, changes)):
            return super().apply(changes)
        for rows, size, width in zip(tables, sizes, _WIDTHS, strict=True):
            for row in rows:
                parameters += row
            parameters += [None] * ((size - len(rows)) * width)
        rows_of_held = self._session.commit_by(_apply_sql(*sizes), parameters)
        return {number for (number,) in rows_of_held}

    def take_at_head(
        self, thread: ThreadKey, token: int
    ) -> tuple[ThreadState, FoundCheckpoint | None, Mapping[tuple[int, str, str], list[Logged]]]:
        rows = self._session.commit_by(_TAKE_AT_HEAD, (*thread, token))
        if not rows:
            return super().take_at_head(thread, token)
        state = thread_state(rows[0][:THREAD_WIDTH])
        seen, numbers, logged, head_seq, *columns = rows[0][THREAD_WIDTH:]
        if seen != state.seq and state.seq:
            # Somebody wrote it while the statement waited for its row: of that it sees nothing.
            return super().take_at_head(thread, token)
        if head_seq is None:
            return state, None, {}
        head = CheckpointRow(*columns)
        writes = [Logged(seq, "", data) for seq, data in zip(numbers, logged, strict=True)]
        place = (head.thread, head.ns, head.checkpoint_id)
        return state, FoundCheckpoint(*thread, state, head, head_seq), {place: writes}


@cache
def _apply_sql(threads: int, *sizes: int) -> str:
    """Build the statement that applies changes, for so many rows of each kind."""
    parts = [_hold_one()] if threads == 1 else _hold(threads)
    for number, (insert, size) in enumerate(zip(_INSERTS, sizes, strict=True)):
        if size:
            listed = ", ".join(insert.columns)
            parts.append(
                f"inserted{number} AS (INSERT INTO {insert.table} ({listed}) "
                f"SELECT {', '.join(f'r.{column}' for column in insert.columns)} "
                f"FROM ({_rows_of(insert.columns, size)}) AS r({listed}) "
                f"JOIN held h ON h.id = r.thread {insert.conflict})"
            )
    return f"WITH {', '.join(parts)} SELECT id FROM held"


def _hold_one() -> str:
    """Raise the number of one thread: without an order, and without a join."""
    after, *known = (f"?::{_TYPES[name]}" for name in _THREAD_COLUMNS)
    is_as_it_was = map(" = ".join, zip(_THREAD_COLUMNS[1:], known, strict=True))
    return (
        f"held AS (UPDATE agentflow_threads SET seq = {after} "
        f"WHERE {' AND '.join(is_as_it_was)} RETURNING id)"
    )


def _hold(threads: int) -> list[str]:
    """Raise numbers in the order of the threads' ids, so that no batches wait for each other."""
    given = f"given({', '.join(_THREAD_COLUMNS)}) AS ({_rows_of(_THREAD_COLUMNS, threads)})"
    held = (
        "held AS MATERIALIZED (SELECT t.id, g.after FROM agentflow_threads t JOIN given g "
        "ON g.id = t.id AND g.token = t.token AND g.is_leased = t.is_leased AND g.seq = t.seq "
        "ORDER BY t.id FOR UPDATE OF t)"
    )
    raised = (
        "raised AS (UPDATE agentflow_threads t SET seq = h.after FROM held h WHERE h.id = t.id)"
    )
    return [given, held, raised]


def _rows_of(columns: Sequence[str], count: int) -> str:
    typed = ", ".join(f"?::{_TYPES[column]}" for column in columns)
    return f"VALUES {', '.join(f'({typed})' for _ in range(count))}"
