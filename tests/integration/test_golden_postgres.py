"""What the first landed version left behind, as rows of PostgreSQL: migrated, listed, continued.

The rows of the golden SQLite file are put into a database with the first schema. The tests that go
on from there are those of `test_golden_database`, on a copy of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentflow.checkpoint import Saver
from agentflow.config import load_settings
from agentflow.database import migrate
from agentflow.database.engine import make_engine, parse_url, writing
from tests.golden import database_v1 as v1
from tests.golden.listing import list_database
from tests.integration.test_golden_database import (  # noqa: F401 -- collected here as well
    LISTING,
    app,
    outside,
    saver,
    test_changes_add_up_to_the_state_at_every_checkpoint,
    test_conversation_goes_on,
    test_dead_letter_has_its_error_and_can_be_restarted,
    test_each_line_of_a_forked_thread_goes_on,
    test_failed_superstep_runs_only_what_failed,
    test_function_takes_its_answer_and_repeats_no_task,
    test_question_that_is_left_is_answered,
    test_queued_run_starts_on_the_thread_of_an_earlier_one,
    test_run_of_a_killed_worker_goes_on_with_what_was_left,
    test_subgraphs_go_on_where_they_were,
    test_waiting_run_is_approved_and_ends,
    unpack,
)
from tests.servers import PostgresServer, no_leaked_connections

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def golden(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database with the golden rows, as the first version left it."""
    file = tmp_path_factory.mktemp("golden") / "golden.db"
    unpack(file)
    name = postgres_server.create_database()
    engine = make_engine(parse_url(postgres_server.url(name)), load_settings())
    with writing(engine) as connection:
        create_schema(connection, v1.REVISION)
        copy_rows(file, connection)
    engine.dispose()
    return name


def create_schema(connection: sa.Connection, revision: str) -> None:
    from alembic import command

    config = migrate._alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def copy_rows(file: Path, connection: sa.Connection) -> None:
    tables = sa.MetaData()
    tables.reflect(connection)
    with closing(sqlite3.connect(file)) as source:
        source.row_factory = sqlite3.Row
        for table in tables.tables.values():
            if table.name == "agentflow_schema":
                continue
            rows = [dict(row) for row in source.execute(f"SELECT * FROM {table.name}")]
            if not rows:
                continue
            for row in rows:
                for column in table.c:
                    if isinstance(column.type, sa.Boolean):
                        row[column.name] = bool(row[column.name])
            connection.execute(sa.insert(table), rows)
            if "seq" in table.c and table.c.seq.primary_key and len(table.primary_key.columns) == 1:
                count = sa.func.setval(
                    sa.func.pg_get_serial_sequence(table.name, "seq"), max(r["seq"] for r in rows)
                )
                connection.execute(sa.select(count))


@pytest.fixture
def url(postgres_server: PostgresServer, golden: str) -> Iterator[str]:
    """The URL of a copy that was migrated."""
    name = postgres_server.create_database(template=golden)
    with no_leaked_connections(postgres_server.port):
        url = postgres_server.url(name)
        migrate.up(url)
        yield url
    postgres_server.drop_database(name)


async def test_everything_is_listed_as_it_was_and_nothing_is_damaged(
    url: str,
    saver: Saver,  # noqa: F811 -- the fixture of that name
) -> None:
    assert await list_database(url, tenants=("", v1.TENANT)) == LISTING
    async for audited in saver.verify():
        assert audited.damages == []
