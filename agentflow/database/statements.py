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


def insert_or_lock(
    connection: Connection, table: sa.Table, row: Mapping[str, Any], column: str
) -> Any:
    """Insert a row, or lock the one with its primary key, and return a column of what is there."""
    statement = _insert_or_lock(connection.dialect.name, table, column)
    return connection.execute(statement, dict(row)).scalar_one()


def replace(connection: Connection, table: sa.Table, rows: Rows) -> None:
    """Insert whole rows, in place of those with the same primary key."""
    connection.execute(_replace(connection.dialect.name, table), list(rows))


@cache
def _insert_new(dialect: str, table: sa.Table) -> Any:
    return _insert(dialect, table).on_conflict_do_nothing(index_elements=_key(table))


@cache
def _replace(dialect: str, table: sa.Table) -> Any:
    statement = _insert(dialect, table)
    excluded = statement.excluded
    others = {c.name: excluded[c.name] for c in table.columns if not c.primary_key}
    return statement.on_conflict_do_update(index_elements=_key(table), set_=others)


@cache
def _insert_or_lock(dialect: str, table: sa.Table, column: str) -> Any:
    # A row is locked by writing to it what stands there.
    same = {column: table.c[column]}
    return (
        _insert(dialect, table)
        .on_conflict_do_update(index_elements=_key(table), set_=same)
        .returning(table.c[column])
    )


def _insert(dialect: str, table: sa.Table) -> Any:
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def _key(table: sa.Table) -> list[sa.Column[Any]]:
    return list(table.primary_key.columns)
