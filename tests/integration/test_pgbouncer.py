"""Everything through a pooler that gives each transaction another connection to the server.

Nothing may then be kept in a session: no prepared statement, no setting, no lock that outlives its
transaction. The pool has two connections; the clients are more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.types import Command

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from tests.fault.forkserver import ForkServer
from tests.fault.savers import (
    WRITERS,
    Books,
    Reports,
    assert_kept,
    at,
    awrite_all,
    write,
)
from tests.integration.graphs import ask_twice, asks, chain, logs
from tests.servers import PgBouncer, PostgresServer

pytestmark = pytest.mark.slow  # a server takes its time to start

STEPS = 12
"""A driver prepares a statement when it is executed for the sixth time."""
POOL = 2

LEFT_BEHIND = """
SELECT 'setting', name || ' = ' || setting FROM pg_settings WHERE source = 'session'
   AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone',
                    'standard_conforming_strings')  -- these, the pooler keeps for each client
UNION ALL SELECT 'prepared statement', name FROM pg_prepared_statements
UNION ALL SELECT 'channel', channel FROM pg_listening_channels() AS channel
UNION ALL SELECT 'lock', classid || ' ' || objid FROM pg_locks
   WHERE locktype = 'advisory' AND pid = pg_backend_pid()
"""


@pytest.fixture
def saver(pgbouncer_url: str) -> Iterator[Saver]:
    """A checkpointer behind the pooler."""
    with open_checkpointer(pgbouncer_url) as opened:
        yield opened


@pytest.fixture
async def app(pgbouncer_url: str) -> AsyncIterator[AgentFlow]:
    """An app behind the pooler."""
    async with AgentFlow(pgbouncer_url) as opened:
        yield opened


def database(url: str) -> str:
    """Return the name of a URL's database."""
    return url.rpartition("/")[2]


async def all_of(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for all calls, also if some fail, and return what they return."""
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [repr(each) for each in ended if isinstance(each, BaseException)] == []
    return ended


def test_pooler_gives_a_client_another_connection_for_each_transaction(pgbouncer_url: str) -> None:
    """Otherwise the other tests here would show nothing."""

    def session(client: psycopg.Connection) -> Any:
        return client.execute("SELECT pg_backend_pid()").fetchone()

    with psycopg.connect(pgbouncer_url) as one, psycopg.connect(pgbouncer_url) as other:
        first = session(one)
        one.commit()
        assert session(other) == first
        assert session(one) != first
    with psycopg.connect(pgbouncer_url, autocommit=True, prepare_threshold=0) as one:
        one.execute("SELECT 1")
        with (
            psycopg.connect(pgbouncer_url, autocommit=True, prepare_threshold=0) as other,
            pytest.raises(psycopg.errors.DuplicatePreparedStatement),
        ):
            other.execute("SELECT 1")


def test_threads_of_the_synchronous_interface(saver: Saver) -> None:
    books = Books()
    threads = [f"t{number}" for number in range(4)]
    with ThreadPoolExecutor(len(threads)) as pool:
        for done in [pool.submit(write, saver, t, STEPS, books.add) for t in threads]:
            done.result(60)
    for thread in threads:
        assert not assert_kept(saver, thread, books[thread])
    assert len(list(saver.list(None, limit=100))) == len(threads) * STEPS
    saver.delete_thread("t0")
    assert saver.get_tuple(at("t0")) is None


async def test_tasks_of_the_asynchronous_interface(saver: Saver) -> None:
    books = Books()
    threads = [f"t{number}" for number in range(8)]
    await awrite_all(saver, threads, STEPS, books.add)
    found = [each.config["configurable"]["thread_id"] async for each in saver.alist(None)]
    assert sorted(found) == sorted(threads * STEPS)
    for thread in threads:
        assert not await asyncio.to_thread(assert_kept, saver, thread, books[thread])
    await saver.adelete_thread("t0")
    assert await saver.aget_tuple(at("t0")) is None


async def test_graphs_that_ask(saver: Saver) -> None:
    graph = chain(("a", logs("a")), ("ask", ask_twice), ("z", logs("z")))
    compiled = graph.compile(checkpointer=saver)

    async def talk(thread: RunnableConfig) -> Any:
        asked = await compiled.ainvoke({"log": []}, thread)
        assert [each.value for each in asked["__interrupt__"]] == ["refund $10?"]
        asked = await compiled.ainvoke(Command(resume="yes"), thread)
        assert [each.value for each in asked["__interrupt__"]] == ["wire $1M?"]
        ended = await compiled.ainvoke(Command(resume="no"), thread)
        assert (await compiled.aget_state(thread)).next == ()
        return ended["log"]

    assert (
        await all_of(talk(at(f"t{n}")) for n in range(STEPS)) == [["a", "yes", "no", "z"]] * STEPS
    )


async def test_more_runs_and_clients_than_connections_to_the_server(
    pgbouncer_url: str, pgbouncer: PgBouncer
) -> None:
    nodes = [(f"n{number}", logs(number)) for number in range(STEPS)]
    with ExitStack() as stack:
        savers = [stack.enter_context(open_checkpointer(pgbouncer_url)) for _ in range(4)]
        graphs = [chain(*nodes).compile(checkpointer=saver) for saver in savers]
        ended = await all_of(
            graphs[run % 4].ainvoke({"log": []}, at(f"t{run}"), durability="sync")
            for run in range(20)
        )
        assert [each["log"] for each in ended] == [list(range(STEPS))] * 20
        assert pgbouncer.connections("CLIENTS", database(pgbouncer_url)) > POOL
        assert 0 < pgbouncer.connections("SERVERS", database(pgbouncer_url)) <= POOL
        for run in range(20):
            history = [each async for each in graphs[-run % 4].aget_state_history(at(f"t{run}"))]
            assert len(history) == STEPS + 2


def test_two_processes_at_once(pgbouncer_url: str, forkserver: ForkServer, tmp_path: Path) -> None:
    books = Books()
    groups = [[f"{process}-{number}" for number in range(4)] for process in range(2)]
    with ExitStack() as stack:
        pipes = [stack.enter_context(Reports(tmp_path / f"pipe-{n}")) for n in range(2)]
        victims = [
            forkserver.spawn(WRITERS, pgbouncer_url, pipe.path, threads, STEPS)
            for pipe, threads in zip(pipes, groups, strict=True)
        ]
        for pipe, victim in zip(pipes, victims, strict=True):
            books.add_all(pipe.wait_for_end(victim))
    with open_checkpointer(pgbouncer_url) as saver:
        for thread in [*groups[0], *groups[1]]:
            assert books[thread].step == STEPS - 1
            assert_kept(saver, thread, books[thread])


async def test_submissions_drives_and_approvals(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a")), ("ask", asks("pay?")), ("z", logs("z"))), name="g")

    async def talk(run_id: str) -> Any:
        handle = await app.submit("g", {"log": []}, run_id=run_id)
        assert (await app.drive(run_id)).status == "waiting"
        (asked,) = await handle.approvals()
        await app.approvals.decide(asked.id, "approve", by="ada")
        ended = await app.drive(run_id)
        assert (ended.status, ended.claims) == ("succeeded", 2)
        return ended.output["log"]

    logged = await all_of(talk(f"r{number}") for number in range(STEPS))
    assert logged == [["a", ("pay?", {"type": "approve"}), "z"]] * STEPS
    assert len((await app.list_runs(status="succeeded")).items) == STEPS


async def test_worker_drives_many_runs(app: AgentFlow) -> None:
    app.register(chain(("a", logs("a")), ("b", logs("b"))), name="g")
    async with app.worker(concurrency=8):
        handles = [await app.submit("g", {"log": []}) for _ in range(20)]
        results = await all_of(handle.result(timeout=60) for handle in handles)
    assert [result["log"] for result in results] == [["a", "b"]] * 20


async def test_nothing_is_left_behind_in_a_session_of_the_server(pgbouncer_url: str) -> None:
    """What one client leaves there is what another one finds, of whatever program."""
    async with AgentFlow(pgbouncer_url) as app:
        app.register(chain(("a", logs("a")), ("b", logs("b"))), name="g")
        async with app.worker():
            handles = [await app.submit("g", {"log": []}) for _ in range(STEPS)]
            await all_of(handle.result(timeout=60) for handle in handles)
    async with open_checkpointer(pgbouncer_url) as saver:
        await awrite_all(saver, ["t", "u"], STEPS, Books().add)
        await asyncio.to_thread(write, saver, "t", STEPS, Books().add)
    with ExitStack() as stack:
        # Each in a transaction, so that between them they look at every session.
        clients = [stack.enter_context(psycopg.connect(pgbouncer_url)) for _ in range(POOL)]
        found = [client.execute(LEFT_BEHIND, prepare=False).fetchall() for client in clients]
    assert found == [[], []]


async def test_empty_database_gets_its_tables_through_the_pooler(
    pgbouncer: PgBouncer, postgres_server: PostgresServer
) -> None:
    name = postgres_server.create_database()
    async with AgentFlow(pgbouncer.url(name)) as app:
        app.register(chain(("a", logs("a"))), name="g")
        await app.submit("g", {"log": []}, run_id="r")
        assert (await app.drive("r")).status == "succeeded"
    postgres_server.drop_database(name)
