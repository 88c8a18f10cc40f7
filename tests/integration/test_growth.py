"""What a step stores, and how many statements it takes, does not grow with the steps before it."""

from __future__ import annotations

import gc
import sqlite3
import weakref
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command

from agentflow.checkpoint import open_checkpointer
from agentflow.database.tables import metadata
from agentflow.keys import KeyRing
from agentflow.testing.savers.calls import put

STEPS = 150
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


def run(path: Path, steps: int, keys: KeyRing | None) -> tuple[int, int, Counter[str]]:
    """Return the rows and bytes that a run stores, and the statements that it takes, by verb."""
    statements: Counter[str] = Counter()
    with open_checkpointer(f"sqlite:///{path}", keys=keys) as saver:

        @sa.event.listens_for(saver._database._connections.engine, "connect")
        def _trace(connection: sqlite3.Connection, _: Any) -> None:
            connection.set_trace_callback(lambda sql: statements.update([sql.split()[0].upper()]))

        graph = talk(steps).compile(checkpointer=saver)
        config: Any = {"configurable": {"thread_id": "t"}, "recursion_limit": 10 * STEPS}
        graph.invoke({"messages": []}, config, durability="sync")
    rows = stored = 0
    with closing(sqlite3.connect(path)) as connection:
        for table in sorted({table for table, _ in COLUMNS}):
            ((count,),) = connection.execute(f"SELECT count(*) FROM {table}")
            rows += count
        for table, column in COLUMNS:
            ((size,),) = connection.execute(f"SELECT sum(length({column})) FROM {table}")
            stored += size or 0
    return rows, stored, statements


@pytest.mark.parametrize("keys", [None, KeyRing({"k": bytes(32)})], ids=["plain", "encrypted"])
def test_twice_the_steps_store_twice_as_much(tmp_path: Path, keys: KeyRing | None) -> None:
    rows, stored, statements = run(tmp_path / "once.db", STEPS, keys)
    more_rows, more_stored, more_statements = run(tmp_path / "twice.db", 2 * STEPS, keys)
    assert more_stored <= 2.1 * stored
    assert more_rows <= 2.1 * rows
    assert more_statements.total() <= 2.1 * statements.total()


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
