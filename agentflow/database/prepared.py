"""Statements of SQLAlchemy Core that are compiled once and run on the bare driver.

For those that run several times for each attempt: SQLAlchemy's part of executing a statement and of
describing its result takes several times as long as running it does. What they are made of, and the
types of their parameters and columns, is Core's as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.dialects.sqlite import pysqlite
from sqlalchemy.engine import Connection
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData

from agentflow.database.session import Session, raw_cursor

Parameters = Mapping[str, Any]
On = Connection | Session
"""Where a statement runs: in SQLAlchemy's transaction, or on the bare connection."""
_Convert = Callable[[Any], Any]

_CURSOR = "agentflow_cursor"
# PostgreSQL's own way of marking parameters; the other one has to be translated for each statement.
_DIALECTS: Mapping[str, sa.Dialect] = {
    "sqlite": pysqlite.dialect(paramstyle="qmark"),
    "postgresql": psycopg.dialect(paramstyle="numeric_dollar"),  # type: ignore[no-untyped-call]
}


class Prepared:
    """A statement; parameters without a value are to be given with each execution.

    The driver's errors come as they are.
    """

    def __init__(self, statement: Any) -> None:
        """Prepare a `select`, `insert`, `update` or `delete` without expanding parameters."""
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def all(self, on: On, parameters: Parameters) -> Sequence[sa.Row[Any]]:
        """Run the statement and return its rows."""
        compiled, cursor = self.execute(on, parameters)
        return compiled.rows(cursor.fetchall())

    def first(self, on: On, parameters: Parameters) -> sa.Row[Any] | None:
        """Run the statement and return its first row, if there is one."""
        rows = self.all(on, parameters)
        return rows[0] if rows else None

    def one(self, on: On, parameters: Parameters) -> sa.Row[Any]:
        """Run the statement and return its only row."""
        (row,) = self.all(on, parameters)
        return row

    def run(self, on: On, parameters: Parameters) -> int:
        """Run the statement and return how many rows it has touched."""
        _, cursor = self.execute(on, parameters)
        count: int = cursor.rowcount
        return count

    def execute(self, on: On, parameters: Parameters) -> tuple[_Compiled, Any]:
        """Run the statement; return it as it was run, and the driver's cursor on what came back."""
        compiled = self.compiled(on)
        cursor = on.cursor if isinstance(on, Session) else _cursor(on)
        cursor.execute(compiled.text, compiled.bind(parameters))
        return compiled, cursor

    def compiled(self, on: On) -> _Compiled:
        """Return the statement in the words of the database that `on` is connected to."""
        dialect = on.dialect if isinstance(on, Session) else on.dialect.name
        compiled = self._compiled.get(dialect)
        if compiled is None:
            compiled = self._compiled[dialect] = _compile(self._statement, _DIALECTS[dialect])
        return compiled


def row_of(names: Sequence[str], values: Parameters) -> sa.Row[Any]:
    """Return a row with these columns; those that have no value are empty."""
    only = tuple(map(values.get, names))
    result: IteratorResult[Any] = IteratorResult(_metadata(tuple(names)), iter([only]))
    return result.one()


@cache
def _metadata(names: tuple[str, ...]) -> SimpleResultMetaData:
    return SimpleResultMetaData(names)


def changed(row: sa.Row[Any], values: Parameters) -> sa.Row[Any]:
    """Return a row as it will be when some of its columns are changed."""
    return row_of(row._fields, {**dict(zip(row._fields, row, strict=True)), **values})


class _Compiled(NamedTuple):
    """A statement in a database's own words."""

    text: str
    names: Sequence[tuple[str, _Convert | None]]
    """The parameters in their order, and how each is turned into what the driver takes."""
    converted: Sequence[tuple[int, _Convert]]
    """The columns that the driver does not return as they are to be."""
    metadata: SimpleResultMetaData
    constants: Parameters
    """Parameters that are part of the statement."""

    def bind(self, given: Parameters) -> list[Any]:
        given = {**self.constants, **given} if self.constants else given
        return [
            given[name] if convert is None else convert(given[name]) for name, convert in self.names
        ]

    def rows(self, found: Iterable[Sequence[Any]]) -> Sequence[sa.Row[Any]]:
        result: IteratorResult[Any] = IteratorResult(self.metadata, map(self._convert, found))
        return result.all()

    def _convert(self, row: Sequence[Any]) -> Sequence[Any]:
        values = list(row)
        for index, convert in self.converted:
            values[index] = convert(values[index])
        return tuple(values)


def _compile(statement: Any, dialect: sa.Dialect) -> _Compiled:
    if isinstance(statement, sa.Insert):
        statement = statement.inline()  # nobody asks for the numbers that rows are given
    compiled = statement.compile(dialect=dialect)
    names = [
        (name, compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect))
        for name in compiled.positiontup
    ]
    columns = list(statement.exported_columns)
    processors = (
        column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns
    )
    return _Compiled(
        text=compiled.string,
        names=names,
        converted=[(i, convert) for i, convert in enumerate(processors) if convert is not None],
        metadata=SimpleResultMetaData([column.key for column in columns]),
        constants={name: bind.value for name, bind in compiled.binds.items() if not bind.required},
    )


def _cursor(connection: Connection) -> Any:
    """Return the cursor that belongs to the driver's connection, for as long as that lives."""
    info = connection.info
    cursor = info.get(_CURSOR)
    if cursor is None:
        raw = connection.connection.driver_connection
        assert raw is not None
        cursor = raw_cursor(raw, connection.dialect.name)
        info[_CURSOR] = cursor
    return cursor
