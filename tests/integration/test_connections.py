"""Connections that break, hang, are shared or run out: what was accepted is durable, once.

A wire stands between the checkpointer and its server, and does what a network does at its worst.
The server itself is killed, and started again on the same data.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from langgraph.checkpoint.base import CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.operations import Short
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.database.connections import GROW_WAL_AFTER
from agentflow.database.engine import grow_wal
from agentflow.database.session import Session
from agentflow.errors import StoreUnavailableError
from tests.fault.forkserver import ForkServer
from tests.fault.savers import (
    FORKING_WRITER,
    TASKS,
    WRITERS,
    Books,
    Fact,
    Line,
    Reports,
    assert_kept,
    at,
    rounds,
    values_at,
    write,
    writes_at,
)
from tests.integration.graphs import chain, logs
from tests.proxy import Proxy
from tests.servers import PostgresServer

pytestmark = pytest.mark.slow  # servers and deadlines take their time

SECRET = "hunter2-secret"
LIMIT = 60.0
"""Seconds after which a call that has not returned never will."""
DEADLINE = 1.0
"""The store's deadline, where a test waits for its end."""
GRACE = 4.0
"""Seconds by which a call may be late."""
OUTAGE = 0.5
RUNS = 20
MANY_RUNS = 200
MOST_CONNECTIONS = 10
"""Of one process, however many runs it has; PostgreSQL allows 100 in all by default."""
PROCESSES = 8

Call = Callable[[Saver, Line], Any]


@pytest.fixture
def proxy(postgres_url: str, postgres_server: PostgresServer) -> Iterator[Proxy]:
    """A wire to the server."""
    with Proxy(postgres_server.port) as opened:
        yield opened


@pytest.fixture
def wired_url(postgres_url: str, proxy: Proxy) -> str:
    """The URL of the test's database through the wire, with a password that must not be shown."""
    return proxy.url(postgres_url.replace("agentflow@", f"agentflow:{SECRET}@"))


@pytest.fixture
def pool(proxy: Proxy) -> Iterator[ThreadPoolExecutor]:
    """A thread for a call that may not return; what still waits for the wire then, gives up."""
    with ThreadPoolExecutor(1) as opened:
        yield opened
        proxy.refuse()


@pytest.fixture(scope="module")
def own_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server of these tests' own."""
    with PostgresServer() as opened:
        yield opened


@pytest.fixture
def crashing(own_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that the test may kill."""
    yield own_server
    if not own_server.is_running:
        own_server.start()


def head(saver: Saver, thread: str = "t") -> CheckpointTuple:
    """Load what must be there."""
    found = saver.get_tuple(at(thread))
    assert found is not None
    return found


def resume(saver: Saver) -> Line:
    """Load the thread and complete its last step, so that the next one may follow."""
    line = Line(saver, "t", saver.get_tuple(at("t")))
    for task in line.missing:
        saver.put_writes(line.config, writes_at("t", line.step, task), task)
    return line


def put(saver: Saver, line: Line) -> None:
    saver.put(*line.next())


def aput(saver: Saver, line: Line) -> None:
    asyncio.run(saver.aput(*line.next()))


def put_writes(saver: Saver, line: Line) -> None:
    saver.put_writes(line.config, writes_at("t", line.step, TASKS[0]), TASKS[0])


def get_tuple(saver: Saver, line: Line) -> None:
    assert head(saver).checkpoint["channel_values"] == values_at("t", line.step)


def aget_tuple(saver: Saver, line: Line) -> None:
    async def get() -> Any:
        return await saver.aget_tuple(at("t"))

    assert asyncio.run(get()).checkpoint["channel_values"] == values_at("t", line.step)


def list_all(saver: Saver, line: Line) -> None:
    steps = [each.metadata["step"] for each in saver.list(at("t"))]
    assert steps == list(range(line.step, -1, -1))


every_call = pytest.mark.parametrize(
    "call", [put, aput, put_writes, get_tuple, aget_tuple, list_all]
)
every_read = pytest.mark.parametrize("call", [get_tuple, aget_tuple, list_all])


@every_call
def test_idle_checkpointer_survives_a_restart_of_its_server(
    crashing: PostgresServer, call: Call
) -> None:
    """All of its connections are dead, and it does not know."""
    with open_checkpointer(crashing.url(crashing.create_database())) as saver:
        books = Books()
        write(saver, "t", 3, books.add)
        line = resume(saver)
        with ThreadPoolExecutor(8) as readers:
            wait([readers.submit(get_tuple, saver, line) for _ in range(40)])
        crashing.kill()
        crashing.start()
        call(saver, line)
        write(saver, "t", 2, books.add)
        assert_kept(saver, "t", books["t"])


async def test_runs_survive_restarts_of_the_server_that_they_write_to(
    crashing: PostgresServer,
) -> None:
    """Nobody sees an error, so no node is executed twice, and each checkpoint is there once."""
    facts: list[Fact] = []
    moments = {number: threading.Event() for number in (120, 240)}

    def report(**fact: Any) -> None:
        facts.append(fact)
        if (moment := moments.get(len(facts))) is not None:
            moment.set()

    twin = rounds(lambda **_: None).compile(checkpointer=InMemorySaver())
    output = await twin.ainvoke({"wanted": 4}, at("twin"))
    expected = [(s.values, s.next) async for s in twin.aget_state_history(at("twin"))]
    async with open_checkpointer(crashing.url(crashing.create_database())) as saver:
        graph = rounds(report).compile(checkpointer=saver)
        running = [
            asyncio.create_task(graph.ainvoke({"wanted": 4}, at(f"t{n}"), durability="sync"))
            for n in range(RUNS)
        ]
        for moment in moments.values():
            # Looks at the runs too: if all have failed, the moment never comes.
            while not await asyncio.to_thread(moment.wait, 0.1):
                assert not all(each.done() for each in running)
            await asyncio.to_thread(crashing.kill)
            await asyncio.to_thread(crashing.start)
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert [repr(each) for each in ended if isinstance(each, BaseException)] == []
        assert ended == [output] * RUNS
        for number in range(RUNS):
            history = [(s.values, s.next) async for s in graph.aget_state_history(at(f"t{number}"))]
            assert history == expected
    entered = [(fact["thread"], fact["enter"], fact["step"]) for fact in facts if "enter" in fact]
    assert len(entered) == len(set(entered)) == RUNS * 12


@every_call
def test_outage_that_ends_in_time_is_waited_for(
    proxy: Proxy, wired_url: str, pool: ThreadPoolExecutor, call: Call
) -> None:
    with open_checkpointer(wired_url) as saver:
        write(saver, "t", 3, Books().add)
        line = resume(saver)
        proxy.refuse()
        waiting = pool.submit(call, saver, line)
        wait([waiting], OUTAGE)  # how long it lasts, not a synchronisation
        proxy.heal()
        waiting.result(LIMIT)


@pytest.mark.parametrize("harm", [Proxy.refuse, Proxy.swallow], ids=["refused", "silent"])
@pytest.mark.parametrize("call", [put, aget_tuple, list_all])
def test_outage_that_does_not_end_is_an_error_in_time(
    proxy: Proxy,
    wired_url: str,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    harm: Callable[[Proxy], None],
) -> None:
    """It says what to do and shows no password; afterwards the same checkpointer goes on."""
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", str(DEADLINE))
    books = Books()
    with open_checkpointer(wired_url) as saver:
        write(saver, "t", 3, books.add)
        line = resume(saver)
        harm(proxy)
        failing = pool.submit(call, saver, line)
        try:
            error = failing.exception(DEADLINE + GRACE)
        except TimeoutError:
            error = None
        finally:
            proxy.heal()
        assert isinstance(error, StoreUnavailableError), f"after the deadline: {error!r}"
        assert f"127.0.0.1:{proxy.port}" in str(error)
        assert "check that it runs and that the URL is right" in str(error)
        assert SECRET not in "".join(traceback.format_exception(error))
        assert SECRET not in f"{error!r} {error.store} {error.reason}"
        write(saver, "t", 2, books.add)
        assert_kept(saver, "t", books["t"])
        assert books["t"].step == 4


class Breaker:
    """Breaks the connection of a call, each time at a later place."""

    def __init__(
        self, proxy: Proxy, pool: ThreadPoolExecutor, harm: Callable[[int], Future[bool]], step: int
    ) -> None:
        self._proxy = proxy
        self._pool = pool
        self._harm = harm
        self._step = step

    def break_each(
        self,
        prepare: Callable[[], Callable[[], Any]],
        look: Callable[[], bool] = bool,
        *,
        stride: int = 1,
    ) -> list[bool]:
        """Make calls, until one has ended before its place came; none of them may fail.

        Returns what `look` saw each time while the call did not know what had become of it.
        """
        seen: list[bool] = []
        step = self._step * stride
        for place in range(1, 100 * step, step):
            call = prepare()
            broken = self._harm(place)
            calling = self._pool.submit(call)
            try:
                wait([broken, calling], LIMIT, FIRST_COMPLETED)
                if broken.done():
                    seen.append(look())
            finally:
                self._proxy.heal()
            try:
                calling.result(LIMIT)
            except Exception as error:
                raise AssertionError(f"broken at {place}, {seen=}: {error!r}") from error
            if not broken.done():
                return seen
        raise AssertionError("a call did not end")


@pytest.fixture(params=["reply lost", "reply cut"])
def breaker(request: pytest.FixtureRequest, proxy: Proxy, pool: ThreadPoolExecutor) -> Breaker:
    """Loses each reply of a call as a whole, or cuts what the server says after more and more.

    The shortest reply is 18 bytes long, that to COMMIT.
    """
    if request.param == "reply lost":
        return Breaker(proxy, pool, proxy.lose_reply, 1)
    return Breaker(proxy, pool, proxy.cut_after, 17)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_checkpoint_is_there_once_wherever_its_connection_breaks(
    wired_url: str, postgres_url: str, breaker: Breaker, how: str
) -> None:
    """The put succeeds, nothing branches, and nobody hears of a conflict with itself."""
    books = Books()
    with open_checkpointer(wired_url) as saver, open_checkpointer(postgres_url) as truth:
        write(saver, "t", 2, books.add)

        def prepare() -> Callable[[], None]:
            line = resume(saver)
            arguments = line.next()

            def call() -> None:
                if how == "sync":
                    line.saved(books.add, saver.put(*arguments))
                else:
                    line.saved(books.add, asyncio.run(saver.aput(*arguments)))

            return call

        def is_durable() -> bool:
            step: int = head(truth).metadata["step"]
            return step > books["t"].step

        seen = breaker.break_each(prepare, is_durable)
        assert True in seen, "some were durable and not acknowledged"
        assert books["t"].step == len(seen) + 2
        assert_kept(truth, "t", books["t"])
        assert_kept(saver, "t", books["t"])


def test_error_never_says_that_what_is_durable_was_not_written(
    wired_url: str,
    postgres_url: str,
    proxy: Proxy,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever believed it would do the work again."""
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    with open_checkpointer(wired_url) as saver, open_checkpointer(postgres_url) as truth:
        write(saver, "t", 2, Books().add)
        for reply in range(1, 100):
            line = resume(saver)
            lost = proxy.lose_reply(reply)
            failing = pool.submit(put, saver, line)
            try:
                lost.result(LIMIT)
                error = failing.exception(LIMIT)
            finally:
                proxy.heal()
            assert isinstance(error, StoreUnavailableError)
            if head(truth).metadata["step"] == line.step:
                assert error.outcome == "unknown"
                break
        else:
            pytest.fail("nothing became durable")
        write(saver, "t", 2, Books().add)
        assert head(truth).metadata["step"] == line.step + 2


def test_writes_are_there_once_wherever_their_connection_breaks(
    wired_url: str, postgres_url: str, breaker: Breaker
) -> None:
    books = Books()
    with open_checkpointer(wired_url) as saver, open_checkpointer(postgres_url) as truth:
        write(saver, "t", 2, books.add)

        def prepare() -> Callable[[], None]:
            line = resume(saver)
            line.saved(books.add, saver.put(*line.next()))
            writes = writes_at("t", line.step, TASKS[1])
            return lambda: saver.put_writes(line.config, writes, TASKS[1])

        seen = breaker.break_each(prepare, lambda: bool(head(truth).pending_writes))
        assert True in seen, "some were durable and not acknowledged"
        assert head(truth).pending_writes
        assert_kept(truth, "t", books["t"])


def test_thread_is_deleted_wherever_the_connection_breaks(
    wired_url: str, postgres_url: str, breaker: Breaker
) -> None:
    with open_checkpointer(wired_url) as saver, open_checkpointer(postgres_url) as truth:

        def prepare() -> Callable[[], None]:
            assert truth.get_tuple(at("t")) is None
            write(saver, "t", 2, Books().add)
            return lambda: saver.delete_thread("t")

        seen = breaker.break_each(prepare, lambda: truth.get_tuple(at("t")) is None, stride=5)
        assert True in seen
        assert truth.get_tuple(at("t")) is None


@every_read
def test_reading_is_repeated_wherever_the_connection_breaks(
    wired_url: str, breaker: Breaker, call: Call
) -> None:
    with open_checkpointer(wired_url) as saver:
        write(saver, "t", 3, Books().add)
        line = resume(saver)
        assert breaker.break_each(lambda: partial(call, saver, line), stride=10)


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_parent_and_child_of_a_fork_go_on_apart(
    database_url: str, forkserver: ForkServer, tmp_path: Path, how: str
) -> None:
    """On no common connection; and what the child writes after its parent has closed, stays."""
    books = Books()
    with Reports(tmp_path / "pipe") as reports:
        victim = forkserver.spawn(FORKING_WRITER, database_url, reports.path, how)
        facts = reports.wait_for_end(victim)
    books.add_all(fact for fact in facts if "thread" in fact)
    (child,) = (set(fact["child"]) for fact in facts if "child" in fact)
    (parent,) = (set(fact["parent"]) for fact in facts if "parent" in fact)
    (inherited,) = (set(fact["inherited"]) for fact in facts if "inherited" in fact)
    if database_url.startswith("postgresql"):
        assert inherited
        assert inherited <= parent, "the child has ended its parent's connections"
        assert child, "the child has made no connection of its own"
        assert not child & parent
    with open_checkpointer(database_url) as saver:
        for thread, steps in {"before": 6, "parent": 5, "child": 10}.items():
            assert books[thread].step == steps - 1
            assert_kept(saver, thread, books[thread])


PLANS = "SHOW plan_cache_mode"


async def test_transaction_whose_commit_is_refused_leaves_the_next_one_alone(
    database_url: str,
) -> None:
    database = Database(database_url, Settings())
    if database_url.startswith("sqlite"):
        engine = database._connections.engine
        sa.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=ON"))

    def fail_at_the_end(connection: Connection) -> None:
        reference = "id int REFERENCES parents DEFERRABLE INITIALLY DEFERRED"
        connection.exec_driver_sql("CREATE TABLE parents (id int PRIMARY KEY)")
        connection.exec_driver_sql(f"CREATE TABLE children ({reference})")
        connection.exec_driver_sql("INSERT INTO children VALUES (1)")

    try:
        with pytest.raises(IntegrityError):
            await database.write(fail_at_the_end)
        if not database_url.startswith("sqlite"):
            # Nor does a reader get a connection that was set up for the writer.
            mode = await database.read(lambda each: each.exec_driver_sql(PLANS).scalar())
            assert mode == "auto"
        assert await database.write(lambda each: each.exec_driver_sql("SELECT 1").scalar()) == 1
    finally:
        await asyncio.to_thread(database.close)


async def test_statements_of_the_writer_are_planned_once(postgres_url: str) -> None:
    planned = "SELECT generic_plans, custom_plans FROM pg_prepared_statements ORDER BY statement"
    database = Database(postgres_url, Settings())

    def count(session: Session, times: int) -> Any:
        for _ in range(times):
            session.fetch("SELECT CAST(? AS bigint)", [1])
        return session.fetch(planned)[0]

    try:
        of_transactions = await database.write(lambda each: count(Session.inside(each), 4))
        by_itself = database.submit(Short(lambda rows: count(rows._session, 4)))  # type: ignore[attr-defined]  # of all that are SQL
        for planned_so in (of_transactions, await database.settled(by_itself)):
            assert planned_so == (3, 0), "the first one is not prepared"
        # A reader's are planned for the values that they get.
        assert await database.query(lambda session: count(session, 10)) == (0, 5)
    finally:
        await asyncio.to_thread(database.close)


async def test_connections_stay_few_however_many_runs_there_are(postgres_url: str) -> None:
    ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    counted: list[int] = []
    done = threading.Event()

    def count() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            while not done.wait(0.005):
                row = connection.execute(ours).fetchone()
                assert row is not None
                counted.append(row[0] - 1)

    counting = asyncio.create_task(asyncio.to_thread(count))
    async with open_checkpointer(postgres_url) as saver:
        graph = chain(("a", logs("a")), ("b", logs("b"))).compile(checkpointer=saver)
        ended = await asyncio.gather(
            *(graph.ainvoke({"log": [n]}, at(f"t{n}"), durability="sync") for n in range(MANY_RUNS))
        )
        done.set()
        await counting
        assert [each["log"] for each in ended] == [[n, "a", "b"] for n in range(MANY_RUNS)]
        # Reading, which is not the writer's work, may take more at once.
        states = await asyncio.gather(*(graph.aget_state(at(f"t{n}")) for n in range(MANY_RUNS)))
        assert [each.next for each in states] == [()] * MANY_RUNS
    assert 0 < max(counted) <= MOST_CONNECTIONS


def test_processes_that_write_one_file_at_once_never_find_it_locked(
    sqlite_url: str, forkserver: ForkServer, tmp_path: Path
) -> None:
    """Not when it is made either: they all begin before it is there."""
    books = Books()
    threads = [[f"{process}-{n}" for n in range(2)] for process in range(PROCESSES)]
    with ExitStack() as stack:
        pipes = [stack.enter_context(Reports(tmp_path / f"pipe-{n}")) for n in range(PROCESSES)]
        victims = [
            forkserver.spawn(WRITERS, sqlite_url, pipe.path, names, 10)
            for pipe, names in zip(pipes, threads, strict=True)
        ]
        for pipe, victim in zip(pipes, victims, strict=True):
            books.add_all(pipe.wait_for_end(victim))
    with open_checkpointer(sqlite_url) as saver:
        for thread in itertools.chain(*threads):
            assert books[thread].step == 9
            assert_kept(saver, thread, books[thread])


async def test_log_of_a_busy_file_is_long_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def log_size(steps: int) -> int:
        async with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
            config = at(str(steps))
            for _ in range(steps):
                config = await saver.aput(config, empty_checkpoint(), {}, {})
            return (tmp_path / "a.db-wal").stat().st_size

    growing: list[str] = []

    def grow(connection: Any) -> None:
        growing.append(threading.current_thread().name)
        grow_wal(connection)

    monkeypatch.setattr("agentflow.database.connections.grow_wal", grow)
    few, many = await log_size(GROW_WAL_AFTER // 2), await log_size(GROW_WAL_AFTER + 1)
    assert few < 1000 * 4096 <= many
    assert growing == ["agentflow-writer"], "an event loop does not wait for that"
