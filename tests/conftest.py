"""The fixtures that all tests share: databases, processes to kill, and checks for leaks.

A new backend is one more line in `database_url`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.fault.forkserver import ForkServer
from tests.fault.ledger import Ledger
from tests.servers import (
    MariaDBServer,
    PgBouncer,
    PostgresServer,
    ServerUnavailableError,
    no_leaked_connections,
    no_leaked_files,
)

_TESTS = Path(__file__).parent
_MARKED_FOLDERS = ("acceptance", "fault")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by where they are and what they use, so that `make test-fast` misses none."""
    for item in items:
        if item.path.is_relative_to(_TESTS):
            folder = item.path.relative_to(_TESTS).parts[0]
            if folder in _MARKED_FOLDERS:
                item.add_marker(folder)
        for server in ("postgres", "mariadb"):
            if f"{server}_server" in getattr(item, "fixturenames", ()):
                item.add_marker(server)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the victims of a failed test have written."""
    report = yield
    forkserver = getattr(item, "funcargs", {}).get("forkserver")
    if report.when == "call" and report.failed and forkserver is not None:
        for victim in forkserver.victims:
            report.sections.append((f"{victim.target} (pid {victim.pid})", victim.output()))
    return report


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that belongs to this test session."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(PostgresServer())
        except ServerUnavailableError as error:
            _unavailable(str(error))
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> str:
    """The name of a database with the current schema, of which each test gets a copy."""
    from agentflow.database import migrate

    name = postgres_server.create_database()
    migrate.up(postgres_server.url(name))
    return name


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, postgres_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database of the test's own."""
    name = postgres_server.create_database(template=postgres_template)
    with no_leaked_connections(postgres_server.port):
        yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDBServer]:
    """A MariaDB server that belongs to this test session."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(MariaDBServer())
        except ServerUnavailableError as error:
            _unavailable(str(error))
        yield server


@pytest.fixture
def mariadb_url(mariadb_server: MariaDBServer) -> Iterator[str]:
    """The URL of a MariaDB database of the test's own, as a user has one; no run is kept there."""
    name = mariadb_server.create_database()
    with no_leaked_connections(mariadb_server.port):
        yield mariadb_server.url(name)
    mariadb_server.drop_database(name)


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    """A pooler in transaction mode in front of the server, with two connections per database."""
    with contextlib.ExitStack() as stack:
        try:
            pooler = stack.enter_context(PgBouncer(postgres_server, pool_size=2))
        except ServerUnavailableError as error:
            _unavailable(str(error))
        yield pooler


@pytest.fixture
def pgbouncer_url(postgres_url: str, pgbouncer: PgBouncer) -> Iterator[str]:
    """The URL by which the pooler leads to the database of `postgres_url`."""
    with no_leaked_connections(pgbouncer.port):
        yield pgbouncer.url(postgres_url.rpartition("/")[2])


@pytest.fixture
def sqlite_url(tmp_path: Path) -> Iterator[str]:
    """The URL of a SQLite file of the test's own, which does not exist yet."""
    folder = tmp_path / "database"
    folder.mkdir()
    with no_leaked_files(folder):
        yield f"sqlite:///{folder / 'agentflow.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database without rows: the test runs once on each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(scope="session")
def _forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    if not sys.platform.startswith("linux"):
        _unavailable("processes are stopped and killed through Linux' pidfd and /proc")
    with ForkServer(tmp_path_factory.mktemp("forkserver")) as server:
        yield server


@pytest.fixture
def forkserver(_forkserver: ForkServer) -> Iterator[ForkServer]:
    """Starts processes to kill; whatever the test leaves running is killed after it."""
    yield _forkserver
    _forkserver.kill_all()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """What has really happened outside, kept by a process that survives every victim."""
    with Ledger(tmp_path / "ledger.jsonl") as server:
        yield server


@pytest.fixture(autouse=True)
def _no_pending_task(request: pytest.FixtureRequest) -> None:
    """Fail an asynchronous test that leaves tasks behind."""
    # A loop is made only for tests that have one anyway.
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_only_own_tasks")


@pytest.fixture
async def _only_own_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"left running: {', '.join(sorted(task.get_name() for task in left))}"


def _unavailable(reason: str) -> NoReturn:
    """Skip with the reason; where everything must run, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI=true lets no test be skipped for it")
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    """Hold full runs against the requirements."""
    from tests.requirements import Requirements

    config.pluginmanager.register(Requirements(config), "agentflow-requirements")
