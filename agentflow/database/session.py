"""The bare driver connection, for the few statements that run with every step of every graph.

SQLAlchemy's overhead of a statement is several times what SQLite needs to run it. Everything else
goes through SQLAlchemy's `Connection`, which a session of the writer has as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy.engine import Connection

from agentflow.failpoints import failpoint

Parameters = Sequence[Any]


class Session:
    """Runs statements on one connection; parameters are marked by `?` whatever the driver."""

    def __init__(self, raw: Any, dialect: str, connection: Connection | None = None) -> None:
        """Wrap a driver's connection.

        Args:
            raw: The driver's connection; without `connection` it commits each statement by itself.
            dialect: SQLAlchemy's name of the database.
            connection: SQLAlchemy's connection on it, inside the transaction to run in.
        """
        self._raw = raw
        self._cursor: Any = raw_cursor(raw, dialect)
        self._connection = connection
        self.dialect = dialect
        self._is_open = connection is not None
        self._after_commit: list[Callable[[], None]] = []
        self._done: set[tuple[str, ...]] = set()

    @classmethod
    def inside(cls, connection: Connection) -> Session:
        """Return a session inside the transaction of SQLAlchemy's connection."""
        return cls(connection.connection.driver_connection, connection.dialect.name, connection)

    @property
    def cursor(self) -> Any:
        """The driver's cursor, for statements in the database's own words."""
        return self._cursor

    @property
    def is_open(self) -> bool:
        """Whether what is run is part of a transaction."""
        return self._is_open

    @property
    def connection(self) -> Connection:
        """SQLAlchemy's connection; there is one inside a transaction of the writer's."""
        assert self._connection is not None
        return self._connection

    @property
    def is_broken(self) -> bool:
        """Whether the connection to a server is gone."""
        return bool(self._raw.closed)

    def close(self) -> None:
        """End the session; the connection stays open."""
        self._cursor.close()

    def fetch(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Run a query and return its rows."""
        self._cursor.execute(self._spelled(sql), parameters)
        rows: list[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def commit_by(self, sql: str, parameters: Parameters) -> list[tuple[Any, ...]]:
        """Run a statement which, if no transaction is open, commits by itself; return its rows."""
        if not self._is_open:
            failpoint("database.before_commit")
        return self.fetch(sql, parameters)

    def once(self, statements: tuple[str, ...]) -> None:
        """Run statements that prepare the connection, unless this session has."""
        if statements not in self._done:
            # Whole or not at all, or else they would fail the next time.
            self._cursor.execute("BEGIN")
            try:
                for statement in statements:
                    self._cursor.execute(statement)
                self._cursor.execute("COMMIT")
            except BaseException:
                self._cursor.execute("ROLLBACK")
                raise
            self._done.add(statements)

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run a statement and return how many rows it has touched."""
        self._cursor.execute(self._spelled(sql), parameters)
        count: int = self._cursor.rowcount
        return count

    def execute_many(self, sql: str, rows: Sequence[Parameters]) -> None:
        """Run a statement for each row."""
        self._cursor.executemany(self._spelled(sql), rows)
        if self.dialect != "sqlite":
            # psycopg sends many rows as a pipeline. PostgreSQL takes the Flush that ends it for a
            # new request, and would let the session idle in its transaction without a limit.
            self._cursor.execute("SELECT 1")

    def _spelled(self, sql: str) -> str:
        return sql if self.dialect == "sqlite" else _numbered(sql)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run what follows in one transaction: the one that is open, or else one of its own."""
        if self._is_open:
            yield
            return
        self._cursor.execute("BEGIN IMMEDIATE" if self.dialect == "sqlite" else "BEGIN")
        self._is_open = True
        try:
            yield
            failpoint("database.before_commit")
            self._raw.commit()
        except BaseException:
            self._raw.rollback()
            raise
        finally:
            self._is_open = False

    def after_commit(self, action: Callable[[], None]) -> None:
        """Call `action` once what was written so far is durable."""
        self._after_commit.append(action)

    def committed(self) -> None:
        """Call what waits for the commit; by whoever has committed."""
        actions, self._after_commit = self._after_commit, []
        for action in actions:
            action()


def raw_cursor(connection: Any, dialect: str) -> Any:
    """Return a cursor that sends statements as they are, since reading long ones takes long."""
    if dialect == "sqlite":
        return connection.cursor()
    import psycopg

    return psycopg.RawCursor(connection)


@lru_cache(maxsize=1000)
def _numbered(sql: str) -> str:
    """Number the parameters, as PostgreSQL itself does."""
    first, *parts = sql.split("?")
    return first + "".join(f"${i}{part}" for i, part in enumerate(parts, 1))
