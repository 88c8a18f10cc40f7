"""The connections to one database: for its one writer, and for readers.

What runs with every step uses a connection of its own that commits each statement by itself; what
runs as a transaction gets one. Whatever goes wrong is told as `StoreUnavailableError`, with what is
known of the outcome.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import PoolProxiedConnection

from agentflow.config import Settings
from agentflow.database.engine import (
    display_url,
    grow_wal,
    is_memory,
    make_engine,
    set_patience,
    translated,
    unavailable,
)
from agentflow.database.session import Session
from agentflow.errors import Outcome, StoreUnavailableError

T = TypeVar("T")

GROW_WAL_AFTER = 32
"""So many batches tell a process that writes a lot from one that writes a little and ends."""


_PLANS = (
    "SELECT set_config('plan_cache_mode', 'force_generic_plan', FALSE), "
    "set_config('enable_seqscan', 'off', FALSE), set_config('jit', 'off', FALSE)"
)


class Connections:
    """Connects on first use; sessions are for one thread at a time."""

    def __init__(self, url: URL, settings: Settings) -> None:
        """Make the pools of the database at `url`."""
        self.url = url
        self._settings = settings
        self.name = display_url(url)
        self.engine = make_engine(url, settings)
        self.dialect = self.engine.dialect.name
        self.is_memory = is_memory(url)
        # Within a transaction a driver must not commit by itself; outside of one it must.
        self._autocommit = self.engine if self.dialect == "sqlite" else make_engine(url, settings)
        if self._autocommit is not self.engine:
            sa.event.listen(self._autocommit, "connect", _commit_each_statement)
        self._transacting: Connection | None = None
        """The writer's for transactions, kept from one to the next."""
        self._own: PoolProxiedConnection | None = None
        """The writer's for all else, kept from batch to batch."""
        self._session: Session | None = None
        self._is_patient = True
        """Whether the writer's connection waits."""
        self._glances: deque[tuple[PoolProxiedConnection, Session]] = deque()
        """Of a file, for queries that wait for nothing; as many as were needed at once."""
        self._batches = 0
        self._is_grown = False
        self._inside: list[None] = []
        """One for each thread that is inside the driver now."""
        self._errors: tuple[type[Exception], ...] = (self.engine.dialect.loaded_dbapi.Error,)
        self._all_errors: tuple[type[Exception], ...] = (sa.exc.DBAPIError, *self._errors)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction that will write."""
        is_committing = False
        session: Session | None = None
        self._inside.append(None)
        try:
            connection = self._for_transactions()
            transaction = connection.begin()
            session = Session(_driver(connection.connection), self.dialect, connection)
            try:
                yield session
            except BaseException:
                transaction.rollback()
                raise
            finally:
                session.close()
            is_committing = True
            transaction.commit()
        except self._all_errors as exc:
            # Of the bare driver's statements the errors come as they are.
            original = exc.orig if isinstance(exc, sa.exc.DBAPIError) else exc
            is_broken = isinstance(exc, sa.exc.DBAPIError) and exc.connection_invalidated
            if session is not None and self.dialect != "sqlite":
                is_broken = is_broken or session.is_broken
            broken: Outcome | None = None
            if is_broken:
                # Without the commit the server has rolled back what it was sent.
                broken = "unknown" if is_committing else "unreachable"
            error = unavailable(self.url, original, broken) if original is not None else None
            if error is None:
                raise
            raise error from exc
        finally:
            try:
                self._keep_if_sound(session)
            finally:
                self._inside.pop()

    def _for_transactions(self) -> Connection:
        if self._transacting is None:
            connection = self.engine.connect().execution_options(agentflow_write=True)
            try:
                self._plan_once(connection.connection)
            except BaseException:
                connection.close()
                raise
            self._transacting = connection
        return self._transacting

    def _keep_if_sound(self, session: Session | None) -> None:
        """Give the connection of transactions up, unless the last one has come to its end."""
        connection = self._transacting
        if connection is None:
            return
        is_broken = session is None or (self.dialect != "sqlite" and session.is_broken)
        # One whose commit has failed is not in a transaction, but cannot begin another one either.
        if is_broken or connection.invalidated or connection.get_transaction() is not None:
            self._end_transacting()

    def _end_transacting(self) -> None:
        connection, self._transacting = self._transacting, None
        if connection is None:
            return
        if self.dialect == "sqlite":
            # A transaction whose commit has failed is still open, and SQLAlchemy forgets it.
            _driver(connection.connection).rollback()
        elif not connection.invalidated:
            connection.invalidate()  # it is set up as readers would not have it
        connection.close()

    def _plan_once(self, pooled: PoolProxiedConnection) -> None:
        """Have PostgreSQL plan each of the writer's statements for whatever values it gets.

        They find their rows by indexes, whatever the values. By itself it would plan each of the
        first ten executions, which takes longer than they do. A plan stays until the rows are
        counted again, so that no table may be read as a whole because it was small. Reading one
        that has no index counts as costly, and what is costly would be compiled each time.
        """
        if self.dialect == "sqlite" or pooled.info.get("is_pooled"):
            return
        raw = _driver(pooled)
        raw.prepare_threshold = 1
        try:
            raw.execute(_PLANS)
            if not raw.autocommit:
                raw.commit()
        except self._errors as exc:
            # It comes from the pool, and may have been dead for long.
            pooled.invalidate()
            error = unavailable(self.url, exc, "unreachable")
            if error is None:
                raise
            raise error from exc

    def run_committing(self, function: Callable[[Session], T], *, is_patient: bool = True) -> T:
        """Call `function` with the writer's session, on which each statement commits by itself.

        Args:
            function: What to call.
            is_patient: Whether it may wait for locks, and for a server that does not answer at
                once; if it would have to, it fails, like any other statement that comes too late.
        """
        if self._own is None or self._session is None:
            own = self._connect()
            self._plan_once(own)
            self._own = own
            self._session = Session(_driver(self._own), self.dialect)
            self._is_patient = True
        if is_patient is not self._is_patient:
            set_patience(_driver(self._own), self.dialect, self._settings, is_patient=is_patient)
            self._is_patient = is_patient
        if is_patient and self.is_log_short:
            self._batches = 0
            # Nothing depends on it; a full disk or a lock will show where something does.
            with suppress(sqlite3.Error, OSError):
                grow_wal(_driver(self._own))
                self._is_grown = True
        self._batches += 1
        self._inside.append(None)
        try:
            return function(self._session)
        except self._errors as exc:
            error = self._translate(exc, self._own)
            if error is None:
                raise
            raise error from exc
        finally:
            self._inside.pop()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a connection for single queries."""
        pooled = self._connect()
        session = Session(_driver(pooled), self.dialect)
        try:
            with self._querying(pooled):
                yield session
        finally:
            session.close()
            pooled.close()

    @contextmanager
    def glancing(self) -> Iterator[Session]:
        """Open a connection for single queries that wait for nothing; see `run_committing`.

        It is kept for the next time: to open one takes longer than most queries of a file do.
        """
        pooled, session = self._glances.pop() if self._glances else self._new_glance()
        is_sound = False
        try:
            with self._querying(pooled):
                yield session
            is_sound = True
        finally:
            if is_sound:
                self._glances.append((pooled, session))
            else:
                _give_up(pooled, session)

    def _new_glance(self) -> tuple[PoolProxiedConnection, Session]:
        pooled = self._connect()
        set_patience(_driver(pooled), self.dialect, self._settings, is_patient=False)
        return pooled, Session(_driver(pooled), self.dialect)

    def _end_glances(self) -> None:
        while self._glances:
            _give_up(*self._glances.pop())

    @contextmanager
    def _querying(self, pooled: PoolProxiedConnection) -> Iterator[None]:
        self._inside.append(None)
        try:
            yield
        except self._errors as exc:
            error = self._translate(exc, pooled)
            if error is None:
                raise
            raise error from exc
        finally:
            self._inside.pop()

    def _connect(self) -> PoolProxiedConnection:
        try:
            with translated(self.url):
                return self._autocommit.raw_connection()
        except self._errors as exc:
            error = unavailable(self.url, exc, "unreachable")
            if error is None:
                raise
            raise error from exc

    def _translate(
        self, exc: BaseException, pooled: PoolProxiedConnection
    ) -> StoreUnavailableError | None:
        is_broken = self.dialect != "sqlite" and _driver(pooled).closed
        if is_broken:
            pooled.invalidate()
            if pooled is self._own:
                self._own = None
        return unavailable(self.url, exc, "unknown" if is_broken else None)

    @property
    def is_log_short(self) -> bool:
        """Whether whoever writes next, and has the time, should make the log of a file longer."""
        is_due = self._batches >= GROW_WAL_AFTER and not self._is_grown
        return is_due and self.dialect == "sqlite" and not self.is_memory

    def end_writing(self) -> None:
        """Give up the writer's connection; a new one is made when it is needed."""
        own, self._own = self._own, None
        session, self._session = self._session, None
        if own is not None and session is not None:
            session.close()
            if self.dialect != "sqlite":
                own.invalidate()  # it is set up as readers would not have it
            own.close()
        self._end_transacting()

    @property
    def is_torn(self) -> bool:
        """Whether, in the child of a fork, a thread that is gone was inside SQLite.

        It holds locks of the process for ever then: also a new connection would wait for them.
        """
        return self.dialect == "sqlite" and bool(self._inside)

    def abandon(self) -> None:
        """Give up, in the child of a fork, the connections of its parent."""
        own, self._own = self._own, None
        # A server's session is the parent's and must not hear of this. SQLite keeps the locks of
        # its connections in a table of the process: what the child inherited has to go from it,
        # or the child would believe that it holds what its parent does.
        is_server = self.dialect != "sqlite"
        if own is not None:
            session, self._session = self._session, None
            if is_server:
                own.detach()
            elif session is not None:
                session.close()
                own.close()
        transacting, self._transacting = self._transacting, None
        if transacting is not None and not is_server:
            transacting.close()
        elif transacting is not None and not transacting.invalidated:
            transacting.detach()
        if not is_server:
            self._end_glances()
        for engine in {self.engine, self._autocommit}:
            engine.dispose(close=not is_server)

    def dispose(self) -> None:
        """Close all connections."""
        self._end_glances()
        self.engine.dispose()
        self._autocommit.dispose()


def _driver(pooled: PoolProxiedConnection) -> Any:
    connection = pooled.driver_connection
    assert connection is not None
    return connection


def _give_up(pooled: PoolProxiedConnection, session: Session) -> None:
    session.close()
    pooled.invalidate()  # nobody else is to get one that does not wait
    pooled.close()


def _commit_each_statement(connection: Any, _record: Any) -> None:
    connection.autocommit = True
