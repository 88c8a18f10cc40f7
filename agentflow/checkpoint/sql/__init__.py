"""The rows of checkpoints in SQL databases, by text on the bare driver.

`rows.py` has what the databases have in common; `sqlite.py` and `postgresql.py` store the changes
of a step, which is where they differ.
"""

from __future__ import annotations

from agentflow.checkpoint.rows import Rows
from agentflow.checkpoint.sql.postgresql import PostgresRows
from agentflow.checkpoint.sql.sqlite import SqliteRows
from agentflow.database.session import Session

__all__ = ["PostgresRows", "SqliteRows", "open_rows"]


def open_rows(session: Session) -> Rows:
    """Return the rows on a session's connection."""
    return PostgresRows(session) if session.dialect == "postgresql" else SqliteRows(session)
