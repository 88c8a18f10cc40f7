"""Storage URLs, engines, and what differs between the databases."""

from __future__ import annotations

import importlib.util
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import StaticPool

from agentflow.config import Settings
from agentflow.database.prepared import Prepared
from agentflow.database.tables import Timestamp
from agentflow.errors import (
    MissingDriverError,
    Outcome,
    StoreDamagedError,
    StoreUnavailableError,
    UnsupportedUrlError,
)

SUPPORTED = ("memory://", "sqlite:///file", "postgresql://")
READERS = 4
_CONNECT_TIMEOUT = 10
_IMPATIENT = timedelta(milliseconds=100)
"""How long a server may take to answer somebody who cannot wait."""
_WAL_RETRY = 0.005
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PAGE_SIZE = 1024
"""Bytes of a page of a new file. Most rows are small, and each table and index has a page at least,
so that a small file is smaller than with SQLite's 4096; docs/benchmarks.md has what it costs."""
_WAL_SIZE = 1000 * 4096
_PADDING = 6_200_000
"""Bytes that overflow SQLite's page cache of 2 MB by a little more than the log's usual size."""


def parse_url(url: str) -> URL:
    """Turn a storage URL into SQLAlchemy's, with the driver that agentflow uses.

    Raises:
        UnsupportedUrlError: The scheme is unknown, or the text is no URL.
        MissingDriverError: The database's driver is not installed.
    """
    scheme = url.partition(":")[0] if ":" in url else url
    if url in {"memory://", "sqlite://", "sqlite:///", "sqlite:///:memory:"}:
        # Written like a file but naming none would lose everything with the process.
        if url.startswith("sqlite:"):
            raise UnsupportedUrlError(url, SUPPORTED)
        return make_url("sqlite://")
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError) as exc:
        raise UnsupportedUrlError(scheme, SUPPORTED) from exc
    if parsed.drivername == "sqlite":
        return parsed
    if parsed.drivername in {"postgresql", "postgres", "postgresql+psycopg"}:
        if importlib.util.find_spec("psycopg") is None:
            raise MissingDriverError("psycopg", "postgres")
        return parsed.set(drivername="postgresql+psycopg")
    raise UnsupportedUrlError(parsed.drivername, SUPPORTED)


def make_engine(url: URL, settings: Settings, *, is_patient: bool = False) -> Engine:
    """Make the engine of a database; nothing connects yet.

    Args:
        url: The database.
        settings: How long to wait for it.
        is_patient: Whether a single statement may take longer than that, as in a migration.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, settings)
    return _postgres_engine(url, settings, is_patient=is_patient)


def _postgres_engine(url: URL, settings: Settings, *, is_patient: bool) -> Engine:
    timeout = int(settings.store_timeout.total_seconds())
    engine = sa.create_engine(
        url,
        hide_parameters=True,  # parameters are payloads; messages of errors must not show them
        pool_size=READERS + 1,
        max_overflow=0,
        pool_timeout=timeout,
        connect_args={"connect_timeout": max(2, min(timeout, _CONNECT_TIMEOUT))},
    )
    limits = transaction_limits(settings)
    if not is_patient:
        _give_up_in_time(engine, settings.store_timeout)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        # A pooler that hands out sessions by the transaction invents the id that it gives its
        # clients. Behind one, neither settings nor prepared statements outlast a transaction.
        with connection.cursor() as cursor:
            ((backend,),) = cursor.execute("SELECT pg_backend_pid()").fetchall()
            record.info["is_pooled"] = backend != connection.info.backend_pid
            if record.info["is_pooled"]:
                connection.prepare_threshold = None
            else:
                for name, milliseconds in limits.items():
                    cursor.execute(f"SET {name} = {milliseconds}")
        connection.commit()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.connection.info.get("is_pooled"):
            for name, milliseconds in limits.items():
                connection.exec_driver_sql(f"SET LOCAL {name} = {milliseconds}")

    @sa.event.listens_for(engine, "after_cursor_execute")
    def _go_idle(  # the arguments are SQLAlchemy's
        _connection: Any, cursor: Any, _sql: Any, _values: Any, _context: Any, is_many: Any
    ) -> None:
        # psycopg sends many rows as a pipeline. PostgreSQL takes the Flush that ends it for a new
        # request, and would let the session idle in its transaction without a limit.
        if is_many:
            cursor.connection.execute("SELECT 1")

    return engine


def connect_bare(url: URL, settings: Settings) -> Any:
    """Connect to PostgreSQL beside the pool; each statement commits by itself."""
    import psycopg

    arguments, options = url.get_dialect()().create_connect_args(url)
    limit = int(settings.store_timeout.total_seconds())
    return psycopg.connect(
        *arguments,
        **options,
        autocommit=True,
        # It may be behind a pooler, where a prepared statement would be left to somebody else.
        prepare_threshold=None,
        connect_timeout=max(2, min(limit, _CONNECT_TIMEOUT)),
        # A connection on which nothing is said is not noticed to be dead by anybody else.
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
        tcp_user_timeout=limit * 1000,
    )


def _give_up_in_time(engine: Engine, limit: timedelta) -> None:
    """Close a connection whose server does not answer; the network may swallow all in silence."""
    import psycopg

    class Connection(psycopg.Connection[Any]):
        patience = limit.total_seconds()

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return super().wait(gen, interval=interval, timeout=self.patience)
            except psycopg.errors._WaitTimeout as exc:
                self.pgconn.finish()
                raise psycopg.OperationalError("the server gave no answer in time") from exc

    @sa.event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        return Connection.connect(*arguments, **options)


def set_patience(connection: Any, dialect: str, settings: Settings, *, is_patient: bool) -> None:
    """Say whether a driver's connection waits for locks of SQLite, or for a server's answer.

    A server that has not answered loses the connection, since nothing else ends a statement.
    """
    if dialect == "sqlite":
        wait = settings.store_timeout if is_patient else timedelta()
        connection.execute(f"PRAGMA busy_timeout={int(wait.total_seconds() * 1000)}")
    else:
        wait = settings.store_timeout if is_patient else _IMPATIENT
        connection.patience = wait.total_seconds()


def transaction_limits(settings: Settings) -> dict[str, int]:
    """Return PostgreSQL's settings, in milliseconds, that keep a stopped process from blocking all.

    A process that is stopped inside a transaction holds row locks that no one can pass: the server
    ends its session within the length of a lease. Until then, whoever wants those rows gives up
    soon, since everything else that its process writes is waiting behind.
    """
    lease_ms = settings.lease.total_seconds() * 1000
    return {
        # Not below a second: a process that is merely slow may pause that long.
        "idle_in_transaction_session_timeout": max(1000, int(lease_ms / 2)),
        "lock_timeout": max(1, int(lease_ms / 10)),
    }


def _enable_wal(cursor: sqlite3.Cursor, timeout: timedelta) -> None:
    """Switch a file to write-ahead logging, once for all its life.

    SQLite's busy timeout does not cover this one statement: of two connections that open a new file
    at once, one is told at once that it is locked.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF not in _LOCKED or time.monotonic() >= deadline:
                raise
            time.sleep(_WAL_RETRY)
        else:
            return


def grow_wal(connection: sqlite3.Connection) -> None:
    """Make the write-ahead log of a file as long as it will get, in one go, if nobody writes now.

    A commit that makes its file longer waits for the file system's own journal as well, and takes
    about twice as long as one that writes over what is there. SQLite starts the log again from its
    beginning once it is full. A transaction that is too large for the page cache and is
    rolled back leaves so many in it, and nothing in the database.
    """
    ((_, _, file),) = connection.execute("PRAGMA database_list").fetchall()[:1]
    log = Path(f"{file}-wal")
    if not log.exists() or log.stat().st_size >= _WAL_SIZE:
        return
    ((patience,),) = connection.execute("PRAGMA busy_timeout").fetchall()
    connection.execute("PRAGMA busy_timeout=0")
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute("CREATE TABLE agentflow_padding (data BLOB)")
            connection.execute("INSERT INTO agentflow_padding VALUES (zeroblob(?))", (_PADDING,))
        finally:
            connection.execute("ROLLBACK")
    finally:
        connection.execute(f"PRAGMA busy_timeout={patience}")


def _sqlite_engine(url: URL, settings: Settings) -> Engine:
    busy_ms = int(settings.store_timeout.total_seconds() * 1000)
    options: dict[str, Any] = {
        "hide_parameters": True,
        "connect_args": {"check_same_thread": False, "timeout": busy_ms / 1000},
    }
    in_memory = is_memory(url)
    if in_memory:
        # One connection for everything: each further one would be a database of its own.
        options["poolclass"] = StaticPool
    engine = sa.create_engine(url, **options)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling starts transactions too late for a snapshot.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={busy_ms}")
        if not in_memory:
            # Only a file in which there is nothing yet takes it.
            cursor.execute(f"PRAGMA page_size={_PAGE_SIZE}")
            _enable_wal(cursor, settings.store_timeout)
            cursor.execute("PRAGMA synchronous=FULL")
            ((page_size,),) = cursor.execute("PRAGMA page_size").fetchall()
            cursor.execute(f"PRAGMA wal_autocheckpoint={_WAL_SIZE // page_size}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that will write takes the lock at once: one that began by reading could
        # not upgrade after another process has written, whatever its busy timeout.
        is_writer = connection.get_execution_options().get("agentflow_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """Open a transaction in which every read sees the same state."""
    options: dict[str, Any] = {}
    if engine.dialect.name != "sqlite":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that will write."""
    with (
        engine.connect().execution_options(agentflow_write=True) as connection,
        connection.begin(),
    ):
        yield connection


def is_memory(url: URL) -> bool:
    """Whether the database lives in this process only."""
    return url.get_backend_name() == "sqlite" and not url.database


def display_url(url: URL) -> str:
    """Return a URL for messages, without what may be a secret: its password and its options."""
    return url.set(query={}).render_as_string(hide_password=True)


class StoreNow(sa.ColumnElement[datetime]):
    """The time of the database's clock, which judges leases, as a column of a query."""

    type = Timestamp()
    inherit_cache = True


@compiles(StoreNow, "sqlite")
def _sqlite_now(_element: StoreNow, _compiler: Any, **_: Any) -> str:
    # The machine's. `julianday` keeps milliseconds, `CURRENT_TIMESTAMP` seconds only.
    return "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"


@compiles(StoreNow, "postgresql")
def _postgres_now(_element: StoreNow, _compiler: Any, **_: Any) -> str:
    # Not the time at which the transaction began: it may hold many verbs.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"


_NOW = Prepared(sa.select(StoreNow().label("now")))


def now(connection: Connection) -> datetime:
    """Return the time of the database's clock, which judges leases."""
    time: datetime = _NOW.one(connection, {}).now
    return time


_PRIMARY = 0xFF
"""The bits of an error code of SQLite that say which error it is; the others say more about it."""
_PG_DAMAGE = {"XX001", "XX002"}  # data_corrupted, index_corrupted
_CONTENDED = {"LockNotAvailable", "DeadlockDetected", "SerializationFailure"}


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn a driver's errors about reaching the database into `StoreUnavailableError`."""
    try:
        yield
    except sa.exc.TimeoutError as exc:
        raise StoreUnavailableError(display_url(url), "no free connection in time") from exc
    except sa.exc.DBAPIError as exc:
        broken: Outcome | None = "unknown" if exc.connection_invalidated else None
        error = unavailable(url, exc.orig, broken) if exc.orig is not None else None
        if error is None:
            raise
        raise error from exc


def unavailable(
    url: URL, error: BaseException, broken: Outcome | None = None
) -> StoreUnavailableError | None:
    """Return what a driver's error says about reaching the database; `None` if nothing.

    Args:
        url: The database.
        error: The driver's error.
        broken: What is known of the outcome, if the connection broke with it.
    """
    kind = type(error).__name__
    is_sqlite = isinstance(error, sqlite3.Error)
    # The driver's first line names host and cause; statements and parameters stay out.
    text = str(error).strip().splitlines()
    reason = f"{kind}: {text[0]}" if text else kind
    if _is_damage(error):
        return StoreDamagedError(display_url(url), reason)
    is_operational = any(cls.__name__ == "OperationalError" for cls in type(error).__mro__)
    if broken is None and not is_operational and type(error) is not sqlite3.DatabaseError:
        return None  # its other subclasses are about statements
    outcome: Outcome = "not_written"
    if broken is not None:
        outcome = broken
    elif kind in _CONTENDED:
        outcome = "contended"
    elif not is_sqlite and getattr(error, "sqlstate", None) is None:
        outcome = "unreachable"
    return StoreUnavailableError(display_url(url), reason, outcome)


def _is_damage(error: BaseException) -> bool:
    """Whether a driver's error says that what is stored cannot be read."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
        return code & _PRIMARY in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
    return getattr(error, "sqlstate", None) in _PG_DAMAGE
