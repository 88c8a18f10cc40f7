"""What a step stores, and how many statements it takes, does not grow with the steps before it."""

from __future__ import annotations

import gc
import random
import sqlite3
import string
import weakref
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command

from agentflow.checkpoint import open_checkpointer
from agentflow.database.tables import metadata
from agentflow.keys import KeyRing
from agentflow.testing.savers.calls import put
from tests.fault.scene import connected

STEPS = 150
MOST_BYTES = 800
MOST_STATEMENTS = {"sqlite": 25, "postgresql": 2}
COLUMNS = [
    (table.name, column.name)
    for table in metadata.sorted_tables
    if "thread" in table.c
    for column in table.c
    if isinstance(column.type, sa.LargeBinary)
]
"""Every column in which the checkpointer keeps payloads."""


def talk(steps: int) -> StateGraph[Any, Any, Any, Any]:
    """Build a graph that says one message in each of so many steps."""

    def say(state: MessagesState) -> Command[str]:
        said = len(state["messages"])
        message = AIMessage(f"message {said}: " + "one two three " * 20, id=f"said-{said}")
        return Command(update={"messages": [message]}, goto="say" if said + 1 < steps else END)

    builder: StateGraph[Any, Any, Any, Any] = StateGraph(MessagesState)
    builder.add_node("say", say)
    builder.add_edge(START, "say")
    return builder


def run(url: str, steps: int, keys: KeyRing | None = None) -> tuple[int, int, int]:
    """Return the rows and bytes that a run stores, and the statements that it takes."""
    statements: list[str] = []
    execute = psycopg.Cursor.execute

    def noted(cursor: psycopg.Cursor[Any], query: Any, *args: Any, **options: Any) -> Any:
        statements.append(query)
        return execute(cursor, query, *args, **options)

    with open_checkpointer(url, keys=keys) as saver, pytest.MonkeyPatch.context() as patched:
        patched.setattr(psycopg.Cursor, "execute", noted)

        @sa.event.listens_for(saver._database._connections.engine, "connect")
        def _trace(connection: Any, _: Any) -> None:
            if isinstance(connection, sqlite3.Connection):
                # What its triggers do, too.
                connection.set_trace_callback(statements.append)

        graph = talk(steps).compile(checkpointer=saver)
        config: Any = {"configurable": {"thread_id": "t"}, "recursion_limit": 10 * STEPS}
        graph.invoke({"messages": []}, config, durability="sync")
    rows = stored = 0
    with connected(url) as connection:
        for table in sorted({table for table, _ in COLUMNS}):
            rows += connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()
        for table, column in COLUMNS:
            size = sa.text(f"SELECT sum(length({column})) FROM {table}")
            stored += connection.execute(size).scalar_one() or 0
    return rows, stored, len(statements)


@pytest.mark.parametrize("keys", [None, KeyRing({"k": bytes(32)})], ids=["plain", "encrypted"])
def test_twice_the_steps_store_twice_as_much(tmp_path: Path, keys: KeyRing | None) -> None:
    rows, stored, statements = run(f"sqlite:///{tmp_path}/once.db", STEPS, keys)
    more_rows, more_stored, more_statements = run(f"sqlite:///{tmp_path}/twice.db", 2 * STEPS, keys)
    assert more_stored <= 2.1 * stored
    assert more_rows <= 2.1 * rows
    assert more_statements <= 2.1 * statements


def test_each_checkpoint_costs_so_many_bytes_and_statements(database_url: str) -> None:
    """A message of about 300 bytes, and what is put together anew after every sixteenth."""
    _, stored, statements = run(database_url, STEPS)
    assert stored / (STEPS + 2) <= MOST_BYTES
    assert statements / (STEPS + 2) <= MOST_STATEMENTS[sa.make_url(database_url).get_dialect().name]


async def test_files_of_a_chat_are_not_much_more_than_its_messages(tmp_path: Path) -> None:
    drawn = random.Random(1)
    words = ["".join(drawn.choices(string.ascii_lowercase, k=2 + i % 7)) for i in range(300)]
    texts = [" ".join(drawn.choices(words, k=250))[:1000] for _ in range(200)]

    def reply(state: MessagesState) -> dict[str, Any]:
        said = len(state["messages"])
        return {"messages": [AIMessage(texts[said], id=f"said-{said}")]}

    builder = StateGraph(MessagesState)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:
        graph = builder.compile(checkpointer=saver)
        config: Any = {"configurable": {"thread_id": "t"}}
        for text in texts[::2]:
            await graph.ainvoke({"messages": [HumanMessage(text)]}, config, durability="sync")
    size = _size(tmp_path)
    assert size <= 3 * sum(map(len, texts)), size


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_lists_of_threads_that_have_ended_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentflow.checkpoint.encoding._KNOWN_BYTES", 100_000)
    made = []
    with open_checkpointer("memory://") as saver:
        for number in range(30):
            message = AIMessage("x" * 10_000)
            made.append(weakref.ref(message))
            put(saver, "c1", thread=f"t{number}", changed=[message])
            del message
        gc.collect()
        assert 0 < sum(message() is not None for message in made) < 10
