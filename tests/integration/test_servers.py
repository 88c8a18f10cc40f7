"""The database servers that the tests start are real, durable and separate for each test."""

import contextlib
from pathlib import Path

import psycopg
import pytest

from tests.servers import PostgresServer, no_leaked_connections, no_leaked_files

pytestmark = pytest.mark.slow  # a server takes its time to start


def test_each_test_has_an_empty_database_of_its_own(
    postgres_url: str, postgres_server: PostgresServer, postgres_template: str
) -> None:
    other = postgres_server.create_database(template=postgres_template)
    with psycopg.connect(postgres_url) as mine, psycopg.connect(postgres_server.url(other)) as its:
        mine.execute("CREATE TABLE ours (id int)")
        mine.commit()
        found = its.execute("SELECT to_regclass('ours')").fetchone()
    assert found == (None,)
    postgres_server.drop_database(other)


def test_server_waits_for_the_disk_as_in_production(postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert connection.execute(f"SHOW {setting}").fetchone() == ("on",)


@pytest.mark.usefixtures("postgres_server")  # where there is none, this test is skipped as well
def test_killed_server_comes_back_on_its_port_with_what_was_committed() -> None:
    with PostgresServer() as server:
        port = server.port
        url = server.url(server.create_database())
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS id")
            server.kill()
            # Its sessions end when they notice, and may answer before.
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    connection.execute("SELECT 1")
        server.start()
        assert server.port == port
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT id FROM kept").fetchone() == (1,)


def test_connection_left_open_is_reported(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    leaked = []
    with (
        pytest.raises(AssertionError, match="1 connection"),
        no_leaked_connections(postgres_server.port),
    ):
        leaked.append(psycopg.connect(postgres_url))
    leaked[0].close()


def test_database_file_left_open_is_reported(tmp_path: Path) -> None:
    database = tmp_path / "some.db"
    database.touch()
    leaked = []
    with pytest.raises(AssertionError, match=r"some\.db"), no_leaked_files(tmp_path):
        leaked.append(database.open())
    leaked[0].close()


def test_url_names_the_kind_of_database(database_url: str, request: pytest.FixtureRequest) -> None:
    assert database_url.startswith(f"{request.node.callspec.params['database_url']}")
