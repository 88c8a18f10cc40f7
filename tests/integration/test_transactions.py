"""Transactions: what a function writes to the user's database commits once, with its record."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from typer.testing import CliRunner

from agentflow import AgentFlow, RetryPolicy, effect, transaction
from agentflow.cli.program import program
from agentflow.effects import outside
from agentflow.errors import InvalidInputError, MissingDriverError, UnsupportedUrlError
from agentflow.types import Run
from tests.integration.graphs import State, chain

AGAIN = RetryPolicy(initial_interval=0, jitter=False, max_attempts=4)
METADATA = sa.MetaData()
BOOKED = sa.Table("booked", METADATA, sa.Column("what", sa.Text()))


KINDS = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.postgres),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]
DRIVERS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgres": ("postgresql+psycopg", "postgresql+psycopg"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
}


@pytest.fixture(params=KINDS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> sa.URL:
    """Where a database of the user's is, with the table of the journal."""
    kind = request.param
    at = tmp_path / "shop.db"
    url = f"sqlite:///{at}" if kind == "sqlite" else request.getfixturevalue(f"{kind}_url")
    assert outside.create(url)
    return sa.make_url(url).set(drivername=DRIVERS[kind][0])


@pytest.fixture
def engine(shop: sa.URL) -> Iterator[sa.Engine]:
    """A database of the user's."""
    made = sa.create_engine(shop)
    METADATA.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
async def async_engine(shop: sa.URL, engine: sa.Engine) -> AsyncIterator[AsyncEngine]:
    """The same database."""
    drivers = dict(DRIVERS.values())
    made = create_async_engine(shop.set(drivername=drivers[shop.drivername]))
    yield made
    await made.dispose()


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


def booked(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(BOOKED.c.what)).scalars())


async def drive(app: AgentFlow, node: Any, *others: Any) -> Run:
    nodes = [(f"n{i}", each) for i, each in enumerate((node, *others))]
    app.register(chain(*nodes), name="g", retry=AGAIN)
    await app.submit("g", {"log": []}, run_id="r")
    return await app.drive("r")


async def test_what_is_written_is_written_once_whatever_runs_again(
    app: AgentFlow, engine: sa.Engine
) -> None:
    failures = [OSError("after"), OSError("inside")]

    @transaction(engine, key=lambda what: f"book-{what}")
    def book(connection: sa.Connection, what: str) -> str:
        connection.execute(sa.insert(BOOKED).values(what=what))
        if len(failures) == 2:
            raise failures.pop()  # rolls back
        return f"booked {what}"

    def node(state: State) -> State:
        made = book("seat")
        if failures:
            raise failures.pop()
        return {"log": [made]}

    run = await drive(app, node)
    assert run.output == {"log": ["booked seat"]}, run.error
    assert booked(engine) == ["seat"]


async def test_of_two_at_once_one_commits_and_the_other_gets_its_outcome(
    app: AgentFlow, engine: sa.Engine
) -> None:
    barrier = threading.Barrier(2)
    calls: list[int] = []

    @transaction(engine, key="only", scope="global")
    def book(connection: sa.Connection) -> int:
        calls.append(1)
        connection.execute(sa.insert(BOOKED).values(what="seat"))
        return len(calls)

    def meet() -> int:
        barrier.wait(10)
        return int(book())

    async def node(state: State) -> State:
        return {"log": list(await asyncio.gather(*(asyncio.to_thread(meet) for _ in range(2))))}

    run = await drive(app, node)
    assert run.status == "succeeded", run.error
    assert len(set(run.output["log"])) == 1
    assert booked(engine) == ["seat"]


async def test_transaction_that_others_are_in_the_way_of_is_tried_again(
    app: AgentFlow, engine: sa.Engine
) -> None:
    calls: list[int] = []

    class SerializationFailureError(Exception):
        sqlstate = "40001"

    @transaction(engine)
    def book(connection: sa.Connection, what: str) -> None:
        connection.execute(sa.insert(BOOKED).values(what=what))
        calls.append(1)
        if len(calls) < 3:
            raise sa.exc.OperationalError("", {}, SerializationFailureError())

    def node(state: State) -> State:
        book("seat")
        return {"log": ["ok"]}

    run = await drive(app, node)
    assert (run.status, run.attempt, len(calls)) == ("succeeded", 1, 3), run.error
    assert booked(engine) == ["seat"]


async def test_other_arguments_under_a_key_are_refused(app: AgentFlow, engine: sa.Engine) -> None:
    @transaction(engine, key="k")
    def book(connection: sa.Connection, what: str) -> None:
        connection.execute(sa.insert(BOOKED).values(what=what))

    def node(state: State) -> State:
        book("one")
        book("two")
        return {}

    run = await drive(app, node)
    assert run.error is not None
    assert "EffectConflictError" in run.error.type
    assert "what" in run.error.message
    assert booked(engine) == ["one"]


async def test_async_function_goes_with_an_async_engine(
    app: AgentFlow, engine: sa.Engine, async_engine: AsyncEngine
) -> None:
    fails = [OSError("after"), OSError("inside")]

    @transaction(async_engine)
    async def book(connection: AsyncConnection, what: str) -> str:
        await connection.execute(sa.insert(BOOKED).values(what=what))
        if len(fails) == 2:
            raise fails.pop()  # rolls back
        return what

    async def node(state: State) -> State:
        made = await book("seat")
        if fails:
            raise fails.pop()
        return {"log": [made]}

    run = await drive(app, node)
    assert run.output == {"log": ["seat"]}, run.error
    assert booked(engine) == ["seat"]
    with pytest.raises(InvalidInputError, match="async"):
        transaction(async_engine)(lambda _: None)


async def test_of_two_async_at_once_one_commits_and_the_other_gets_its_outcome(
    app: AgentFlow, engine: sa.Engine, async_engine: AsyncEngine
) -> None:
    calls: list[int] = []

    @transaction(async_engine, key="only", scope="global")
    async def book(connection: AsyncConnection) -> int:
        calls.append(1)
        made = len(calls)
        await connection.execute(sa.insert(BOOKED).values(what="seat"))
        return made

    async def node(state: State) -> State:
        return {"log": list(await asyncio.gather(book(), book()))}

    run = await drive(app, node)
    assert run.status == "succeeded", run.error
    assert len(set(run.output["log"])) == 1
    assert booked(engine) == ["seat"]


async def test_keys_are_told_apart_by_each_character_and_outcomes_may_be_large(
    app: AgentFlow, engine: sa.Engine
) -> None:
    keys = ["seat", "Seat", "seat ", "séat", "s" * 500, "席"]

    @transaction(engine, key=lambda what: what, name="Платёж")
    def book(connection: sa.Connection, what: str) -> str:
        connection.execute(sa.insert(BOOKED).values(what="one"))
        return what * 20_000

    def node(state: State) -> State:
        sizes = [book(key) == key * 20_000 for key in [*keys, *keys]]
        return {"log": sizes}

    run = await drive(app, node)
    assert run.output == {"log": [True] * 12}, run.error
    assert len(booked(engine)) == len(keys)


async def test_database_without_the_table_says_how_to_make_it(
    app: AgentFlow, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'bare.db'}"
    engine = sa.create_engine(url)

    @transaction(engine)
    def book(connection: sa.Connection) -> None: ...

    def node(state: State) -> State:
        book()
        return {"log": ["ok"]}

    run = await drive(app, node)
    assert run.error is not None
    assert "agentflow migrate journal" in run.error.message
    made = CliRunner().invoke(program, ["migrate", "journal", "--url", url])
    assert made.exit_code == 0, made.output
    await app.dead_letters.requeue("r")
    assert (await app.drive("r")).status == "succeeded"
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("shop", UnsupportedUrlError, "mariadb://"),
        ("nope://ada:secret@host/shop", UnsupportedUrlError, "'nope'"),
        ("mariadb+mysqldb://ada:secret@host/shop", MissingDriverError, "pip install"),
    ],
)
def test_journal_is_not_made_in_what_is_no_database(
    url: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        outside.create(url)
    assert "secret" not in str(raised.value)


def test_journal_is_made_at_the_url_of_an_async_engine(shop: sa.URL) -> None:
    asynchronous = shop.set(drivername=dict(DRIVERS.values())[shop.drivername])
    assert not outside.create(asynchronous.render_as_string(hide_password=False))


async def test_transaction_inside_an_effect_is_undone_with_its_run(
    app: AgentFlow, engine: sa.Engine
) -> None:
    @transaction(engine)
    def unbook(connection: sa.Connection, what: str) -> None:
        connection.execute(sa.delete(BOOKED).where(BOOKED.c.what == what))

    @transaction(engine)
    def write(connection: sa.Connection, what: str) -> str:
        connection.execute(sa.insert(BOOKED).values(what=what))
        return what

    seen: list[list[str]] = []

    def undo(outcome: str) -> None:
        seen.append(booked(engine))
        unbook(outcome)

    @effect(on_in_doubt="retry", compensate=undo)
    def book(what: str) -> str:
        return str(write(what))

    def node(state: State) -> State:
        book("seat")
        raise ValueError

    run = await drive(app, node)
    assert (run.status, run.saga) == ("failed", "compensated")
    assert seen == [["seat"]]
    assert booked(engine) == []
