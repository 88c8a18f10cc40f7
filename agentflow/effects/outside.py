"""`effect_journal`: the table in the user's own database that makes a `transaction` happen once.

Its row commits together with what the user's function writes, or not at all. Whoever comes with the
same key meanwhile waits at the row; whoever comes later reads the outcome from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection

from agentflow.codec import Codec, context_of
from agentflow.errors import (
    EffectConflictError,
    JournalMissingError,
    MissingDriverError,
    SerializationError,
    UnsupportedUrlError,
)
from agentflow.journal import NewEffect, differences

_metadata = sa.MetaData()

# A hash as the key: MariaDB has no index of texts without a length, and most of its collations take
# `A` for `a`. There the engine has to have transactions, and names may be in any alphabet, whatever
# the database's defaults are.
effect_journal = sa.Table(
    "effect_journal",
    _metadata,
    sa.Column("key_hash", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("data", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")),
    sa.Column("at", sa.DateTime(), nullable=False, server_default=sa.func.now()),
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mysql_collate="utf8mb4_bin",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
    mariadb_collate="utf8mb4_bin",
)

_NAME = 255
_SMALL = 1_000_000
"""Bytes that no server refuses as too many at a time."""
_AGAIN = {"40001", "40P01", "55P03"}
"""SQLSTATEs of PostgreSQL: serialization failure, deadlock, lock not available."""
_AGAIN_MYSQL = {1020, 1205, 1213}
"""Error numbers of MariaDB: a row has changed since the snapshot, lock wait timeout, deadlock."""
_NO_SAVEPOINT = 1305
"""What the end of a savepoint meets on MariaDB if a deadlock has rolled back all there was."""
_DRIVERS = {
    "sqlite": "pysqlite",
    "postgresql": "psycopg",
    "mariadb": "pymysql",
    "mysql": "pymysql",
}
"""The drivers that are tested, of those that are not async."""
_EXTRAS = {"psycopg": "postgres", "pymysql": "mariadb"}
_SUPPORTED = ("sqlite:///file", "postgresql://", "mariadb://")
_BUSY = ("database is locked", "database table is locked")


class RolledBackError(sa.exc.OperationalError):
    """The database has rolled a transaction back, and its function went on as if nothing was."""

    def __init__(self) -> None:
        """Say so; it is tried again."""
        text = "the database rolled the transaction back, and its function kept that to itself"
        super().__init__(None, None, Exception(text))


@dataclass(frozen=True, slots=True)
class Found:
    """A transaction that has committed before."""

    outcome: Any


class Rows:
    """The row of one call of a transaction; what runs on the user's connection."""

    def __init__(self, codec: Codec, tenant: str, new: NewEffect) -> None:
        """Look for the key of `new`."""
        whole = f"{tenant}\x1f{new.scope}\x1f{new.key}"
        self._hash = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
        self._codec = codec
        self._new = new
        self._context = context_of("effect_journal.data", self._hash)
        self._where = f"effect_journal of {new.name}"

    def find(self, connection: Connection) -> Found | None:
        """Return the outcome if the transaction has committed.

        Raises:
            EffectConflictError: The key names another function, or other arguments.
        """
        query = sa.select(effect_journal.c.data).where(effect_journal.c.key_hash == self._hash)
        data = connection.execute(query).scalar()
        if data is None:
            return None
        stored = self._codec.loads(data, context=self._context, where=self._where)
        differs = differences(stored["arguments"], self._new.arguments, "")
        if stored["name"] != self._new.name:
            differs.insert(0, "function")
        if differs:
            scope = "run" if self._new.scope else ""
            raise EffectConflictError(self._new.name, scope, tuple(differs[:5]))
        return Found(stored["outcome"])

    def claim(self, connection: Connection) -> None:
        """Insert the row, so that others wait; `IntegrityError` if somebody was first."""
        row = {"key_hash": self._hash, "name": self._new.name[:_NAME]}
        connection.execute(sa.insert(effect_journal).values(**row))

    def finish(self, connection: Connection, outcome: Any) -> None:
        """Write down the outcome, in the same transaction.

        Raises:
            RolledBackError: It is another transaction by now, without the row: MariaDB rolls back
                after a deadlock and goes on with a new one, if the function catches the error.
            SerializationError: The outcome cannot be stored, or is larger than MariaDB takes.
        """
        stored: Mapping[str, Any] = {
            "name": self._new.name,
            "arguments": dict(self._new.arguments),
            "outcome": outcome,
        }
        data = self._codec.dumps(stored, context=self._context, where=self._where)
        self._check_fits(connection, data, outcome)
        own = sa.update(effect_journal).where(effect_journal.c.key_hash == self._hash)
        try:
            written = connection.execute(own.values(data=data))
        except sa.exc.StatementError as exc:
            exc.hide_parameters = True  # the outcome, whatever the user's engine shows of others
            raise
        if written.rowcount != 1:
            raise RolledBackError

    def _check_fits(self, connection: Connection, data: bytes, outcome: Any) -> None:
        """Refuse what MariaDB would cut the connection for, as if it was worth trying again."""
        if len(data) < _SMALL or connection.dialect.name not in {"mariadb", "mysql"}:
            return
        limit = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one()
        if len(data) >= limit:
            raise SerializationError(
                type(outcome).__qualname__,
                "",
                f"its {len(data):,} bytes are more than the server takes at a time; store it "
                f"elsewhere and keep a reference, or raise max_allowed_packet, which is {limit:,}",
                self._where,
            )


def create(url: str) -> bool:
    """Create the table in the user's database, and say whether it was not there.

    Raises:
        UnsupportedUrlError: The text is no URL, or no database's that SQLAlchemy knows.
        MissingDriverError: The database's driver is not installed.
    """
    parsed = _with_driver(url)
    try:
        engine = sa.create_engine(parsed)
    except ModuleNotFoundError as exc:
        driver = exc.name or parsed.get_driver_name()
        raise MissingDriverError(driver, _EXTRAS.get(driver)) from exc
    try:
        is_new = not sa.inspect(engine).has_table(effect_journal.name)
        _metadata.create_all(engine)
    finally:
        engine.dispose()
    return is_new


def _with_driver(url: str) -> sa.URL:
    """Name the driver where the URL does not, or names one that is async."""
    try:
        parsed = sa.make_url(url)
        is_async = parsed.get_dialect().is_async
    except (sa.exc.ArgumentError, ValueError) as exc:
        raise UnsupportedUrlError(url.partition(":")[0], _SUPPORTED) from exc
    backend = parsed.get_backend_name()
    if backend not in _DRIVERS or not (is_async or parsed.drivername == backend):
        return parsed
    return parsed.set(drivername=f"{backend}+{_DRIVERS[backend]}")


def check_exists(connection: Connection) -> None:
    """Raise `JournalMissingError` unless the table is there."""
    if not sa.inspect(connection).has_table(effect_journal.name):
        url = connection.engine.url.render_as_string(hide_password=True)
        raise JournalMissingError(url)


def is_worth_another(error: sa.exc.DBAPIError) -> bool:
    """Whether the same transaction may succeed if it is tried again: another one was in its way."""
    if isinstance(error, RolledBackError):
        return True
    raw = error.orig
    if getattr(raw, "sqlstate", None) in _AGAIN or getattr(raw, "pgcode", None) in _AGAIN:
        return True
    number = next(iter(getattr(raw, "args", ())), None)
    if number in _AGAIN_MYSQL:
        return True
    if number == _NO_SAVEPOINT and (before := _raised_before(error)) is not None:
        return is_worth_another(before)
    return bool(error.connection_invalidated) or any(text in str(raw) for text in _BUSY)


def _raised_before(error: BaseException) -> sa.exc.DBAPIError | None:
    """Return the error of the database in whose handling this one was raised."""
    before = error.__context__
    while before is not None and not isinstance(before, sa.exc.DBAPIError):
        before = before.__context__  # the driver's own
    return before
