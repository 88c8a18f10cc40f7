"""Stored bytes that have changed are never taken for what was saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from sqlalchemy.engine import Engine

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.database.engine import parse_url
from agentflow.database.tables import checkpoints, writes
from agentflow.errors import AgentflowError
from tests.integration.graphs import asks, chain, logs

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    """A checkpointer with a thread that waits for an answer."""
    with open_checkpointer(database_url) as opened:
        graph = chain(("a", logs("a")), ("ask", asks("ok?"))).compile(checkpointer=opened)
        graph.invoke({"log": ["0"], "value": {"amount": 10}}, CONFIG)
        yield opened


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow, to damage things with."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


@pytest.mark.slow
@pytest.mark.parametrize(
    "column",
    [checkpoints.c.body, checkpoints.c.metadata, checkpoints.c.channels, writes.c.value],
    ids=lambda column: f"{column.table.name}.{column.name}",
)
def test_flipped_byte_is_refused_and_left_as_it_is(
    saver: Saver, engine: Engine, column: sa.Column[Any]
) -> None:
    whole = saver.get_tuple(CONFIG)
    assert whole is not None
    latest = (
        column.table.c.thread_id == "t",
        column.table.c.checkpoint_id == whole.checkpoint["id"],
    )
    with engine.connect() as connection:
        stored = connection.execute(sa.select(column).where(*latest)).scalars().first()
    assert stored
    unnoticed = []
    for position in range(0, len(stored), 3):
        damaged = bytearray(stored)
        damaged[position] ^= 0x01
        with engine.begin() as connection:
            change = sa.update(column.table).where(*latest, column == stored)
            connection.execute(change.values({column.name: bytes(damaged)}))
        try:
            found = saver.get_tuple(CONFIG)
        except Exception as error:  # noqa: BLE001 -- anything but a named error is a finding
            if not isinstance(error, AgentflowError):
                unnoticed.append((position, repr(error)))
        else:
            unnoticed.append((position, "equal" if found == whole else "another value"))
        with engine.begin() as connection:
            assert connection.execute(sa.select(column).where(*latest)).scalars().first() in {
                bytes(damaged),
                stored,
            }
            back = sa.update(column.table).where(*latest, column == bytes(damaged))
            connection.execute(back.values({column.name: stored}))
    assert unnoticed == []
    assert saver.get_tuple(CONFIG) == whole
