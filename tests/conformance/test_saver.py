"""agentflow's own checkpointers: the shipped suites on each backend, and what is theirs alone."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import pytest

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.errors import StoreUnavailableError
from agentflow.failpoints import arm, disarm
from agentflow.testing.savers import SaverSuite, Suite
from agentflow.testing.savers.calls import (
    acquired,
    at,
    checkpoint,
    id_of,
    ids,
    lease,
    load,
    plain,
    put,
    put_line,
    writes_at,
)
from tests.servers import PostgresServer, no_leaked_connections


class TestMemory(SaverSuite):
    """One database in the memory of this process, and savers that share nothing else."""

    def open(self) -> AbstractContextManager[Saver]:
        return self._opened()

    @contextmanager
    def _opened(self) -> Iterator[Saver]:
        self.database = Database("memory://", Settings())
        with self.open_another() as saver:
            yield saver
        self.database.close()

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Saver]:
        return Saver(self.database, codec=Codec(), verify_deltas=verify_deltas)


class TestSqlite(SaverSuite):
    """A file."""

    @pytest.fixture(autouse=True)
    def _file(self, sqlite_url: str) -> None:
        self.url = sqlite_url

    def open(self) -> AbstractContextManager[Saver]:
        return self.open_another()

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Saver]:
        return open_checkpointer(self.url, verify_deltas=verify_deltas)


@pytest.fixture(scope="module")
def shared_url(postgres_server: PostgresServer, postgres_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database for many tests."""
    name = postgres_server.create_database(template=postgres_template)
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.mark.postgres
class TestPostgres(SaverSuite):
    """One database for all tests, each of which is a tenant: making databases takes longer."""

    tenants = count()

    @pytest.fixture(autouse=True)
    def _tenant(self, shared_url: str, postgres_server: PostgresServer) -> Iterator[None]:
        self.url, self.tenant = shared_url, f"tenant {next(self.tenants)}"
        with no_leaked_connections(postgres_server.port):
            yield

    def open(self) -> AbstractContextManager[Saver]:
        return self.open_another()

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Saver]:
        return open_checkpointer(self.url, verify_deltas=verify_deltas, tenant=self.tenant)


def test_no_test_of_a_suite_is_hidden_by_another() -> None:
    names = [
        name
        for suite in SaverSuite.__mro__
        if issubclass(suite, Suite)
        for name, _ in inspect.getmembers(suite, inspect.isfunction)
        if name in vars(suite) and name not in vars(Suite)
    ]
    assert sorted(names) == sorted(set(names))


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def saver(request: pytest.FixtureRequest) -> Iterator[Saver]:
    """A checkpointer on an empty database of each kind."""
    url = request.getfixturevalue(f"{request.param}_url") if request.param != "memory" else None
    with open_checkpointer(url or "memory://") as opened:
        yield opened
    disarm()


def fail() -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("point", ["checkpoint.before_insert", "database.before_commit"])
def test_torn_write_leaves_the_old_checkpoint(saver: Saver, point: str) -> None:
    put(saver, "c1")
    arm(point, fail)
    with pytest.raises(OSError, match="disk full"):
        put(saver, "c2", "c1")
    disarm()
    assert ids(saver.list(at())) == ["c1"]
    assert id_of(load(saver)) == "c1"
    put(saver, "c2", "c1")


def test_writes_are_durable_although_the_next_checkpoint_is_not(saver: Saver) -> None:
    put(saver, "c1")
    arm("checkpoint.before_insert", fail)

    async def superstep() -> None:
        write = saver.aput_writes(at("c1"), [("x", 1)], "a")
        with pytest.raises(OSError, match="disk full"):
            await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
        await write

    asyncio.run(superstep())
    disarm()
    assert writes_at(saver) == [("a", "x", 1)]


VERBS: dict[str, Callable[[Saver], Any]] = {
    "put": lambda saver: put(saver, "c3", "c2"),
    "put again": lambda saver: put(saver, "c2", "c1", changed="again"),
    "put_writes": lambda saver: saver.put_writes(at("c2"), [("x", 1)], "task"),
    "copy_thread": lambda saver: saver.copy_thread("t", "u"),
    "delete_for_runs": lambda saver: saver.delete_for_runs(["r"]),
    "prune": lambda saver: saver.prune(["t"]),
    "delete_thread": lambda saver: saver.delete_thread("t"),
    "acquire": lambda saver: acquired(saver, lease(3)),
    "release": lambda saver: asyncio.run(saver.release(lease(1))),
}


@pytest.mark.parametrize("verb", VERBS)
def test_call_whose_reply_was_lost_succeeds_once(saver: Saver, verb: str) -> None:
    """It is committed, the connection breaks before that is known, and it is sent again."""
    found = []
    lost: list[int] = []

    def lose() -> None:
        if not lost:
            lost.append(1)
            raise StoreUnavailableError("the database", "the connection broke", "unknown")

    for is_lost in (False, True):
        for thread in ("t", "u"):
            saver.delete_thread(thread)
        put(saver, "c1", metadata={"run_id": "r"})
        put(saver, "c2", "c1")
        if is_lost:
            arm("database.after_commit", lose)
        VERBS[verb](saver)
        disarm()
        if verb == "acquire":
            asyncio.run(saver.release(lease(3)))
        put(saver, "last", load(saver).config if verb != "delete_thread" else None)
        found.append([_undated(plain(each)) for each in saver.list(None)])
    assert lost == [1]
    assert found[0] == found[1]


def _undated(found: tuple[object, ...] | None) -> object:
    assert found is not None
    config, made, *others = found
    assert isinstance(made, dict)
    return (config, {**made, "ts": ""}, *others)


def test_tenants_do_not_share_threads(database_url: str) -> None:
    with (
        open_checkpointer(database_url, tenant="a") as one,
        open_checkpointer(database_url, tenant="b") as other,
    ):
        put_line(one, "c1", "c2")
        acquired(one, lease(1))
        assert other.get_tuple(at()) is None
        assert list(other.list(None)) == []
        put(other, "c1", metadata={"run_id": "r"})
        one.delete_for_runs(["r"])
        other.copy_thread("t", "u")
        other.prune(["t"], strategy="delete")
        assert ids(other.list(None)) == ["c1"]
        assert ids(one.list(None)) == ["c2", "c1"]
        other.delete_thread("t")
        assert ids(one.list(None)) == ["c2", "c1"]
