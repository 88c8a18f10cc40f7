"""The rows of checkpoints in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Any

from agentflow.checkpoint.rows import ThreadChange
from agentflow.checkpoint.sql.rows import SqlRows
from agentflow.checkpoint.sql.statements import (
    CHECKPOINTS,
    MAX_PARAMETERS,
    VALUES,
    WRITES,
    Insert,
    changes_rows,
    padded,
)

_RAISE_KIND, _CHECKPOINT_KIND, _VALUE_KIND, _WRITES_KIND = range(4)
_SORTED = tuple("abcdefghijkl")
_SORTED_WIDTH = 1 + len(_SORTED)
_NOTHING = [None] * _SORTED_WIDTH


class SqliteRows(SqlRows):
    """SQLite: a batch is one statement, which commits by itself.

    The driver gives up the interpreter with each call, and has to wait for it afterwards while the
    graphs of other runs keep it busy: one call costs a batch far less than five. The rows of all
    tables go into a view, and its triggers put them where they belong; the first thread that is not
    as it was undoes all. Such a batch, and one with rows to be replaced, is a transaction.
    """

    def apply(self, changes: Sequence[ThreadChange]) -> set[int]:
        session = self._session
        rows: list[tuple[Any, ...]] = [
            (_RAISE_KIND, c.before.number, *c.before.version, c.after.seq) for c in changes
        ]
        rows += [(_CHECKPOINT_KIND, *row) for c in changes for row in c.checkpoints]
        rows += [(_VALUE_KIND, *row) for c in changes for row in c.values]
        rows += [(_WRITES_KIND, *row) for c in changes for row in c.writes]
        count = padded(len(rows))
        is_large = count * _SORTED_WIDTH > MAX_PARAMETERS
        if session.is_open or is_large or any(map(changes_rows, changes)):
            return super().apply(changes)
        session.once(_SORTER)
        parameters: list[Any] = []
        for row in rows:
            parameters += row
            parameters += _NOTHING[len(row) :]
        parameters += _NOTHING * (count - len(rows))
        try:
            session.commit_by(_sorted_sql(count), parameters)
        except sqlite3.IntegrityError:
            # A thread has changed, or an id is there already; a transaction tells which.
            return super().apply(changes)
        return {change.before.number for change in changes}


def _sorting(kind: int, action: str) -> str:
    return (
        f"CREATE TEMP TRIGGER agentflow_sort{kind} INSTEAD OF INSERT ON agentflow_sorted "
        f"WHEN NEW.kind = {kind} BEGIN {action}; END"
    )


def _put_by(insert: Insert) -> str:
    given = ", ".join(f"NEW.{name}" for name in _SORTED[: len(insert.columns)])
    return f"INSERT INTO {insert.table} ({', '.join(insert.columns)}) VALUES ({given})"


_SORTER = (
    "CREATE TEMP VIEW agentflow_sorted AS SELECT "
    + ", ".join(f"NULL AS {name}" for name in ("kind", *_SORTED)),
    _sorting(
        _RAISE_KIND,
        "UPDATE agentflow_threads SET seq = NEW.e WHERE id = NEW.a AND token = NEW.b "
        "AND is_leased = NEW.c AND seq = NEW.d; SELECT RAISE(ABORT, 'overtaken') "
        "WHERE changes() = 0",
    ),
    _sorting(_CHECKPOINT_KIND, _put_by(CHECKPOINTS)),
    _sorting(_VALUE_KIND, _put_by(VALUES)),
    _sorting(_WRITES_KIND, _put_by(WRITES)),
)


@cache
def _sorted_sql(count: int) -> str:
    row = f"({', '.join('?' * _SORTED_WIDTH)})"
    return f"INSERT INTO agentflow_sorted VALUES {', '.join([row] * count)}"
