"""A node that books twice in a database of its own; its process is killed around the commits."""

from __future__ import annotations

import os
import signal
from typing import Any

import sqlalchemy as sa

from agentflow import AgentFlow, transaction
from agentflow.effects import outside
from agentflow.errors import NotFoundError
from tests.integration.graphs import State, chain

METADATA = sa.MetaData()
BOOKED = sa.Table(
    "booked", METADATA, sa.Column("run", sa.String(100)), sa.Column("what", sa.String(100))
)
DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg", "mariadb": "pymysql"}
MOMENTS = ("before", "inside", "uncommitted", "committed", "returned")
"""Before the call, after what it writes, before and after its commit, and after it has returned."""
SEATS = ("there", "back")


def open_shop(url: str) -> sa.Engine:
    """Open the user's database, and make what is needed."""
    parsed = sa.make_url(url)
    backend = parsed.get_backend_name()
    engine = sa.create_engine(parsed.set(drivername=f"{backend}+{DRIVERS[backend]}"))
    METADATA.create_all(engine)
    outside.create(url)
    return engine


async def book(url: str, shop: str, run_ids: list[str], at: list[str] | None) -> None:
    """Drive runs, and be killed at one moment of one booking, as `at` says."""
    engine = open_shop(shop)
    under_way: list[str] = []

    def pass_by(moment: str) -> None:
        if at == [moment, *under_way]:
            os.kill(os.getpid(), signal.SIGKILL)

    commit = engine.dialect.do_commit

    def struck_commit(connection: Any) -> None:
        pass_by("uncommitted")
        commit(connection)
        pass_by("committed")

    @transaction(engine, key=lambda run, what: f"{run}-{what}")
    def write(connection: sa.Connection, run: str, what: str) -> str:
        connection.execute(sa.insert(BOOKED).values(run=run, what=what))
        pass_by("inside")
        return what

    def node(state: State) -> State:
        made = []
        for what in SEATS:
            under_way[:] = [what]
            pass_by("before")
            engine.dialect.do_commit = struck_commit  # type: ignore[assignment,method-assign]
            made.append(write(state["value"], what))
            pass_by("returned")
        return {"log": made}

    async with AgentFlow(url) as app:
        app.register(chain(("book", node)), name="book")
        for run_id in run_ids:
            try:
                await app.get_run(run_id)
            except NotFoundError:
                await app.submit("book", {"log": [], "value": run_id}, run_id=run_id)
            await app.drive(run_id)
