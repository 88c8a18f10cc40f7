"""The rows of checkpoints in SQL databases, by text on the bare driver.

`rows.py` has what the databases have in common; `deletion.py` and `objects.py` are parts of it.
`sqlite.py` and `postgresql.py` store the changes of a step, which is where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.engine import Connection

from agentflow.checkpoint.rows import Rows
from agentflow.checkpoint.sql.postgresql import PostgresRows
from agentflow.checkpoint.sql.sqlite import SqliteRows
from agentflow.database.session import Session

__all__ = ["PostgresRows", "SqliteRows", "on_rows", "on_snapshot", "open_rows"]

T = TypeVar("T")


def open_rows(session: Session) -> Rows:
    """Return the rows on a session's connection."""
    return PostgresRows(session) if session.dialect == "postgresql" else SqliteRows(session)


def on_rows(function: Callable[[Rows], T]) -> Callable[[Session], T]:
    """Return `function` of the rows as a function of a session."""
    return lambda session: function(open_rows(session))


def on_snapshot(function: Callable[[Rows], T]) -> Callable[[Connection], T]:
    """Return `function` of the rows as one of a connection on which all reads see one moment."""

    def run(connection: Connection) -> T:
        session = Session.inside(connection)
        try:
            return function(open_rows(session))
        finally:
            session.close()

    return run
