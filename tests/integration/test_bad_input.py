"""What cannot be read is named, with its place and what to do; nothing runs or changes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import zstandard
from langchain_core.runnables import RunnableConfig
from langgraph.types import Command
from sqlalchemy.engine import Connection, Engine

from agentflow.checkpoint import Retention, Saver, open_checkpointer
from agentflow.checkpoint import deltas as deltas_module
from agentflow.checkpoint.pending import load_writes
from agentflow.checkpoint.records import Place
from agentflow.database.engine import parse_url
from agentflow.database.tables import checkpoints, metadata, values
from agentflow.errors import (
    CodecError,
    HashMismatchError,
    MissingBlobError,
    StoreDamagedError,
    UnknownVersionError,
)
from agentflow.testing.savers.graphs import DeltaState, Graph, asks, chain
from tests.integration.cli import fresh_cli

TENANT, THREAD = "acme", "asking"
CONFIG: RunnableConfig = {"configurable": {"thread_id": THREAD}}
TEXT = "a text that is too long for the row of each checkpoint; " * 20


class Nodes(list[str]):
    """The nodes that were executed."""

    def graph(self, saver: Saver) -> Graph:
        """Make a graph that stores a value, asks, and ends."""

        def work(_: Any) -> Any:
            self.append("work")
            return {"value": {"text": TEXT}}

        def ask(state: Any) -> Any:
            self.append("ask")
            return asks("ok?")(state)

        return chain(("work", work), ("ask", ask)).compile(checkpointer=saver)


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    """A checkpointer with a thread that waits for an answer."""
    with open_checkpointer(database_url, tenant=TENANT) as opened:
        Nodes().graph(opened).invoke({"log": ["start"]}, CONFIG)
    # Another one, which remembers nothing.
    with open_checkpointer(database_url, tenant=TENANT) as opened:
        yield opened


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow, to damage things with."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


def everything(engine: Engine) -> list[Any]:
    """Read all rows of all tables."""
    with engine.connect() as connection:
        return [
            sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        ]


def head_of(connection: Connection) -> Any:
    return connection.execute(sa.select(checkpoints).order_by(checkpoints.c.seq.desc())).first()


def change_head(connection: Connection, change: Callable[[bytes], bytes]) -> None:
    row = head_of(connection)
    here = sa.update(checkpoints).where(checkpoints.c.seq == row.seq)
    connection.execute(here.values(data=change(row.data)))


def change_value(connection: Connection, change: Callable[[Any], bytes]) -> None:
    row = connection.execute(sa.select(values)).one()
    connection.execute(sa.update(values).values(data=change(row)))


def bomb(row: Any) -> bytes:
    """Make an envelope that is in order, around a frame that claims the size of a disk."""
    frame = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 1 << 50) + b"\x1b\x00\x00\x00"
    header = struct.pack(">BBBBQ", 2, 1, 1, 0, 1_000)
    context = Place(TENANT, THREAD, "").context_of_value(row.series, row.start)
    covered = header + struct.pack(">Q", len(context)) + context + frame
    return header + sha256(covered).digest() + frame


def large_bomb(row: Any) -> bytes:
    """Make one that has a tenth of a gigabyte, and says that it has a thousand bytes."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100_000_000))
    header = struct.pack(">BBBBQ", 2, 1, 1, 0, 1_000)
    context = Place(TENANT, THREAD, "").context_of_value(row.series, row.start)
    covered = header + struct.pack(">Q", len(context)) + context + frame
    return header + sha256(covered).digest() + frame


Damage = tuple[Callable[[Connection], Any], type[CodecError], str, str]
"""How it is done, what comes of it, the channel that is named, and the advice."""
DAMAGES: dict[str, Damage] = {
    "a newer record": (
        lambda c: change_head(c, lambda data: b"\x63" + data[1:]),
        UnknownVersionError,
        "",
        "upgrade agentflow",
    ),
    "a newer value": (
        lambda c: change_value(c, lambda row: b"\x63" + row.data[1:]),
        UnknownVersionError,
        "value",
        "upgrade agentflow",
    ),
    "a record cut short": (
        lambda c: change_head(c, lambda data: data[:-9]),
        HashMismatchError,
        "",
        "restore it from a backup",
    ),
    "a value cut short": (
        lambda c: change_value(c, lambda row: row.data[:40]),
        HashMismatchError,
        "value",
        "restore it from a backup",
    ),
    "a bomb": (
        lambda c: change_value(c, bomb),
        HashMismatchError,
        "value",
        "restore it from a backup",
    ),
    "another bomb": (
        lambda c: change_value(c, large_bomb),
        HashMismatchError,
        "value",
        "restore it from a backup",
    ),
    "a deleted value": (
        lambda c: c.execute(sa.delete(values)),
        MissingBlobError,
        "value",
        "restore it from a backup",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_cannot_be_read_is_named_and_nothing_runs(
    saver: Saver, engine: Engine, case: str
) -> None:
    damage, error, channel, advice = DAMAGES[case]
    with engine.begin() as connection:
        damage(connection)
        head = head_of(connection)
    before, nodes = everything(engine), Nodes()
    graph = nodes.graph(saver)
    calls: list[Callable[[], Any]] = [
        lambda: saver.get_tuple(CONFIG),
        lambda: list(saver.list(CONFIG)),
        lambda: list(saver.list(None, limit=1)),
        lambda: graph.get_state(CONFIG),
        lambda: list(graph.get_state_history(CONFIG)),
        lambda: graph.invoke(Command(resume="yes"), CONFIG),
        lambda: graph.invoke({"log": ["more"]}, CONFIG),
        lambda: graph.update_state(CONFIG, {"log": ["by hand"]}),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        message = str(raised.value)
        for named in (TENANT, THREAD, channel, advice):
            assert named in message
        # What a node wrote is kept once for its own checkpoint and the next one, if both were in
        # the same commit.
        assert head.checkpoint_id in message or head.parent_id in message
        assert TEXT[:20] not in message
    assert nodes == []
    assert everything(engine) == before


def test_checkpoint_of_which_a_value_is_gone_is_not_passed_over_when_it_is_shown(
    saver: Saver, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an older one would be shown as the newest."""
    with engine.begin() as connection:
        connection.execute(sa.delete(values))
    cli = fresh_cli(database_url, monkeypatch)
    for command in (["show", THREAD], ["list"], ["verify"]):
        result = cli("checkpoint", *command, "--tenant", TENANT)
        assert result.code == 1, command
        assert "is incomplete" in result.out + result.err


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9])
def test_database_file_that_is_cut_short_is_named_and_left_alone(
    sqlite_url: str, share: float
) -> None:
    nodes = Nodes()
    threads: list[RunnableConfig] = [
        {"configurable": {"thread_id": f"{THREAD} {number}"}} for number in range(30)
    ]
    with open_checkpointer(sqlite_url, tenant=TENANT) as saver:
        for config in threads:
            Nodes().graph(saver).invoke({"log": [TEXT]}, config)
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    whole = file.read_bytes()
    rest = whole[: int(len(whole) * share)]
    file.write_bytes(rest)
    with open_checkpointer(sqlite_url, tenant=TENANT) as saver:
        graph = nodes.graph(saver)
        calls: list[Callable[[], Any]] = [
            lambda: [saver.get_tuple(config) for config in threads],
            lambda: list(saver.list(None)),
            lambda: [graph.invoke(Command(resume="yes"), config) for config in threads],
        ]
        for call in calls:
            with pytest.raises(StoreDamagedError, match="restore it from a backup"):
                call()
    assert nodes == []
    assert file.read_bytes() == rest


DELTAS: RunnableConfig = {"configurable": {"thread_id": "deltas"}}


def history(saver: Saver) -> Any:
    return saver.get_delta_channel_history(config=DELTAS, channels=["log", "notes"])


@pytest.fixture
def deltas(saver: Saver) -> Graph:
    """A graph on a thread whose newest state is made of the writes of all checkpoints before."""
    nodes = [(name, lambda _, n=name: {"notes": {n: TEXT}, "log": [n]}) for name in "abcdef"]
    graph: Graph = chain(*nodes, state=DeltaState).compile(checkpointer=saver)
    graph.invoke({"log": ["start"]}, DELTAS)
    return graph


def test_history_of_delta_channels_that_is_cut_is_no_value(
    saver: Saver, engine: Engine, deltas: Graph
) -> None:
    """In the middle of a chain that `prune` has cut off at its beginning."""
    before = deltas.get_state(DELTAS).values
    saver.sweep(Retention(keep_last=4), thread_ids=["deltas"])
    assert deltas.get_state(DELTAS).values == before
    rows = [each.config["configurable"]["checkpoint_id"] for each in saver.list(DELTAS)]
    assert len(rows) == 4
    with engine.begin() as connection:
        gone = sa.delete(checkpoints).where(checkpoints.c.checkpoint_id == rows[2])
        assert connection.execute(gone).rowcount == 1
    calls: list[Callable[[], Any]] = [
        lambda: history(saver),
        lambda: deltas.get_state(DELTAS),
        lambda: deltas.invoke({"log": ["more"]}, DELTAS),
    ]
    for call in calls:
        with pytest.raises(HashMismatchError, match="its chain is cut") as raised:
            call()
        for named in (TENANT, "deltas", rows[1], rows[2]):
            assert named in str(raised.value)


def test_history_is_whole_although_what_it_is_made_of_is_pruned_meanwhile(
    saver: Saver, deltas: Graph, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = history(saver)
    pruned: list[bool] = []

    def prune_first(*given: Any) -> Any:
        if not pruned:
            pruned.append(True)
            with open_checkpointer(database_url, tenant=TENANT) as other:
                other.prune(["deltas"])
        return load_writes(*given)

    with monkeypatch.context() as patched:
        patched.setattr(deltas_module, "load_writes", prune_first)
        assert history(saver) == before
    assert pruned
    assert len(list(saver.list(DELTAS))) == 1
    assert history(saver)["log"] == before["log"]
