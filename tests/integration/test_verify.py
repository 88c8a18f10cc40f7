"""Verification finds nothing where nothing is damaged, and names whatever is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint
from sqlalchemy.engine import Engine

from agentflow.checkpoint import Saver, audit, open_checkpointer
from agentflow.checkpoint.audit import Counts, Damage
from agentflow.checkpoint.records import Place
from agentflow.codec import Codec
from agentflow.config import load_settings
from agentflow.database import Database
from agentflow.database.engine import parse_url
from agentflow.database.tables import anchors, checkpoints, threads, values, writes
from agentflow.keys import KeyRing
from agentflow.testing.savers.graphs import letters
from tests.golden import database_v1
from tests.integration.test_damage import TEXT, THREAD, changed, fill, fill_and_prune
from tests.integration.test_golden_database import unpack
from tests.servers import no_leaked_files

LISTS: RunnableConfig = {"configurable": {"thread_id": "lists", "checkpoint_ns": ""}}
SEALED = (checkpoints, values, writes, anchors)
COLUMNS = [
    column
    for table in (*SEALED, threads)
    for column in table.c
    # Who may write a thread says nothing about what is stored in it.
    if column not in {threads.c.token, threads.c.is_leased}
]
ROWS = {
    checkpoints: ("thread", "ns", "seq"),
    values: ("thread", "series", "start"),
    writes: ("thread", "ns", "checkpoint_id", "seq"),
    anchors: ("thread", "ns", "checkpoint_id"),
    threads: ("id",),
}


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    """A checkpointer with threads that have something in every column."""
    with open_checkpointer(database_url) as opened:
        asyncio.run(fill(opened))
        asyncio.run(fill_and_prune(opened))
        grow_and_cut(opened)
        yield opened


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow, to damage things with."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


def grow_and_cut(saver: Saver) -> None:
    """Put checkpoints whose list grows, is cut, grows again, and forks."""
    log: list[str] = []
    checkpoint, config = empty_checkpoint(), LISTS
    middle: Any = None
    for step in range(24):
        log = log[:-3] if step in {9, 15} else [*log, f"{step}: {TEXT}"]
        put = changed(saver, checkpoint, log=log, step=step)
        config = saver.put(config, *put)
        checkpoint = put[0]
        if step == 12:
            middle = config
    old = saver.get_tuple(middle)
    assert old is not None
    for number in range(2):
        put = changed(saver, old.checkpoint, log=[*old.checkpoint["channel_values"]["log"], TEXT])
        saver.put(old.config, *put)
        old = saver.get_tuple(LISTS if number else middle)
        assert old is not None


def verify(saver: Saver, **narrowed: Any) -> tuple[Counts, list[Damage]]:
    async def run() -> tuple[Counts, list[Damage]]:
        counts, damages = Counts(), []
        async for audited in saver.verify(**narrowed):
            counts.add(audited.counts)
            damages += audited.damages
        return counts, damages

    return asyncio.run(run())


def assert_clean(saver: Saver) -> Counts:
    counts, damages = verify(saver)
    assert damages == []
    return counts


def read(engine: Engine, table: sa.Table) -> list[sa.Row[Any]]:
    with engine.connect() as connection:
        found = list(connection.execute(sa.select(table).order_by(*table.primary_key.columns)))
    assert found, f"nothing is in {table}"
    return found


def numbers(engine: Engine) -> dict[str, int]:
    return {row.thread_id: row.id for row in read(engine, threads)}


def at(table: sa.Table, row: sa.Row[Any], **other: Any) -> list[sa.ColumnElement[bool]]:
    return [table.c[name] == other.get(name, getattr(row, name)) for name in ROWS[table]]


@contextmanager
def updated(engine: Engine, table: sa.Table, row: sa.Row[Any], **other: Any) -> Iterator[None]:
    """Change columns of a row, and put them right afterwards."""
    before = {name: getattr(row, name) for name in other}
    with engine.begin() as connection:
        change = sa.update(table).where(*at(table, row)).values(other)
        assert connection.execute(change).rowcount == 1
    yield
    with engine.begin() as connection:
        change = sa.update(table).where(*at(table, row, **other)).values(before)
        assert connection.execute(change).rowcount == 1


@contextmanager
def without(engine: Engine, table: sa.Table, row: sa.Row[Any]) -> Iterator[None]:
    """Delete a row, and put it back afterwards."""
    with engine.begin() as connection:
        assert connection.execute(sa.delete(table).where(*at(table, row))).rowcount == 1
    yield
    with engine.begin() as connection:
        connection.execute(sa.insert(table).values(row._asdict()))


def others(column: sa.Column[Any], value: Any) -> list[Any]:
    """Return values that a column might have been changed to."""
    if isinstance(column.type, sa.LargeBinary):
        if value is None:
            return [b"", b"x"]
        places = sorted({0, 1, 2, 3, 11, 12, len(value) // 2, len(value) - 1})
        flipped = [value[:i] + bytes((value[i] ^ 1,)) + value[i + 1 :] for i in places]
        return [*flipped, value[:-1], value + b"x", *([None] if column.nullable else [])]
    if isinstance(column.type, (sa.Integer, sa.BigInteger)):
        return [0] if column is threads.c.seq else [1 if value is None else value + 1_000_000]
    if not value:
        return ["x"]
    return [value[:-1] + chr(ord(value[-1]) ^ 1)]


class TestClean:
    """Nothing is found where nothing is damaged."""

    def test_every_kind_of_row(self, saver: Saver, engine: Engine) -> None:
        counts = assert_clean(saver)
        found = [len(read(engine, table)) for table in (threads, *SEALED)]
        assert [
            counts.threads,
            counts.checkpoints,
            counts.values,
            counts.writes,
            counts.anchors,
        ] == found

    def test_what_is_left_by_verbs(self, saver: Saver) -> None:
        for source in ("t", "pruned", "lists"):
            saver.copy_thread(source, f"copy of {source}")
        assert_clean(saver)
        for thread in ("lists", "copy of lists"):
            saver.prune([thread])
        assert_clean(saver)
        saver.copy_thread("lists", "copy of pruned lists")
        saver.prune(["t"], strategy="delete")
        saver.delete_thread("copy of t")
        assert_clean(saver)

    def test_what_is_left_when_runs_are_deleted(self, saver: Saver) -> None:
        graph = letters("a", "b").compile(checkpointer=saver)
        for run_id in ("one", "two", "three"):
            config: RunnableConfig = {
                "configurable": {"thread_id": "runs"},
                "metadata": {"run_id": run_id},
            }
            graph.invoke({"log": [TEXT * 9]}, config)
        saver.delete_for_runs(["two"])
        assert assert_clean(saver).anchors

    def test_graphs_with_forks_subgraphs_questions_and_deltas(self, database_url: str) -> None:
        asyncio.run(database_v1._write_threads(database_url))
        with open_checkpointer(database_url) as saver:
            names = sorted({item.config["configurable"]["thread_id"] for item in saver.list(None)})
            assert_clean(saver)
            for name in names:
                saver.copy_thread(name, f"copy of {name}")
            assert_clean(saver)
            saver.prune(names)
            assert_clean(saver)

    def test_golden_database_after_migration(self, sqlite_url: str, tmp_path: Any) -> None:
        folder = tmp_path / "golden"
        folder.mkdir()
        with (
            no_leaked_files(folder),
            open_checkpointer(unpack(folder / "agentflow.db")) as saver,
        ):
            assert assert_clean(saver).checkpoints > 100

    def test_database_in_memory(self) -> None:
        with open_checkpointer("memory://") as saver:
            grow_and_cut(saver)
            assert assert_clean(saver).checkpoints == 26

    def test_empty_database(self, database_url: str) -> None:
        with open_checkpointer(database_url) as saver:
            assert assert_clean(saver) == Counts()

    def test_encrypted_database(self, database_url: str) -> None:
        def opened(secret: bytes) -> Saver:
            codec = Codec(keys=KeyRing({"key": secret}))
            database = Database(database_url, load_settings())
            return Saver(database, codec=codec, owns_database=True)

        with opened(b"1" * 32) as saver:
            asyncio.run(fill(saver))
            asyncio.run(fill_and_prune(saver))
            grow_and_cut(saver)
            counts = assert_clean(saver)
        with opened(b"2" * 32) as saver:
            damages = verify(saver)[1]
            assert {each.error for each in damages} == {"HashMismatchError"}
            assert len(damages) >= counts.checkpoints + counts.writes + counts.anchors
        with open_checkpointer(database_url) as saver:
            assert {each.error for each in verify(saver)[1]} == {"UnknownKeyError"}

    def test_each_stretch_is_read_once(
        self, saver: Saver, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many checkpoints share it."""
        read_once: list[bytes] = []
        unseal = Codec.unseal

        def noted(codec: Codec, data: bytes, *args: Any, **options: Any) -> bytes:
            read_once.append(data)
            return unseal(codec, data, *args, **options)

        monkeypatch.setattr(Codec, "unseal", noted)
        assert_clean(saver)
        stored = [
            payload
            for table in SEALED
            for row in read(engine, table)
            for payload in (row.data, getattr(row, "parent_writes", None), getattr(row, "base", 0))
            if payload
        ]
        assert sorted(read_once) == sorted(stored)

    def test_small_pages_and_groups(
        self, saver: Saver, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = assert_clean(saver)
        for name, size in (("_GROUP", 2), ("_GROUP_ROWS", 10), ("_FIRST_PAGE", 3)):
            monkeypatch.setattr(audit, name, size)
        monkeypatch.setattr(audit, "_MAX_PAGE", 2)
        assert assert_clean(saver) == counts
        row = read(engine, checkpoints)[-1]
        with updated(engine, checkpoints, row, hash=b"x"):
            assert len(verify(saver)[1]) == 1

    def test_value_that_nothing_refers_to(self, saver: Saver, engine: Engine) -> None:
        number = numbers(engine)["t"]
        context = Place("", "t", "").context_of_value(1, 5)
        with engine.begin() as connection:
            sealed = saver._codec.seal(b"\xa1x", context)
            connection.execute(
                sa.insert(values).values(thread=number, series=1, start=5, data=sealed)
            )
        assert_clean(saver)

    async def test_threads_that_are_written_meanwhile(self, database_url: str) -> None:
        async with open_checkpointer(database_url) as saver:
            graph = letters(*"abcdef").compile(checkpointer=saver)

            async def write(thread: str) -> None:
                for _ in range(4):
                    await graph.ainvoke(
                        {"log": [TEXT * 9]}, {"configurable": {"thread_id": thread}}
                    )
                    await saver.aprune([thread])

            tasks = [asyncio.create_task(write(str(number))) for number in range(4)]
            while not all(task.done() for task in tasks):
                async for audited in saver.verify():
                    assert audited.damages == []
            await asyncio.gather(*tasks)


class TestDamage:
    """Whatever is damaged is found, and named."""

    @pytest.mark.slow
    @pytest.mark.parametrize("column", COLUMNS, ids=str)
    def test_column_that_has_changed(
        self, saver: Saver, engine: Engine, column: sa.Column[Any]
    ) -> None:
        table, missed = column.table, []
        names = {number: name for name, number in numbers(engine).items()}
        for row in read(engine, table):
            for other in others(column, getattr(row, column.name)):
                with updated(engine, table, row, **{column.name: other}):
                    _, damages = verify(saver)
                if not damages:
                    missed.append((row[:4], other))
                    continue
                if table is checkpoints and column.name in {"data", "hash", "attempt", "step"}:
                    named = {(each.thread_id, each.checkpoint_id) for each in damages}
                    assert named == {(names[row.thread], row.checkpoint_id)}
                if table is values and column.name == "data":
                    assert {each.thread_id for each in damages} == {names[row.thread]}
                    assert all(each.checkpoint_id for each in damages)
        assert missed == []
        assert_clean(saver)

    @pytest.mark.parametrize("table", SEALED, ids=str)
    def test_swapped_rows(self, saver: Saver, engine: Engine, table: sa.Table) -> None:
        rows = read(engine, table)
        if len(rows) == 1:
            saver.copy_thread("pruned", "copy")
            saver.copy_thread("t", "another copy")
            rows = read(engine, table)
        for left, right in itertools.pairwise(rows):
            with (
                updated(engine, table, left, data=right.data),
                updated(engine, table, right, data=left.data),
            ):
                found = verify(saver)[1]
                assert len(found) >= 2, (left, right)
                assert {each.error for each in found} == {"HashMismatchError"}

    def test_deleted_checkpoint(self, saver: Saver, engine: Engine) -> None:
        """Of each that has a successor; that a head was deleted shows nowhere."""
        for row in read(engine, checkpoints):
            children = [
                each.checkpoint_id
                for each in read(engine, checkpoints)
                if (each.thread, each.parent_id) == (row.thread, row.checkpoint_id)
            ]
            with without(engine, checkpoints, row):
                found = verify(saver)[1]
            assert sorted(each.checkpoint_id for each in found) == sorted(children)
            assert all("chain is cut" in each.message for each in found)

    def test_deleted_value(self, saver: Saver, engine: Engine) -> None:
        for row in read(engine, values):
            with without(engine, values, row):
                found = verify(saver)[1]
            assert {each.error for each in found} == {"MissingBlobError"}, row[:3]
            assert all(each.checkpoint_id for each in found)
            assert any(each.channel for each in found)

    def test_deleted_anchor(self, saver: Saver, engine: Engine) -> None:
        for row in read(engine, anchors):
            with without(engine, anchors, row):
                (found,) = verify(saver)[1]
            assert "chain is cut" in found.message
            assert (found.error, found.thread_id) == ("HashMismatchError", "pruned")

    def test_older_bytes_in_the_place_of_newer_ones(self, saver: Saver, engine: Engine) -> None:
        """Of a stretch that has since been put together with what follows it."""
        config: RunnableConfig = {"configurable": {"thread_id": "old", "checkpoint_ns": ""}}
        checkpoint = empty_checkpoint()
        log: list[str] = []
        seen: dict[tuple[int, int], sa.Row[Any]] = {}
        for step in range(20):
            log = [*log, f"{step}: {TEXT * 3}"]
            put = changed(saver, checkpoint, log=log)
            config, checkpoint = saver.put(config, *put), put[0]
            number = numbers(engine)["old"]
            for row in read(engine, values):
                if row.thread == number:
                    seen.setdefault((row.series, row.start), row)
        replaced = [
            (row, seen[row.series, row.start])
            for row in read(engine, values)
            if row.thread == number and row.data != seen[row.series, row.start].data
        ]
        assert replaced
        assert_clean(saver)
        for row, before in replaced:
            with updated(engine, values, row, data=before.data):
                (found,) = verify(saver)[1]
            assert (found.thread_id, found.channel) == ("old", "log")

    def test_other_content_in_an_envelope_that_fits(self, saver: Saver, engine: Engine) -> None:
        """Anyone who can write the database can make that, if nothing is encrypted."""
        codec = saver._codec
        names = {number: name for name, number in numbers(engine).items()}
        for row in read(engine, values):
            context = Place("", names[row.thread], "").context_of_value(row.series, row.start)
            body = codec.unseal(row.data, context)
            forged = codec.seal(body[:-1] + bytes((body[-1] ^ 1,)), context)
            with updated(engine, values, row, data=forged):
                found = verify(saver)[1]
            assert found, row[:3]
            assert {(each.error, bool(each.channel)) for each in found} == {
                ("HashMismatchError", True)
            }

    def test_row_of_no_thread(self, saver: Saver, engine: Engine) -> None:
        (row,) = [each for each in read(engine, threads) if each.thread_id == "t"]
        with without(engine, threads, row):
            found = verify(saver)[1]
        assert all("thread does not exist" in each.message for each in found)
        assert len(found) > 3

    def test_value_of_a_newer_program(self, saver: Saver, engine: Engine) -> None:
        row = read(engine, checkpoints)[0]
        with updated(engine, checkpoints, row, data=b"\x09" + row.data[1:]):
            (found,) = verify(saver)[1]
        assert found.error == "UnknownVersionError"
        assert "upgrade agentflow" in found.message

    @pytest.mark.parametrize("data", [b"", b"\x00", b"x" * 100])
    def test_what_is_no_envelope(self, saver: Saver, engine: Engine, data: bytes) -> None:
        for table in SEALED:
            row = read(engine, table)[0]
            with updated(engine, table, row, data=data):
                assert verify(saver)[1]

    def test_envelope_around_something_else(self, saver: Saver, engine: Engine) -> None:
        """It is told as damage, and what comes after it is verified as well."""
        codec = saver._codec
        names = {number: name for name, number in numbers(engine).items()}
        contexts: dict[sa.Table, Callable[[Any, Place], bytes]] = {
            checkpoints: lambda row, place: place.context_of_row(row),
            values: lambda row, place: place.context_of_value(row.series, row.start),
            writes: lambda row, place: place.context_of_writes(row.checkpoint_id, row.seq),
            anchors: lambda row, place: place.context_of_anchor(row.checkpoint_id, row.seq),
        }
        for table, context_of in contexts.items():
            for row in read(engine, table):
                place = Place("", names[row.thread], getattr(row, "ns", ""))
                for body in (b"", b"\xc0", b"\x94\x01\x02\x03\x04", b"\xc1", b"\x91\xa1x"):
                    data = codec.seal(body, context_of(row, place))
                    with updated(engine, table, row, data=data):
                        assert verify(saver)[1], (row[:4], body)

    def test_only_what_was_asked_for_is_verified(self, saver: Saver, engine: Engine) -> None:
        number = numbers(engine)["lists"]
        row = next(row for row in read(engine, checkpoints) if row.thread == number)
        with updated(engine, checkpoints, row, hash=b"x"):
            assert verify(saver, thread_id="t")[1] == []
            assert verify(saver, tenant="nobody") == (Counts(), [])
            (found,) = verify(saver, tenant="", thread_id="lists")[1]
        assert (found.thread_id, found.checkpoint_id) == ("lists", row.checkpoint_id)

    def test_damage_of_one_thread_hides_none_of_another(self, saver: Saver, engine: Engine) -> None:
        rows = {row.thread: row for row in read(engine, checkpoints)}
        left, middle, right = rows.values()
        with (
            updated(engine, checkpoints, left, hash=b"x"),
            updated(engine, checkpoints, middle, hash=b"x"),
            updated(engine, checkpoints, right, hash=b"x"),
        ):
            found = verify(saver)[1]
        assert {each.thread_id for each in found} == {"t", "pruned", "lists"}


def test_nothing_is_changed(saver: Saver, engine: Engine) -> None:
    before = [read(engine, table) for table in ROWS]
    assert_clean(saver)
    assert [read(engine, table) for table in ROWS] == before


def test_thread_named_in_a_message(saver: Saver, engine: Engine) -> None:
    (thread,) = THREAD["configurable"]["thread_id"]
    number = numbers(engine)[thread]
    row = next(row for row in read(engine, values) if row.thread == number)
    with updated(engine, values, row, data=row.data[:-1]):
        (found,) = verify(saver)[1]
    assert found.channel in found.message
    assert f"thread {thread!r}" in found.message
