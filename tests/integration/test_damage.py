"""Stored bytes that have changed are never taken for what was saved."""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    empty_checkpoint,
)
from sqlalchemy.engine import Engine

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.database.engine import parse_url
from agentflow.database.tables import anchors, checkpoints, metadata, threads, values
from agentflow.database.writer import Call
from agentflow.errors import AgentflowError
from agentflow.testing.savers.graphs import DeltaState, chain

THREAD: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
PRUNED: RunnableConfig = {"configurable": {"thread_id": "pruned", "checkpoint_ns": ""}}
TEXT = "a text that is too long for the row of each checkpoint; "
SEALED = [
    column
    for table in metadata.sorted_tables
    if "thread" in table.c and table is not anchors
    for column in table.c
    if isinstance(column.type, sa.LargeBinary)
]
"""Every column in which the checkpointer keeps what it reads again.

Anchors are for those who verify a whole database.
"""

Reads = Mapping[str, Callable[[], Any]]


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    """A checkpointer with two threads that have something in each of those columns."""
    with open_checkpointer(database_url) as opened:
        asyncio.run(fill(opened))
        asyncio.run(fill_and_prune(opened))
        yield opened


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow, to damage things with."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


async def fill(saver: Saver) -> None:
    """Put three checkpoints, with writes in each of the places where writes are kept."""
    log = [f"{number}: {TEXT}" for number in range(4)]
    start = changed(saver, empty_checkpoint(), log=log, value={"text": TEXT * 20}, small=1)
    more = changed(saver, start[0], log=[*log, TEXT * 4])
    again = changed(saver, more[0], small=2)
    first = await saver.aput(THREAD, *start)
    await saver.aput_writes(first, [("log", ["in the log"])], "one")
    second, head = at(more[0]["id"]), at(again[0]["id"])
    await together(
        saver,
        # With what supersedes its checkpoint; of the first write only where the list has it.
        lambda: saver.aput_writes(first, [("log", [TEXT * 4]), ("more", TEXT * 20)], "two"),
        lambda: saver.aput(first, *more),
    )
    await together(
        saver,
        # With its checkpoint.
        lambda: saver.aput(second, *again),
        lambda: saver.aput_writes(head, [("small", 3)], "three"),
    )
    await saver.aput_writes(head, [("more", TEXT * 20)], "four")


async def fill_and_prune(saver: Saver) -> None:
    """Run a graph whose values are in writes of its checkpoints, and delete all but the newest."""
    nodes = [(name, lambda _: {"log": [TEXT], "notes": {"last": TEXT}}) for name in "abcde"]
    graph = chain(*nodes, state=DeltaState).compile(checkpointer=saver)
    await graph.ainvoke({"log": ["0"]}, PRUNED, durability="sync")
    await saver.aprune(["pruned"])


def at(checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {**THREAD["configurable"], "checkpoint_id": checkpoint_id}}


def changed(
    saver: Saver, before: Checkpoint, **channels: Any
) -> tuple[Checkpoint, CheckpointMetadata, ChannelVersions]:
    """Make what is put after a checkpoint, with other values for some channels."""
    versions: dict[str, Any] = before["channel_versions"]
    new: ChannelVersions = {
        name: saver.get_next_version(versions.get(name), None) for name in channels
    }
    made: Checkpoint = {
        **empty_checkpoint(),
        "channel_values": {**before["channel_values"], **channels},
        "channel_versions": {**versions, **new},
    }
    return made, {"step": 0}, new


async def together(saver: Saver, *calls: Callable[[], Awaitable[Any]]) -> None:
    """Make calls that become durable in one commit."""
    is_held, go_on = threading.Event(), threading.Event()

    def hold(_: sa.Connection) -> None:
        is_held.set()
        go_on.wait(30)

    saver._database.submit(Call(hold))
    await asyncio.to_thread(is_held.wait, 30)
    made = [asyncio.ensure_future(call()) for call in calls]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*made)


def reads_of(saver: Saver, thread: RunnableConfig) -> Reads:
    """Return everything that reads a thread: its head, each checkpoint, all of them, and deltas."""
    reads: dict[str, Callable[[], Any]] = {
        "head": partial(saver.get_tuple, thread),
        "list": lambda: list(saver.list(thread)),
        "deltas": lambda: saver.get_delta_channel_history(config=thread, channels=["log", "notes"]),
    }
    for found in saver.list(thread):
        reads[found.checkpoint["id"]] = partial(saver.get_tuple, found.config)
    return reads


@contextmanager
def damaged(
    engine: Engine, column: sa.Column[Any], row: sa.Row[Any], position: int, *, by: int = 1
) -> Iterator[None]:
    """Flip bits of a stored byte; afterwards they must be as they were left, and are put right."""
    here = [key == row._mapping[key] for key in column.table.primary_key.columns]
    whole = bytes(row._mapping[column])
    flipped = bytearray(whole)
    flipped[position] ^= by
    for before, after in ((whole, bytes(flipped)), (bytes(flipped), whole)):
        with engine.begin() as connection:
            change = sa.update(column.table).where(*here, column == before)
            assert connection.execute(change.values({column.name: after})).rowcount == 1
        if before == whole:
            yield


def stored(engine: Engine, column: sa.Column[Any]) -> list[sa.Row[Any]]:
    """Return the rows that have something in a column."""
    query = sa.select(*column.table.primary_key.columns, column).where(column.is_not(None))
    with engine.connect() as connection:
        rows: list[sa.Row[Any]] = list(connection.execute(query))
    assert rows, f"nothing is kept in {column}"
    return rows


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("column", SEALED, ids=lambda column: f"{column.table.name}.{column.name}")
def test_flipped_byte_is_refused_and_left_as_it_is(
    saver: Saver, engine: Engine, column: sa.Column[Any]
) -> None:
    """Each read either refuses it by name, or does not need it and finds what was saved."""
    # What opens an envelope is the same for both databases, and the fuzz changes the other bytes.
    stride = 3 if engine.dialect.name == "sqlite" else 11
    reads = {"t": reads_of(saver, THREAD), "pruned": reads_of(saver, PRUNED)}
    whole = {thread: {of: read() for of, read in named.items()} for thread, named in reads.items()}
    names = {row.id: row.thread_id for row in stored(engine, threads.c.thread_id)}
    findings = []
    for row in stored(engine, column):
        thread = names[row.thread]
        for position in range(row.thread % stride, len(row._mapping[column]), stride):
            refused = 0
            with damaged(engine, column, row, position):
                for of, read in reads[thread].items():
                    try:
                        is_same = read() == whole[thread][of]
                    except AgentflowError:
                        refused += 1
                    except Exception as error:  # noqa: BLE001 -- a finding
                        findings.append((row[:-1], position, of, repr(error)))
                    else:
                        if not is_same:
                            findings.append((row[:-1], position, of, "another value"))
            if not refused:
                findings.append((row[:-1], position, "nobody", "refused it"))
    assert findings == []
    for thread, named in reads.items():
        assert {of: read() for of, read in named.items()} == whole[thread]


def test_put_behind_a_damaged_checkpoint_is_refused(
    saver: Saver, engine: Engine, database_url: str
) -> None:
    """By whoever has not read it before, and would carry on what it does not change."""
    head = newest(engine)
    rows = everything(engine)
    for position in range(0, len(head.data), 40):
        with (
            damaged(engine, checkpoints.c.data, head, position),
            open_checkpointer(database_url) as stranger,
        ):
            made: Checkpoint = {**empty_checkpoint(), "channel_versions": {"log": "2"}}
            with pytest.raises(AgentflowError):
                stranger.put(at(head.checkpoint_id), made, {"step": 9}, {})
        assert everything(engine) == rows, position


def newest(engine: Engine) -> Any:
    ours = sa.select(threads.c.id).where(threads.c.thread_id == "t").scalar_subquery()
    query = sa.select(checkpoints).where(checkpoints.c.thread == ours)
    with engine.connect() as connection:
        return connection.execute(query.order_by(checkpoints.c.seq.desc())).first()


def everything(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [
            sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        ]


@pytest.mark.slow
def test_flipped_bit_in_the_length_of_a_large_value_is_refused(
    saver: Saver, engine: Engine
) -> None:
    """It asks for as much memory as it says, if it is believed."""
    text = base64.b64encode(random.Random(1).randbytes(9_000_000)).decode()
    saver.put(THREAD, *changed(saver, empty_checkpoint(), large=text))
    (row,) = [r for r in stored(engine, values.c.data) if len(r.data) > 1_000_000]
    findings = []
    for position, bit in itertools.product(range(4, 12), (0x01, 0x80)):
        with damaged(engine, values.c.data, row, position, by=bit):
            try:
                saver.get_tuple(THREAD)
            except AgentflowError:
                pass
            except Exception as error:  # noqa: BLE001 -- a finding
                findings.append((position, bit, repr(error)))
            else:
                findings.append((position, bit, "not refused"))
    assert findings == []
