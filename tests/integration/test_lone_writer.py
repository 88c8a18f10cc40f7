"""A run that is alone is written by its own thread, and so is a file read, unless it would wait."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import open_checkpointer
from agentflow.checkpoint.base import Saver
from agentflow.database.writer import GroupCommitWriter, Operation
from agentflow.errors import StoreUnavailableError
from agentflow.failpoints import arm, disarm
from tests.proxy import Proxy
from tests.servers import PostgresServer

ENOUGH = 8
"""After so many checkpoints of one thread nobody else is expected."""


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every commit for a quick one, however busy the machine is."""
    monkeypatch.setattr("agentflow.database.pace._LIMIT", 60.0)


@pytest.fixture
def writers() -> list[int]:
    """The threads that have committed, one after the other."""
    idents: list[int] = []
    arm("database.after_commit", lambda: idents.append(threading.get_ident()))
    return idents


async def put(saver: Saver, number: int, thread: str = "t") -> RunnableConfig:
    """Put a checkpoint behind the one before it."""
    place: RunnableConfig = {
        "configurable": {
            "thread_id": thread,
            "checkpoint_ns": "",
            "checkpoint_id": f"c{number - 1:03}" if number else None,
        }
    }
    made: Any = {
        **empty_checkpoint(),
        "id": f"c{number:03}",
        "channel_values": {"n": number},
        "channel_versions": {"n": f"{number}"},
    }
    # As LangGraph does: the writes are accepted, and the checkpoint does not wait for them.
    accepted = (
        [asyncio.ensure_future(saver.aput_writes(place, [("n", number)], f"task-{number}"))]
        if number
        else []
    )
    saved = await saver.aput(place, made, {"source": "loop", "step": number}, {"n": f"{number}"})
    await asyncio.gather(*accepted)
    return saved


@pytest.mark.parametrize("before", [1, ENOUGH], ids=["in the writer's thread", "in its own"])
async def test_writes_that_were_stored_with_their_successor_are_not_stored_behind_it(
    database_url: str, before: int
) -> None:
    """The reply to their commit is lost, and both are sent again."""
    async with open_checkpointer(database_url) as saver:
        for number in range(before):
            await put(saver, number)

        def lose() -> None:
            disarm()
            raise StoreUnavailableError("the database", "the reply is lost", "unknown")

        arm("database.after_commit", lose)
        await put(saver, before)
        assert await ids(saver) == [f"c{number:03}" for number in range(before + 1)]
        rows = sa.text("SELECT count(*) FROM agentflow_writes")
        assert await saver._database.read(lambda each: each.execute(rows).scalar()) == 0
        parent: RunnableConfig = {
            "configurable": {"thread_id": "t", "checkpoint_id": f"c{before - 1:03}"}
        }
        found = await saver.aget_tuple(parent)
        assert found is not None
        assert found.pending_writes == [(f"task-{before}", "n", before)]


async def test_writes_that_come_again_with_what_was_there_before_them_are_stored(
    database_url: str,
) -> None:
    """A checkpoint that is put twice says nothing of what is written in between."""
    async with open_checkpointer(database_url) as saver:
        parent = await put(saver, 0)
        again: Any = ({**empty_checkpoint(), "id": "c001"}, {"source": "loop", "step": 1}, {})
        await saver.aput(parent, *again)

        def fail() -> None:
            disarm()
            raise StoreUnavailableError("the database", "it was not asked", "unknown")

        arm("database.before_commit", fail)
        written = asyncio.ensure_future(saver.aput_writes(parent, [("n", 2)], "task-2"))
        await saver.aput(parent, *again)
        await written
        found = await saver.aget_tuple(parent)
        assert found is not None
        assert found.pending_writes == [("task-2", "n", 2)]


async def ids(saver: Saver) -> list[str]:
    """List the checkpoints, the oldest first."""
    place: RunnableConfig = {"configurable": {"thread_id": "t"}}
    return sorted([each.checkpoint["id"] async for each in saver.alist(place)])


async def test_lone_run_is_written_in_its_own_thread(database_url: str, writers: list[int]) -> None:
    async with open_checkpointer(database_url) as saver:
        for number in range(ENOUGH):
            await put(saver, number)
        writers.clear()
        await put(saver, ENOUGH)
        assert set(writers) == {threading.get_ident()}
        assert await ids(saver) == [f"c{number:03}" for number in range(ENOUGH + 1)]


async def test_runs_in_company_are_written_by_the_writer(
    database_url: str, writers: list[int]
) -> None:
    async with open_checkpointer(database_url) as saver:
        for number in range(ENOUGH):
            await asyncio.gather(put(saver, number, "t"), put(saver, number, "u"))
    assert threading.get_ident() not in writers


async def test_event_loop_goes_on_while_another_process_holds_the_file(
    tmp_path: Path, writers: list[int]
) -> None:
    async with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
        for number in range(ENOUGH):
            await put(saver, number)
        writers.clear()
        with contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as rival:
            rival.execute("BEGIN IMMEDIATE")
            waiting = asyncio.ensure_future(put(saver, ENOUGH))
            # Only a loop that goes on comes to this.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
            rival.execute("ROLLBACK")
        await waiting
        assert threading.get_ident() not in writers
        assert (await ids(saver))[-1] == f"c{ENOUGH:03}"


async def test_event_loop_goes_on_while_the_server_is_silent(
    postgres_url: str, postgres_server: PostgresServer, writers: list[int]
) -> None:
    with Proxy(postgres_server.port) as proxy:
        async with open_checkpointer(proxy.url(postgres_url)) as saver:
            for number in range(ENOUGH):
                await put(saver, number)
            writers.clear()
            await asyncio.to_thread(proxy.swallow)
            waiting = asyncio.ensure_future(put(saver, ENOUGH))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
            await asyncio.to_thread(proxy.heal)
            await waiting
            assert threading.get_ident() not in writers
            assert await ids(saver) == [f"c{number:03}" for number in range(ENOUGH + 1)]


async def test_what_was_committed_here_but_not_answered_is_there_once(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    with Proxy(postgres_server.port) as proxy:
        async with open_checkpointer(proxy.url(postgres_url)) as saver:
            for number in range(ENOUGH):
                await put(saver, number)
            lost = await asyncio.to_thread(proxy.lose_reply, 1)
            waiting = asyncio.ensure_future(put(saver, ENOUGH))
            assert await asyncio.wrap_future(lost)
            await asyncio.to_thread(proxy.heal)
            await waiting
            await put(saver, ENOUGH + 1)
            assert await ids(saver) == [f"c{number:03}" for number in range(ENOUGH + 2)]


async def test_interrupted_commit_is_finished_by_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transact = GroupCommitWriter._transact
    interrupted: list[int] = []

    def once(self: GroupCommitWriter, batch: Sequence[Operation], *, is_patient: bool) -> list[Any]:
        outcomes = transact(self, batch, is_patient=is_patient)
        if not is_patient and not interrupted:
            interrupted.append(len(batch))
            raise KeyboardInterrupt
        return outcomes

    with (
        open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver,
        ThreadPoolExecutor(1) as pool,
    ):

        async def one(number: int) -> None:
            await put(saver, number)

        def run(number: int) -> None:
            asyncio.run(one(number))

        for number in range(ENOUGH):
            pool.submit(run, number).result()
        monkeypatch.setattr(GroupCommitWriter, "_transact", once)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(run, ENOUGH).result()
        assert interrupted
        pool.submit(run, ENOUGH + 1).result()
        assert await ids(saver) == [f"c{number:03}" for number in range(ENOUGH + 2)]


def watch_readers(saver: Saver, monkeypatch: pytest.MonkeyPatch, readers: list[int]) -> None:
    """Note in which threads connections for queries are used."""
    connections = saver._database._connections
    for way in (connections.glancing, connections.reading):

        def watched(way: Any = way) -> Any:
            readers.append(threading.get_ident())
            return way()

        monkeypatch.setattr(connections, way.__name__, watched)


async def test_file_is_read_in_the_thread_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[int] = []
    async with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
        head = await put(saver, 0)
        watch_readers(saver, monkeypatch, readers)
        assert await saver.aget_tuple(head) is not None
    assert readers == [threading.get_ident()]


async def test_slow_file_is_read_in_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow.database.pace._LIMIT", 0.0)
    readers: list[int] = []
    async with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
        head = await put(saver, 0)
        watch_readers(saver, monkeypatch, readers)
        for _ in range(5):
            assert await saver.aget_tuple(head) is not None
    assert readers[0] == threading.get_ident() != readers[-1]


def test_slow_file_is_written_by_a_thread_that_would_wait_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: list[int]
) -> None:
    monkeypatch.setattr("agentflow.database.pace._LIMIT", 0.0)
    with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
        config: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        for number in range(3 * ENOUGH):
            checkpoint = {**empty_checkpoint(), "id": f"{number:04}"}
            config = saver.put(config, checkpoint, {}, {})  # type: ignore[arg-type]  # it is one
    assert set(writers[ENOUGH:]) == {threading.get_ident()}
