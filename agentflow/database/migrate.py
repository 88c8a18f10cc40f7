"""Creates and migrates the schema.

An empty database is created on first use, under a lock, so that many processes may start at once.
An existing one on a server is migrated only when somebody says so; SQLite files migrate by
themselves, after a backup copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from agentflow.config import load_settings
from agentflow.database.engine import is_memory, make_engine, parse_url, translated, writing
from agentflow.errors import MigrationRequiredError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0005"
"""The revision that this program needs; a test holds it against the migrations."""

_VERSION_TABLE = "agentflow_schema"
_LOCK_KEY = 0x6167_656E_7466_6C77


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatus:
    """Where a database's schema stands."""

    current: str | None
    """Its revision; `None` for an empty database."""
    head: str
    pending: tuple[str, ...]


def status(url: str) -> MigrationStatus:
    """Read where the schema of the database at `url` stands, without changing anything."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        file = Path(parsed.database or "")
        if file.parent.is_dir() and not file.exists():
            return _status(None)  # connecting would make the file
    engine = make_engine(parsed, load_settings())
    try:
        with translated(parsed), engine.connect() as connection:
            return _status(_current(connection))
    finally:
        engine.dispose()


def up(url: str) -> MigrationStatus:
    """Create or migrate the schema of the database at `url`; safe to run twice, or at once."""
    parsed = parse_url(url)
    engine = make_engine(parsed, load_settings(), is_patient=True)
    try:
        with translated(parsed):
            _upgrade(engine, parsed)
            with engine.connect() as connection:
                return _status(_current(connection))
    finally:
        engine.dispose()


def ensure(engine: Engine, url: URL) -> None:
    """Make the schema usable, or say what has to be done first.

    Raises:
        MigrationRequiredError: A server database is behind, or any database is ahead.
    """
    with engine.connect() as connection:
        current, exists = _current(connection), _exists(connection)
    if current == HEAD:
        return
    if current is not None and current not in _revisions():
        raise MigrationRequiredError(current, HEAD)
    if exists and url.get_backend_name() != "sqlite":
        raise MigrationRequiredError(current, HEAD)
    _upgrade(engine, url)


def _upgrade(engine: Engine, url: URL) -> None:
    from alembic import command

    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:k)"), {"k": _LOCK_KEY})
        # Read again under the lock: another process may have been first.
        current = _current(connection)
        if current == HEAD:
            return
        if current is not None and current not in _revisions():
            raise MigrationRequiredError(current, HEAD)
        if _exists(connection):
            _back_up(connection, url, current)
        config = _alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _back_up(connection: Connection, url: URL, current: str | None) -> None:
    """Copy a SQLite file before it is migrated."""
    if connection.dialect.name != "sqlite" or is_memory(url) or not url.database:
        return
    import sqlite3

    target = Path(f"{url.database}.{current or 'empty'}.bak")
    # A second connection reads the committed state while this one holds the write lock.
    with sqlite3.connect(url.database) as source, sqlite3.connect(target) as copy:
        source.backup(copy)
    source.close()
    copy.close()


def _exists(connection: Connection) -> bool:
    return sa.inspect(connection).has_table(_VERSION_TABLE)


def _current(connection: Connection) -> str | None:
    if not _exists(connection):
        return None
    table = sa.table(_VERSION_TABLE, sa.column("version_num"))
    return connection.execute(sa.select(table.c.version_num)).scalar_one_or_none()


def _status(current: str | None) -> MigrationStatus:
    revisions = _revisions()
    done = revisions.index(current) + 1 if current in revisions else 0
    return MigrationStatus(current=current, head=HEAD, pending=tuple(revisions[done:]))


def _revisions() -> list[str]:
    """List the revisions that this program knows, oldest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_alembic_config())
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def _alembic_config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["version_table"] = _VERSION_TABLE
    return config
