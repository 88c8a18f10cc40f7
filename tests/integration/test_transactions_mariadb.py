"""Transactions on MariaDB, where its own ways get between them: locks, deadlocks and snapshots."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow, RetryPolicy, transaction
from agentflow.effects import outside
from agentflow.types import Run
from tests.integration.graphs import State, chain

pytestmark = pytest.mark.mariadb

METADATA = sa.MetaData()
BOOKED = sa.Table("booked", METADATA, sa.Column("what", sa.String(100)))
SEATS = sa.Table(
    "seats", METADATA, sa.Column("id", sa.Integer, primary_key=True), sa.Column("sold", sa.Integer)
)
PATIENCE = 20.0
CALLERS = 6


@pytest.fixture
def engine(mariadb_url: str) -> Iterator[sa.Engine]:
    """A database of the user's, with two seats."""
    outside.create(mariadb_url)
    made = sa.create_engine(
        sa.make_url(mariadb_url).set(drivername="mariadb+pymysql"), pool_size=CALLERS + 1
    )
    METADATA.create_all(made)
    with made.begin() as connection:
        connection.execute(sa.insert(SEATS), [{"id": 1, "sold": 0}, {"id": 2, "sold": 0}])
    yield made
    made.dispose()


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


async def drive(app: AgentFlow, node: Callable[[State], object]) -> Run:
    """Drive a run that has one attempt: an error that gets out of a transaction is its end."""
    app.register(chain(("n", node)), name="g", retry=RetryPolicy(max_attempts=1))
    await app.submit("g", {"log": []}, run_id="r")
    return await app.drive("r")


def booked(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(BOOKED.c.what)).scalars())


def sell(connection: sa.Connection, seat: int) -> None:
    connection.execute(sa.update(SEATS).where(SEATS.c.id == seat).values(sold=SEATS.c.sold + 1))


def number_of(error: sa.exc.DBAPIError) -> int:
    """Return MariaDB's number of an error."""
    return 0 if error.orig is None else int(error.orig.args[0])


def wait_for_lock_waits(engine: sa.Engine, count: int) -> None:
    """Return once so many transactions wait for a lock, as the server says."""
    query = sa.text("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            _, waits = connection.execute(query).one()
        if int(waits) >= count:
            return
        time.sleep(0.02)  # the server tells nobody
    raise AssertionError(f"{count} callers were to wait for a lock")


async def test_of_many_at_once_one_commits_also_if_the_first_one_rolls_back(
    app: AgentFlow, engine: sa.Engine
) -> None:
    # Those who wait for the row of one that rolls back all get a shared lock on its gap at once,
    # and then each is in the way of all others: InnoDB calls that a deadlock.
    began = threading.Event()
    calls: list[int] = []

    @transaction(engine, key="only")
    def book(connection: sa.Connection, number: int = 0) -> int:
        calls.append(1)
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        if len(calls) == 1:
            began.set()
            wait_for_lock_waits(engine, CALLERS - 1)
            raise OSError("sold out")
        return len(calls)

    def call_first() -> str:
        with pytest.raises(OSError, match="sold out"):
            book()
        return "first"

    def call_later() -> int:
        assert began.wait(PATIENCE)
        return int(book())

    async def node(state: State) -> State:
        later = (asyncio.to_thread(call_later) for _ in range(CALLERS - 1))
        _, *made = await asyncio.gather(asyncio.to_thread(call_first), *later)
        return {"log": made}

    run = await drive(app, node)
    assert run.status == "succeeded", run.error
    assert len(run.output["log"]) == CALLERS - 1
    assert len(set(run.output["log"])) == 1
    assert booked(engine) == ["seat"]


async def test_commit_whose_reply_is_lost_is_not_made_again(
    app: AgentFlow, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = engine.dialect.do_commit
    calls: list[int] = []

    def lose_reply(connection: Any) -> None:
        monkeypatch.undo()
        commit(connection)
        with engine.connect() as other:
            other.exec_driver_sql(f"KILL CONNECTION {connection.thread_id()}")
        connection.ping(False)

    @transaction(engine)
    def book(connection: sa.Connection) -> str:
        calls.append(1)
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        monkeypatch.setattr(engine.dialect, "do_commit", lose_reply)
        return "seat"

    def node(state: State) -> State:
        return {"log": [book()]}

    run = await drive(app, node)
    assert (run.status, run.output) == ("succeeded", {"log": ["seat"]}), run.error
    assert (calls, booked(engine)) == ([1], ["seat"])


@pytest.fixture
def small_packets(engine: sa.Engine) -> Iterator[None]:
    """A server that takes two megabytes at a time."""
    setting = "SET GLOBAL max_allowed_packet = "
    with engine.connect() as connection:
        before = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one()
        connection.exec_driver_sql(setting + str(2 * 1024**2))
    engine.dispose()  # it is for new connections
    yield
    with engine.connect() as connection:
        connection.exec_driver_sql(setting + str(before))


async def test_outcome_that_the_server_does_not_take_is_refused_by_name(
    app: AgentFlow, engine: sa.Engine, small_packets: None
) -> None:
    calls: list[int] = []

    @transaction(engine)
    def book(connection: sa.Connection) -> bytes:
        calls.append(1)
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        return random.randbytes(3_000_000)

    def node(state: State) -> State:
        return {"log": [len(book())]}

    run = await drive(app, node)
    assert run.error is not None
    assert "SerializationError" in run.error.type
    assert "max_allowed_packet" in run.error.message
    assert (calls, booked(engine)) == ([1], [])


async def test_error_of_the_journals_own_statement_does_not_show_the_outcome(
    app: AgentFlow, engine: sa.Engine
) -> None:
    @transaction(engine)
    def book(connection: sa.Connection) -> str:
        outside.effect_journal.drop(connection)
        return "s3cret"

    def node(state: State) -> State:
        return {"log": [book()]}

    run = await drive(app, node)
    assert run.error is not None
    assert "UPDATE effect_journal" in run.error.message
    assert "s3cret" not in f"{run.error}"


@contextmanager
def other_holding(engine: sa.Engine, seat: int) -> Iterator[sa.Connection]:
    """Be another transaction, one that has written more, so that a deadlock is not its end."""
    with engine.connect() as connection:
        connection.execute(sa.insert(SEATS), [{"id": i, "sold": 0} for i in range(10, 60)])
        sell(connection, seat)
        yield connection


@pytest.mark.parametrize("how", ["raised", "caught", "raised from a savepoint"])
async def test_victim_of_a_deadlock_is_tried_again_whole(
    app: AgentFlow, engine: sa.Engine, how: str
) -> None:
    seen: list[int] = []

    def cross(connection: sa.Connection, other: sa.Connection) -> None:
        waiter = threading.Thread(target=sell, args=(other, 1))
        waiter.start()
        wait_for_lock_waits(engine, 1)
        try:
            with connection.begin_nested() if "savepoint" in how else nullcontext():
                sell(connection, 2)
        except sa.exc.OperationalError as error:
            seen.append(number_of(error))
            if how != "caught":
                raise
        finally:
            waiter.join()

    @transaction(engine)
    def book(connection: sa.Connection) -> str:
        sell(connection, 1)
        if not seen:
            with other_holding(engine, 2) as other:
                cross(connection, other)
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        return "seat"

    def node(state: State) -> State:
        return {"log": [book()]}

    run = await drive(app, node)
    expected = 1305 if "savepoint" in how else 1213
    assert (run.status, seen) == ("succeeded", [expected]), run.error
    assert booked(engine) == ["seat"]
    with engine.connect() as connection:
        sold = connection.execute(sa.select(SEATS.c.sold).where(SEATS.c.id == 1)).scalar_one()
    assert sold == 1


@pytest.mark.parametrize(
    ("setting", "number"),
    [("innodb_lock_wait_timeout = 0", 1205), ("innodb_snapshot_isolation = ON", 1020)],
)
async def test_lock_that_is_not_given_and_row_that_has_changed_are_tried_again(
    app: AgentFlow, engine: sa.Engine, setting: str, number: int
) -> None:
    seen: list[int] = []

    @transaction(engine)
    def book(connection: sa.Connection) -> str:
        connection.exec_driver_sql(f"SET SESSION {setting}")
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        connection.execute(sa.select(SEATS))  # the snapshot is made here at the latest
        if seen:
            sell(connection, 1)
            return "seat"
        with engine.connect() as other:
            sell(other, 1)
            if number == 1020:
                other.commit()
            try:
                sell(connection, 1)
            except sa.exc.DBAPIError as error:
                seen.append(number_of(error))
                raise
        raise AssertionError

    def node(state: State) -> State:
        return {"log": [book()]}

    run = await drive(app, node)
    assert (run.status, seen) == ("succeeded", [number]), run.error
    assert booked(engine) == ["seat"]
