"""Statements that each dialect spells its own way.

They are built once: building one costs more than running it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

Rows = Sequence[Mapping[str, Any]]


def insert_new(connection: Connection, table: sa.Table, rows: Rows) -> None:
    """Insert rows, but for those whose primary key exists."""
    connection.execute(_insert_new(connection.dialect.name, table), list(rows))


def replace(connection: Connection, table: sa.Table, rows: Rows) -> None:
    """Insert whole rows, in place of those with the same primary key."""
    connection.execute(_replace(connection.dialect.name, table), list(rows))


@cache
def _insert_new(dialect: str, table: sa.Table) -> Any:
    return insert_of(dialect, table).on_conflict_do_nothing(index_elements=_key(table))


@cache
def _replace(dialect: str, table: sa.Table) -> Any:
    statement = insert_of(dialect, table)
    excluded = statement.excluded
    others = {c.name: excluded[c.name] for c in table.columns if not c.primary_key}
    return statement.on_conflict_do_update(index_elements=_key(table), set_=others)


def insert_of(dialect: str, table: sa.Table) -> Any:
    """Return an insert of a database's own kind, which says what to do on a conflict."""
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def _key(table: sa.Table) -> list[sa.Column[Any]]:
    return list(table.primary_key.columns)
