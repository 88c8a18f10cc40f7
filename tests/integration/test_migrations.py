"""The schema: what the migrations make is what the code expects, at any start."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from agentflow import AgentFlow
from agentflow.config import load_settings
from agentflow.database import migrate
from agentflow.database.engine import make_engine, parse_url
from agentflow.database.tables import metadata
from agentflow.errors import MigrationRequiredError


def test_migrations_make_the_tables_that_the_code_uses(database_url: str) -> None:
    """No column, type or index differs between the migrations and `tables`."""
    migrate.up(database_url)
    engine = make_engine(parse_url(database_url), load_settings())
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_name": lambda name, kind, _: kind != "table" or name != "agentflow_schema"
            },
        )
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_head_is_the_newest_revision(sqlite_url: str) -> None:
    """The constant that spares an import of Alembic names the newest migration."""
    status = migrate.up(sqlite_url)
    assert status.current == status.head == migrate.HEAD
    assert status.pending == ()


def test_status_changes_nothing(sqlite_url: str) -> None:
    """Asking an empty database where it stands leaves it empty."""
    status = migrate.status(sqlite_url)
    assert status.current is None
    assert status.pending == ("0001", "0002", "0003", "0004", migrate.HEAD)
    assert migrate.status(sqlite_url) == status


def _stamp(url: str, revision: str | None) -> None:
    """Leave only a version table behind, at `revision`."""
    engine = make_engine(parse_url(url), load_settings())
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            table.drop(connection, checkfirst=True)
        connection.execute(sa.text("DROP TABLE IF EXISTS agentflow_schema"))
        connection.execute(sa.text("CREATE TABLE agentflow_schema (version_num VARCHAR(32))"))
        if revision is not None:
            insert = sa.text("INSERT INTO agentflow_schema VALUES (:revision)")
            connection.execute(insert, {"revision": revision})
    engine.dispose()


async def test_server_database_that_is_behind_is_left_alone(postgres_url: str) -> None:
    """Only `agentflow migrate up` changes an existing server database."""
    _stamp(postgres_url, None)
    async with AgentFlow(postgres_url) as app:
        with pytest.raises(MigrationRequiredError, match="agentflow migrate up"):
            await app.list_runs()
    assert migrate.status(postgres_url).current is None
    assert migrate.up(postgres_url).current == migrate.HEAD
    async with AgentFlow(postgres_url) as app:
        assert (await app.list_runs()).items == ()


async def test_sqlite_file_that_is_behind_migrates_after_a_backup(
    sqlite_url: str, tmp_path: Path
) -> None:
    """The old file is kept beside the migrated one."""
    _stamp(sqlite_url, None)
    async with AgentFlow(sqlite_url) as app:
        assert (await app.list_runs()).items == ()
    (backup,) = sorted(tmp_path.rglob("*.bak"))  # noqa: ASYNC240 -- nothing else runs here
    with sqlite3.connect(backup) as old:
        tables = [name for (name,) in old.execute("SELECT name FROM sqlite_master")]
    old.close()
    assert tables == ["agentflow_schema"]


async def test_newer_database_is_refused_and_left_alone(database_url: str) -> None:
    """A program that is older than the database touches nothing."""
    _stamp(database_url, "9999")
    async with AgentFlow(database_url) as app:
        with pytest.raises(MigrationRequiredError, match="9999"):
            await app.list_runs()
    with pytest.raises(MigrationRequiredError):
        migrate.up(database_url)
    assert migrate.status(database_url).current == "9999"
