"""How checkpointers share a database: its locks, its number of queries, its limits on text.

In each pair the first test shows the defect on LangGraph's own checkpointer; if it fails, the
defect was mended there. The second one shows what agentflow's checkpointer makes of it.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import InvalidInputError
from tests.fault.forkserver import ForkServer
from tests.integration.graphs import chain, logs


def at(checkpoint_id: str | None = None, *, thread: str = "t", ns: str = "") -> RunnableConfig:
    """Name a place."""
    named = {"checkpoint_id": checkpoint_id} if checkpoint_id else {}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, **named}}


def checkpoint(checkpoint_id: str, **values: Any) -> Checkpoint:
    """Make a checkpoint with these channels."""
    versions: Any = dict.fromkeys(values, checkpoint_id)
    made: Checkpoint = {**empty_checkpoint(), "id": checkpoint_id}
    return {**made, "channel_values": values, "channel_versions": versions}


def put(
    saver: BaseCheckpointSaver[Any],
    checkpoint_id: str,
    parent: str | None = None,
    *,
    thread: str = "t",
    ns: str = "",
    **values: Any,
) -> None:
    """Put a checkpoint."""
    made = checkpoint(checkpoint_id, **values)
    saver.put(at(parent, thread=thread, ns=ns), made, {}, made["channel_versions"])


@contextmanager
def writer_on(path: Path) -> Iterator[sqlite3.Connection]:
    """Be another process in the middle of writing to a SQLite file."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_langgraph_finds_a_new_file_locked_however_patient_it_is(tmp_path: Path) -> None:
    # https://github.com/langchain-ai/langgraph/issues/8136
    path = tmp_path / "new.db"
    with (
        writer_on(path),
        SqliteSaver.from_conn_string(str(path)) as saver,
        # The driver would wait for five seconds, but not before the file is in WAL mode.
        pytest.raises(sqlite3.OperationalError, match="database is locked"),
    ):
        put(saver, "1")


def test_new_file_that_another_process_writes_is_waited_for(sqlite_url: str) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with (
        writer_on(path) as other,
        open_checkpointer(sqlite_url) as saver,
        ThreadPoolExecutor() as pool,
    ):
        written = pool.submit(put, saver, "1")
        other.execute("COMMIT")
        written.result()
        assert saver.get_tuple(at()) is not None


def turns(url: str, thread: str, count: int) -> Any:
    """Advance a thread by so many turns; return its log."""
    with open_checkpointer(url) as saver:
        graph = chain(("a", logs("a")), ("b", logs("b"))).compile(checkpointer=saver)
        for turn in range(count):
            result = graph.invoke({"log": [turn]}, {"configurable": {"thread_id": thread}})
    return result["log"]


@pytest.mark.slow
def test_many_checkpointers_write_one_file(sqlite_url: str) -> None:
    # https://github.com/langchain-ai/langgraph/issues/8136
    together = threading.Barrier(8)

    def work(thread: str) -> Any:
        together.wait()
        return turns(sqlite_url, thread, 3)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(work, "abcdefgh"))
    assert outcomes == [[0, "a", "b", 1, "a", "b", 2, "a", "b"]] * 8


@pytest.mark.slow
def test_many_processes_write_one_file(sqlite_url: str, forkserver: ForkServer) -> None:
    victims = [
        forkserver.spawn("tests.integration.test_langgraph_issues_database:turns", *args)
        for args in [(sqlite_url, thread, 3) for thread in "abcd"]
    ]
    assert [victim.wait(60) for victim in victims] == [0] * 4
    with open_checkpointer(sqlite_url) as saver:
        for thread in "abcd":
            found = saver.get_tuple(at(thread=thread))
            assert found is not None
            assert len(found.checkpoint["channel_values"]["log"]) == 9


async def test_langgraph_lets_a_paused_listing_block_every_write() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8558
    async with AsyncSqliteSaver.from_conn_string(":memory:") as saver:
        for name in ("1", "2"):
            await saver.aput(at(), checkpoint(name), {}, {})
        listing = saver.alist(at())
        await anext(listing)
        # It cannot succeed before the listing goes on, so that it is the limit that ends it.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await saver.aput(at(), checkpoint("3"), {}, {})
        assert [each.checkpoint["id"] async for each in listing] == ["1"]
        await saver.aput(at(), checkpoint("3"), {}, {})


async def test_paused_listing_blocks_nothing(saver: Saver) -> None:
    await saver.aput(at(), checkpoint("1"), {}, {})
    await saver.aput(at("1"), checkpoint("2"), {}, {})
    listing, blocking = saver.alist(at()), saver.list(at())
    await anext(listing)
    next(blocking)
    await saver.aput(at("2"), checkpoint("3"), {}, {})
    saver.put(at("3"), checkpoint("4"), {}, {})
    await saver.aput_writes(at("4"), [("x", 1)], "task")
    assert [each.checkpoint["id"] async for each in listing] == ["1"]
    assert [each.checkpoint["id"] for each in blocking] == ["1"]


class Statements:
    """Counts what is sent to a database, below whatever sends it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        connect = sqlite3.connect

        def traced(*args: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, **options)
            connection.set_trace_callback(self._note)
            return connection

        for module in (sqlite3, sqlite3.dbapi2):
            monkeypatch.setattr(module, "connect", traced)
        execute = psycopg.Cursor.execute

        def counted(cursor: Any, *args: Any, **options: Any) -> Any:
            self._note(None)
            return execute(cursor, *args, **options)

        monkeypatch.setattr(psycopg.Cursor, "execute", counted)

    def _note(self, _: Any) -> None:
        self.count += 1


def statements_to_list(saver: BaseCheckpointSaver[Any], counter: Statements, rows: int) -> int:
    """Save so many checkpoints, each with a write; count what listing them takes."""
    parent = None
    for number in range(rows):
        name = f"{number:03}"
        put(saver, name, parent, x=number)
        saver.put_writes(at(name), [("x", number)], "task")
        parent = name
    before = counter.count
    assert len([each for each in saver.list(at()) if each.pending_writes]) == rows
    return counter.count - before


def test_langgraph_asks_once_more_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # https://github.com/langchain-ai/langgraph/issues/7263
    counts = []
    counter = Statements(monkeypatch)
    for rows in (10, 40):
        with SqliteSaver.from_conn_string(":memory:") as saver:
            counts.append(statements_to_list(saver, counter, rows))
    assert counts[1] - counts[0] == 30


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Statements:
    """Counts statements from before the checkpointer connects."""
    return Statements(monkeypatch)


async def test_listing_takes_as_many_queries_for_many_rows_as_for_few(
    counter: Statements, saver: Saver
) -> None:
    few = statements_to_list(saver, counter, 10)
    saver.delete_thread("t")
    many = statements_to_list(saver, counter, 40)
    assert few > 0
    assert many - few < 30 / 10, "at most another page"


RANDOM = random.Random(1)
LONG = "".join(RANDOM.choices("0123456789abcdef", k=4000))
"""Long, and not to be compressed below what an index of PostgreSQL can hold."""


@pytest.fixture
def langgraph_saver(postgres_url: str) -> Iterator[PostgresSaver]:
    """LangGraph's own checkpointer on PostgreSQL."""
    with PostgresSaver.from_conn_string(postgres_url) as saver:
        saver.setup()
        yield saver


def test_langgraph_fails_on_a_long_thread_id_in_the_database(
    langgraph_saver: PostgresSaver,
) -> None:
    # https://github.com/langchain-ai/langgraph/issues/6239
    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="index row size"):
        put(langgraph_saver, "1", thread=LONG)


def test_langgraph_fails_on_nul_in_a_text(langgraph_saver: PostgresSaver) -> None:
    with pytest.raises(psycopg.errors.UntranslatableCharacter):
        put(langgraph_saver, "1", x="a\x00b")
    with pytest.raises(psycopg.DataError, match="NUL"):
        put(langgraph_saver, "1", thread="a\x00b")


async def test_any_text_can_be_a_value_a_channel_and_metadata(saver: Saver) -> None:
    odd = ["a\x00b", "\ud800", "\U0001f600", LONG]
    values = {"text": odd[0], "texts": odd, "c\x00": 1, LONG: 2}
    made = checkpoint("1", **values)
    metadata: Any = {"note": "x\x00y", "key\x00": odd}
    saver.put(at(), made, metadata, made["channel_versions"])
    saver.put_writes(at("1"), [("w\x00", odd)], "task", "~path")
    found = saver.get_tuple(at())
    assert found is not None
    assert found.checkpoint["channel_values"] == values
    assert found.pending_writes == [("task", "w\x00", odd)]


Use = Callable[[Saver, str], object]
USES: dict[str, Use] = {
    "thread": lambda saver, odd: put(saver, "1", thread=odd, x=1),
    "namespace": lambda saver, odd: put(saver, "1", ns=odd, x=1),
    "checkpoint": lambda saver, odd: put(saver, odd, x=1),
    "parent": lambda saver, odd: put(saver, "1", odd, x=1),
    "task": lambda saver, odd: saver.put_writes(at("1", thread="of task"), [("x", 1)], odd),
    "path": lambda saver, odd: saver.put_writes(at("1", thread="of path"), [("x", 1)], "a", odd),
    "read": lambda saver, odd: saver.get_tuple(at(odd, thread=odd, ns=odd)),
    "list": lambda saver, odd: list(saver.list(at(thread=odd), before=at(odd))),
    "delete": lambda saver, odd: saver.delete_thread(odd),
}


@pytest.mark.parametrize("odd", ["a\x00b", "\ud800", LONG], ids=["nul", "surrogate", "long"])
async def test_odd_id_is_used_or_refused_by_name(saver: Saver, odd: str) -> None:
    # https://github.com/langchain-ai/langgraph/issues/6239
    problems = {}
    for name, use in USES.items():
        try:
            use(saver, odd)
        except InvalidInputError:
            pass  # fine
        except Exception as error:  # noqa: BLE001 -- the driver's, or one that says to try again
            problems[name] = type(error).__name__
        put(saver, name, thread=f"other {name}", x=1)
        assert saver.get_tuple(at(thread=f"other {name}")), "it has spoiled nothing for others"
    assert problems == {}


async def test_ids_that_are_almost_equal_are_different(saver: Saver) -> None:
    names = ["a", "A", "a ", " a", "ä", "a\u0308", "a%", "a_", "a|b", "a:b", ""]
    for name in names:
        put(saver, "1", thread=f"t{name}", x=name)
    for name in names:
        found = saver.get_tuple(at(thread=f"t{name}"))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"x": name}
    saver.delete_thread("ta")
    assert len(list(saver.list(None))) == len(names) - 1


async def test_thread_id_that_is_a_number_is_its_text(saver: Saver) -> None:
    put(saver, "1", thread=7, x=1)  # type: ignore[arg-type]  # as LangGraph's own tolerate it
    for same in ("7", 7):
        assert saver.get_tuple(at(thread=same)) is not None  # type: ignore[arg-type]  # as above
