"""The checkpointers that tests of real graphs run on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agentflow.checkpoint import Saver, open_checkpointer
from tests.integration.twins import MODES, Mode, Twins
from tests.servers import PostgresServer, no_leaked_connections


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def saver(request: pytest.FixtureRequest) -> AsyncIterator[Saver]:
    """A checkpointer on an empty database of each kind."""
    opened: Saver = request.getfixturevalue(f"_{request.param}_saver")
    async with opened:
        yield opened


@pytest.fixture
def twins(
    saver: Saver,
    request: pytest.FixtureRequest,
    _played: dict[str, dict[Mode, list[Any]]],
) -> Twins:
    """Plays scenarios on the checkpointer and on LangGraph's own."""
    params = dict(request.node.callspec.params)
    backend = params.pop("saver")
    scenario = f"{request.node.originalname} {params}"
    return Twins(saver, MODES[backend], _played.setdefault(scenario, {}))


@pytest.fixture(scope="session")
def _played() -> dict[str, dict[Mode, list[Any]]]:
    """What was played on LangGraph's checkpointer, once for all backends."""
    return {}


@pytest.fixture
def _memory_saver() -> Saver:
    return open_checkpointer("memory://")


@pytest.fixture
def _sqlite_saver(sqlite_url: str) -> Saver:
    return open_checkpointer(sqlite_url)


@pytest.fixture(scope="session")
def _postgres_database(postgres_server: PostgresServer, postgres_template: str) -> Iterator[str]:
    name = postgres_server.create_database(template=postgres_template)
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
def _postgres_saver(
    postgres_server: PostgresServer, _postgres_database: str, request: pytest.FixtureRequest
) -> Iterator[Saver]:
    # Making a database takes longer than most of these tests: they share one, each as a tenant.
    with no_leaked_connections(postgres_server.port):
        yield open_checkpointer(_postgres_database, tenant=request.node.nodeid)
