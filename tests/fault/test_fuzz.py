"""Whatever is done to stored checkpoints: what is read is what was saved, or a named error.

Each case changes the rows of a SQLite database behind agentflow's back, reads everything, and puts
the rows back. What is read under a checkpoint's id equals what is read of its twin, the untouched
database, or is refused by name; and no change is left that neither a reader nor `verify` names.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
import sqlalchemy as sa
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.audit import Scope, audit_group
from agentflow.checkpoint.sql import open_rows
from agentflow.codec import Codec
from agentflow.database.session import Session
from agentflow.errors import AgentflowError, CodecError
from agentflow.keys import KeyRing
from agentflow.testing.savers.graphs import DeltaState
from agentflow.testing.savers.graphs import chain as delta_chain
from tests.fault.conftest import Sampler, Tally
from tests.integration.sealed import OF_RUNS, open_app, read_payloads, read_rows, ring
from tests.integration.sealed import fill as fill_runs

_CASES, _ALL_CASES = 500, 50_000
"""Of each of the two databases, one of them encrypted."""
_RUN_CASES, _ALL_RUN_CASES = 500, 5_000
_TENANTS = ("", "acme")
_WITH_DELTAS = ("deltas", "pruned")
_TEXT = "a text that is too long for the row of each checkpoint; " * 4
_TABLES = ("checkpoints", "values", "writes", "anchors")

Row = dict[str, Any]
Rows = list[Row]


class State(TypedDict):
    """Messages, a value that stays, and one that changes."""

    messages: Annotated[list[Any], add_messages]
    facts: dict[str, Any]
    count: int


def talks() -> StateGraph[Any, Any, Any, Any]:
    """Build a graph with a subgraph that keeps its own history."""

    def say(state: State) -> dict[str, Any]:
        count = state["count"] + 1
        return {"messages": [AIMessage(f"{count}: {_TEXT}", id=f"said-{count}")], "count": count}

    def learn(state: State) -> dict[str, Any]:
        return {"facts": {"text": f"{state['count']} {_TEXT * 3}"}}

    inner: StateGraph[Any, Any, Any, Any] = StateGraph(State)
    inner.add_node("learn", learn)
    inner.add_edge(START, "learn")
    outer: StateGraph[Any, Any, Any, Any] = StateGraph(State)
    outer.add_node("say", say)
    outer.add_node("inner", inner.compile(checkpointer=True))
    outer.add_node("again", say)
    outer.add_edge(START, "say")
    outer.add_edge("say", "inner")
    outer.add_edge("inner", "again")
    outer.add_edge("again", END)
    return outer


def fill(url: str, keys: KeyRing | None) -> None:
    """Store threads of two tenants under the same names, with forks, deltas and pruned ones."""
    for tenant in _TENANTS:
        with open_checkpointer(url, tenant=tenant, keys=keys) as saver:
            graph = talks().compile(checkpointer=saver, interrupt_before=["again"])
            for thread in ("one", "two"):
                config: Any = {"configurable": {"thread_id": thread}}
                for turn in range(2):
                    asked = HumanMessage(f"{tenant} {thread} {turn}", id=f"asked-{turn}")
                    graph.invoke({"messages": [asked], "count": 10 * turn}, config)
                    graph.invoke(None, config)
                history = list(graph.get_state_history(config))
                graph.update_state(history[3].config, {"count": 99})
            nodes = [(name, lambda _: {"log": [_TEXT], "notes": {"last": "x"}}) for name in "abc"]
            deltas = delta_chain(*nodes, state=DeltaState).compile(checkpointer=saver)
            for thread in ("deltas", "pruned"):
                deltas.invoke({"log": ["0"]}, {"configurable": {"thread_id": thread}})
            saver.prune(["pruned"])


class Tables:
    """The tables of a database, changed and put right again."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)

    def rows(self, table: str) -> Rows:
        found = self.connection.execute(
            f"SELECT rowid AS rowid, * FROM agentflow_{table} ORDER BY rowid"
        )
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found]

    @contextmanager
    def changed(self, table: str, before: Rows, after: Rows) -> Iterator[None]:
        """Put some rows in the place of others, and these back afterwards."""
        self._replace(table, before, after)
        try:
            yield
        finally:
            self._replace(table, after, before)

    def _replace(self, table: str, old: Rows, new: Rows) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        for row in old:
            self.connection.execute(
                f"DELETE FROM agentflow_{table} WHERE rowid = ?", [row["rowid"]]
            )
        for row in new:
            names = ", ".join(row)
            marks = ", ".join("?" * len(row))
            self.connection.execute(
                f"INSERT INTO agentflow_{table} ({names}) VALUES ({marks})", [*row.values()]
            )
        self.connection.execute("COMMIT")


class Database(Tables):
    """Checkpoints that are changed, read and put right again."""

    def __init__(self, path: Path, savers: Sequence[Saver], keys: KeyRing | None) -> None:
        super().__init__(path)
        self.savers = savers
        self._codec = Codec(keys=keys)
        query = "SELECT id, tenant, thread_id FROM agentflow_threads"
        self.threads = {row[0]: row[1:] for row in self.connection.execute(query)}
        self.twin = self.read_all()

    def damages(self) -> list[str]:
        """Return what `agentflow checkpoint verify` names."""
        rows = open_rows(Session(self.connection, "sqlite"))
        audited = audit_group(rows, self._codec, Scope(), -1, lambda _: None)
        return [damage.error for damage in audited.damages]

    def read_all(self) -> dict[Any, Any]:
        """Read each checkpoint of each thread by its id, and the head of each namespace."""
        found: dict[Any, Any] = {}
        for number, saver in enumerate(self.savers):
            for item in saver.list(None):
                found[self._key(number, item)] = (*shown(item), self._history(saver, item.config))
        return found

    def _history(self, saver: Saver, config: Any) -> Any:
        """Read what delta channels have had, of the threads that have such."""
        if config["configurable"]["thread_id"] not in _WITH_DELTAS:
            return {}
        return saver.get_delta_channel_history(config=config, channels=["log", "notes"])

    def _key(self, number: int, item: CheckpointTuple) -> tuple[Any, ...]:
        named = item.config["configurable"]
        return number, named["thread_id"], named["checkpoint_ns"], named["checkpoint_id"]

    def read_each(self, changed: Rows) -> tuple[dict[Any, Any], int]:
        """Read what the twin has of the threads of some rows, checkpoint by checkpoint.

        Returns:
            What was found, and how many were refused.
        """
        numbers = {row["thread"] for row in changed}
        places = {
            (_TENANTS.index(tenant), thread)
            for number, (tenant, thread) in self.threads.items()
            if number in numbers
        }
        found: dict[Any, Any] = {}
        refused = 0
        for key in self.twin:
            if key[:2] not in places:
                continue
            number, thread, ns, checkpoint_id = key
            named = {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
            config: Any = {"configurable": named}
            saver = self.savers[number]
            try:
                item = saver.get_tuple(config)
                history = self._history(saver, config)
            except AgentflowError:
                refused += 1
            else:
                if item is not None:
                    found[key] = (*shown(item), history)
        return found, refused


def shown(item: CheckpointTuple) -> Any:
    """Return what a reader gets, without what is made at each load."""
    parent = (item.parent_config or {}).get("configurable", {}).get("checkpoint_id")
    return item.checkpoint, item.metadata, parent, item.pending_writes


def fits(found: Any, twin: Any) -> bool:
    """Whether a checkpoint is what was saved; writes may be missing, as before they were made."""
    *own, writes, history = found
    pairs = [(writes, twin[-2])]
    for channel, past in history.items():
        own.append(past.get("seed"))
        pairs.append((past["writes"], twin[-1][channel]["writes"]))
    expected = [*twin[:3], *(past.get("seed") for past in twin[-1].values())]
    return own == expected and all(write in all_of for some, all_of in pairs for write in some)


def flip(dice: random.Random, value: Any) -> Any:
    """Change one bit, letter or number."""
    if isinstance(value, bytes):
        changed = bytearray(value)
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        return bytes(changed)
    if isinstance(value, str):
        place = dice.randrange(len(value) + 1)
        return value[:place] + dice.choice("0af~") + value[place + dice.randrange(2) :]
    if isinstance(value, int):
        return value + dice.choice((-1, 1))
    return "0"


def truncate(dice: random.Random, value: Any) -> Any:
    return (
        value[: dice.randrange(len(value))] if isinstance(value, (bytes, str)) and value else None
    )


def extend(dice: random.Random, value: Any) -> Any:
    more = dice.randbytes(dice.randrange(1, 9))
    if isinstance(value, bytes):
        return value + more
    return value + more.hex() if isinstance(value, str) else value


def mutate_column(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    row = dice.choice(rows)
    change: Callable[[random.Random, Any], Any] = dice.choice((flip, truncate, extend))
    return [row], [{**row, column: change(dice, row[column])}]


def swap_column(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    """Swap a column of two rows: of two runs, threads, channels, versions or tenants."""
    one, two = dice.sample(rows, 2)
    return [one, two], [{**one, column: two[column]}, {**two, column: one[column]}]


def copy_column(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    """Put an older row's value in a newer one's place."""
    older, newer = sorted(dice.sample(range(len(rows)), 2))
    return [rows[newer]], [{**rows[newer], column: rows[older][column]}]


def swap_places(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    """Let two rows change their order, with all that they have."""
    del column
    one, two = dice.sample(rows, 2)
    keys = [name for name in ("rowid", "thread", "ns", "seq", "series", "start") if name in one]
    return [one, two], [
        {**one, **{name: two[name] for name in keys}},
        {**two, **{name: one[name] for name in keys}},
    ]


def remove(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    """Cut a chain in the middle, or take away a part of a value, or what an anchor holds."""
    del column
    if "parent_id" in rows[0]:
        # That the last one is gone leaves no trace.
        parents = {(row["thread"], row["ns"], row["parent_id"]) for row in rows}
        rows = [row for row in rows if (row["thread"], row["ns"], row["checkpoint_id"]) in parents]
    return [dice.choice([row for row in rows if row.get("checkpoint_id") != ""])], []


_CHANGES = (mutate_column, mutate_column, mutate_column, swap_column, copy_column, swap_places)
_TRACELESS = "writes"
"""That logged writes are gone shows nowhere."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_changed_rows_are_refused_by_name_and_never_another_value(
    encrypted: bool, tmp_path: Path, sampler: Sampler, tally: Tally
) -> None:
    keys = KeyRing({"k": bytes(range(32))}) if encrypted else None
    path = tmp_path / "fuzzed.db"
    url = f"sqlite:///{path}"
    fill(url, keys)
    savers = [open_checkpointer(url, tenant=tenant, keys=keys) for tenant in _TENANTS]
    dice = sampler.dice()
    counts: Counter[str] = Counter()
    database = Database(path, savers, keys)
    assert len(database.twin) > 50
    with closing(database.connection):
        tables = {table: database.rows(table) for table in _TABLES}
        for case in range(_ALL_CASES if sampler.is_full else _CASES):
            table = dice.choice(_TABLES)
            rows = tables[table]
            column = dice.choice([name for name in rows[0] if name != "rowid"])
            change = dice.choice(_CHANGES if table == _TRACELESS else (*_CHANGES, remove))
            before, after = change(dice, rows, column)
            if before == after:
                counts["unchanged"] += 1
                continue
            story = (case, change.__name__, table, column, before, after)
            try:
                with database.changed(table, before, after):
                    found, refused = database.read_each(before + after)
                    named = refused or database.damages()
            except sqlite3.IntegrityError:
                database.connection.execute("ROLLBACK")
                counts["impossible"] += 1
                continue
            for key, value in found.items():
                assert fits(value, database.twin[key]), story
            assert named, story
            counts["refused" if refused else "verified"] += 1
        assert database.read_all() == database.twin
        assert {table: database.rows(table) for table in _TABLES} == tables
    for saver in savers:
        saver.close()
    tally(**counts)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
async def test_changed_payloads_of_runs_are_refused_by_name(
    encrypted: bool, tmp_path: Path, sampler: Sampler, tally: Tally
) -> None:
    """Those that were moved are in `test_payload_that_is_moved_is_refused`."""
    url = f"sqlite:///{tmp_path}/fuzzed.db"
    dice, refused = sampler.dice(), 0
    engine = sa.create_engine(url)
    async with open_app(url, ring("one") if encrypted else None) as app:
        await fill_runs(app)
        targets = [
            (column, row)
            for column in OF_RUNS
            for row in read_rows(engine, column.table)
            if row._mapping[column] is not None
        ]
        for _ in range(_ALL_RUN_CASES if sampler.is_full else _RUN_CASES):
            column, row = dice.choice(targets)
            whole = row._mapping[column]
            changed = dice.choice((flip, truncate, extend))(dice, whole)
            await read_payloads(app, column.table, row)
            put(engine, column, row, changed)
            with pytest.raises(CodecError):
                await read_payloads(app, column.table, row)
            put(engine, column, row, whole)
            refused += 1
    engine.dispose()
    tally(refused=refused)


def put(engine: sa.Engine, column: sa.Column[Any], row: Any, value: bytes) -> None:
    """Put a value into a row."""
    place = [key == row._mapping[key] for key in column.table.primary_key.columns]
    with engine.begin() as connection:
        connection.execute(sa.update(column.table).where(*place).values({column.name: value}))
