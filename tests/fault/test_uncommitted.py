"""A put and a claim that meet in the database: whichever is first, exactly one order holds.

Here one of them was executed and is not committed while the other arrives, or waits in the server
while its worker is stopped or dies.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.batch import ThreadStates
from agentflow.checkpoint.operations import Put
from agentflow.checkpoint.rows import Rows
from agentflow.checkpoint.sql import open_rows
from agentflow.checkpoint.verbs import acquire_thread
from agentflow.config import load_settings
from agentflow.database.connections import Connections
from agentflow.database.engine import parse_url
from agentflow.database.session import Session
from agentflow.database.tables import checkpoints, threads
from agentflow.errors import FencedError, StoreUnavailableError
from agentflow.types import FencingToken, Lease, RunStatus
from tests.fault.conftest import Tally
from tests.fault.forkserver import Victim
from tests.fault.graphs import LINEAR
from tests.fault.scene import (
    Scene,
    assert_sound,
    connected,
    durable_nodes,
    read_everything,
    read_rows,
    read_thread_rows,
)
from tests.fault.test_kills import INPUT, OUTPUT
from tests.fault.test_zombies import given_back, logged, outlived

End = Literal["committed", "rolled-back"]
THREAD: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
ONLY_POSTGRES = pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
PATIENCE = 30.0


def lease(token: int) -> Lease:
    return Lease(
        tenant="", run_id="r", thread_id="t", worker=f"w{token}", token=FencingToken(token)
    )


class Undone(Exception):  # noqa: N818 -- no error: it rolls back
    """Ends a transaction without a commit."""


@dataclass
class Transaction:
    """What is executed and not committed, in a thread of its own, until `end`."""

    end: Callable[[End], None]


@contextmanager
def executed(url: str, act: Callable[[Session, Rows], Any], *, how: str) -> Iterator[Transaction]:
    """Execute something on a connection of its own, and keep its transaction open."""
    connections = Connections(parse_url(url), load_settings())
    is_executed, is_over = threading.Event(), threading.Event()
    wanted: list[End] = []
    failed: list[BaseException] = []

    def transact(session: Session) -> None:
        act(session, open_rows(session))
        is_executed.set()
        is_over.wait(PATIENCE)
        if wanted == ["rolled-back"]:
            raise Undone

    def serve() -> None:
        try:
            if how == "batch-of-several":
                with connections.writing() as session:
                    transact(session)
            else:
                with connections.autocommitting() as session, open_rows(session).exclusive():
                    transact(session)
        except Undone:
            pass
        except BaseException as error:  # noqa: BLE001 -- raised again in the test
            failed.append(error)
            is_executed.set()
        finally:
            connections.end_writing()
            connections.dispose()

    def end(how: End) -> None:
        wanted.append(how)
        is_over.set()
        thread.join()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        assert is_executed.wait(PATIENCE)
        yield Transaction(end)
    finally:
        is_over.set()
        thread.join()
        for error in failed:
            raise error


@pytest.fixture(params=["batch-of-several", "batch-alone"])
def how(request: pytest.FixtureRequest) -> str:
    """Which of the two transactions it is: one of the whole batch, or one of the puts alone."""
    name: str = request.param
    return name


@pytest.fixture
async def saver(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Saver]:
    """A checkpointer with a thread that is leased under token 1 and has one checkpoint."""
    monkeypatch.setenv("AGENTFLOW_LEASE", "60")  # and with it, how long Postgres waits for a row
    async with open_checkpointer(database_url) as opened:
        await opened.acquire(lease(1))
        await put(opened.with_lease(lease(1)), step=0)
        yield opened


async def put(saver: Saver, *, step: int) -> None:
    await saver.aput(THREAD, empty_checkpoint(), {"step": step}, {})


def execute_put(session: Session, _rows: Rows) -> None:
    """Execute a put under token 1, as the writer does in a batch."""
    planned = encoded(session, step=1)
    (outcome,) = Put.run(session, [Put(planned, ThreadStates(), size=0)])
    assert outcome is None


def encoded(session: Session, *, step: int) -> Any:
    del session
    encoder = open_checkpointer("memory://")._encoder
    return encoder.checkpoint(
        ("", "t", ""), lease(1), "1", THREAD, empty_checkpoint(), {"step": step}, {}
    )


def steps(url: str) -> list[int]:
    return sorted(row.step for row in read_thread_rows(url, checkpoints, ["t"]))


async def is_waiting(url: str, action: asyncio.Task[Any]) -> None:
    """Wait until an action waits for the transaction that is open."""
    if url.startswith("postgresql"):
        await asyncio.to_thread(_wait_in_server, url)
    else:
        # Who waits for a SQLite file does so in its own process.
        await asyncio.wait([action], timeout=0.3)
    assert not action.done()


def _wait_in_server(url: str) -> None:
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with connected(url) as connection:
        while not connection.execute(waiting).scalar_one():
            connection.rollback()


@pytest.mark.parametrize("end", ["committed", "rolled-back"])
async def test_claim_that_meets_an_uncommitted_put_waits_for_its_end(
    saver: Saver, database_url: str, how: str, end: End
) -> None:
    with executed(database_url, execute_put, how=how) as transaction:
        claim = asyncio.create_task(saver.acquire(lease(2)))
        await is_waiting(database_url, claim)
        await asyncio.to_thread(transaction.end, end)
        assert await claim == 2
    assert steps(database_url) == ([0, 1] if end == "committed" else [0])
    with pytest.raises(FencedError):
        await put(saver.with_lease(lease(1)), step=2)
    await put(saver.with_lease(lease(2)), step=3)
    assert steps(database_url) == ([0, 1, 3] if end == "committed" else [0, 3])
    assert len(set(numbers(database_url))) == len(numbers(database_url))


def numbers(url: str) -> list[int]:
    return [row.seq for row in read_thread_rows(url, checkpoints, ["t"])]


@pytest.mark.parametrize("end", ["committed", "rolled-back"])
async def test_put_that_meets_an_uncommitted_claim_waits_for_its_end(
    saver: Saver, database_url: str, how: str, end: End
) -> None:
    """The state that the put was planned from, and remembered, is not the one that it meets."""

    def claim(_session: Session, rows: Rows) -> None:
        assert acquire_thread(rows, ("", "t"), lease(2)) == 2

    late = saver.with_lease(lease(1))
    with executed(database_url, claim, how=how) as transaction:
        putting = asyncio.create_task(put(late, step=1))
        await is_waiting(database_url, putting)
        await asyncio.to_thread(transaction.end, end)
        if end == "committed":
            with pytest.raises(FencedError):
                await putting
        else:
            await putting
    assert steps(database_url) == ([0] if end == "committed" else [0, 1])
    (thread,) = read_rows(database_url, threads)
    assert thread.token == (2 if end == "committed" else 1)


async def test_claim_that_waits_too_long_for_a_put_fails_by_name_and_changes_nothing(
    saver: Saver, database_url: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_LEASE", "1")
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    with executed(database_url, execute_put, how=how) as transaction:
        async with open_checkpointer(database_url) as impatient:
            with pytest.raises(StoreUnavailableError) as raised:
                await impatient.acquire(lease(2))
            assert raised.value.outcome in {"contended", "not_written"}
            await asyncio.to_thread(transaction.end, "committed")
            assert steps(database_url) == [0, 1]
            assert await impatient.acquire(lease(2)) == 2


@pytest.mark.parametrize("verb", ["put", "put_writes", "release", "delete"])
async def test_write_that_waits_too_long_for_a_claim_fails_by_name_and_changes_nothing(
    saver: Saver, database_url: str, how: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("AGENTFLOW_LEASE", "1")
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    before = read_thread_rows(database_url, checkpoints, ["t"])

    def claim(_session: Session, rows: Rows) -> None:
        acquire_thread(rows, ("", "t"), lease(2))

    async with open_checkpointer(database_url) as opened:
        impatient = opened.with_lease(lease(1))
        found = await impatient.aget_tuple(THREAD)
        assert found is not None
        with executed(database_url, claim, how=how) as transaction:
            with pytest.raises(StoreUnavailableError) as raised:
                if verb == "put":
                    await put(impatient, step=1)
                elif verb == "put_writes":
                    await impatient.aput_writes(found.config, [("log", ["late"])], "late")
                elif verb == "release":
                    await impatient.release(lease(1))
                else:
                    await impatient.adelete_thread("t")
            assert raised.value.outcome in {"contended", "not_written"}
            await asyncio.to_thread(transaction.end, "rolled-back")
    assert read_thread_rows(database_url, checkpoints, ["t"]) == before
