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
from agentflow.errors import EffectConflictError, JournalMissingError
from agentflow.journal import NewEffect, differences

_metadata = sa.MetaData()

# A hash as the key: MariaDB has no index of texts without a length.
effect_journal = sa.Table(
    "effect_journal",
    _metadata,
    sa.Column("key_hash", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("data", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")),
    sa.Column("at", sa.DateTime(), nullable=False, server_default=sa.func.now()),
)

_NAME = 255
_AGAIN = {"40001", "40P01", "55P03"}
"""SQLSTATEs of PostgreSQL: serialization failure, deadlock, lock not available."""
_AGAIN_MYSQL = {1205, 1213}
_BUSY = ("database is locked", "database table is locked")


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
        """Write down the outcome, in the same transaction."""
        stored: Mapping[str, Any] = {
            "name": self._new.name,
            "arguments": dict(self._new.arguments),
            "outcome": outcome,
        }
        data = self._codec.dumps(stored, context=self._context, where=self._where)
        connection.execute(
            sa.update(effect_journal)
            .where(effect_journal.c.key_hash == self._hash)
            .values(data=data)
        )


def create(url: str) -> bool:
    """Create the table in the user's database, and say whether it was not there."""
    parsed = sa.make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")  # the driver that is installed
    engine = sa.create_engine(parsed)
    try:
        is_new = not sa.inspect(engine).has_table(effect_journal.name)
        _metadata.create_all(engine)
    finally:
        engine.dispose()
    return is_new


def check_exists(connection: Connection) -> None:
    """Raise `JournalMissingError` unless the table is there."""
    if not sa.inspect(connection).has_table(effect_journal.name):
        url = connection.engine.url.render_as_string(hide_password=True)
        raise JournalMissingError(url)


def is_worth_another(error: sa.exc.DBAPIError) -> bool:
    """Whether the same transaction may succeed if it is tried again: another one was in its way."""
    raw = error.orig
    if getattr(raw, "sqlstate", None) in _AGAIN or getattr(raw, "pgcode", None) in _AGAIN:
        return True
    args = getattr(raw, "args", ())
    if args and args[0] in _AGAIN_MYSQL:
        return True
    return bool(error.connection_invalidated) or any(text in str(raw) for text in _BUSY)
