"""Verification of runs finds nothing where nothing is damaged, and names whatever is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from agentflow import AgentFlow
from agentflow.database.engine import parse_url
from agentflow.database.tables import events, runs, waits
from agentflow.errors import HashMismatchError
from agentflow.storage import RowDamage, verification
from tests.integration.cli import fresh_cli
from tests.integration.offloaded import objects
from tests.integration.sealed import OF_RUNS, fill, open_app, read_payloads, read_rows, ring
from tests.integration.test_effects_offload import Fetch

pytestmark = pytest.mark.slow


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on a database with something in every column, of two tenants; one is encrypted."""
    keys = ring("one") if database_url.startswith("sqlite") else None
    async with open_app(database_url, keys, tenant="acme") as other:
        await fill(other)
    async with open_app(database_url, keys) as opened:
        await fill(opened)
        yield opened


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow, to damage things with."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


async def verify(app: AgentFlow, **narrowed: Any) -> tuple[int, list[RowDamage]]:
    rows = 0
    damages: list[RowDamage] = []
    async for verified in app._store.find_damages(**narrowed):
        rows += verified.rows
        damages += verified.damages
    return rows, damages


@contextmanager
def updated(engine: Engine, row: Any, table: sa.Table, **other: Any) -> Iterator[None]:
    """Change columns of a row, and put them right afterwards."""
    before = {name: getattr(row, name) for name in other}
    found = {column.name: getattr(row, column.name) for column in table.primary_key.columns}

    def put(place: dict[str, Any], values: dict[str, Any]) -> None:
        at = [table.c[name] == value for name, value in place.items()]
        with engine.begin() as connection:
            assert connection.execute(sa.update(table).where(*at).values(values)).rowcount == 1

    put(found, other)
    yield
    put({name: other.get(name, value) for name, value in found.items()}, before)


@contextmanager
def deleted(engine: Engine, row: Any) -> Iterator[None]:
    """Delete an event, and put it back afterwards."""
    at = [column == getattr(row, column.name) for column in events.primary_key.columns]
    with engine.begin() as connection:
        assert connection.execute(sa.delete(events).where(*at)).rowcount == 1
    yield
    with engine.begin() as connection:
        connection.execute(sa.insert(events).values(row._asdict()))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


async def test_every_payload_is_verified_in_its_place(
    app: AgentFlow, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is new is one of these, and has to have something in it."""
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_ROWS_AT_ONCE", 3)
        rows, damages = await verify(app)
    assert damages == []
    tables = {column.table for column in OF_RUNS}
    assert rows >= sum(len(read_rows(engine, table)) for table in tables)
    for column in OF_RUNS:
        found = [row for row in read_rows(engine, column.table) if row._mapping[column] is not None]
        row = found[-1]
        name = column.name
        for data in {flipped(row._mapping[column]), *(one._mapping[column] for one in found[:1])}:
            with updated(engine, row, column.table, **{name: data}):
                _, damages = await verify(app)
                place = f"{column.table.name.removeprefix('agentflow_')}.{name} of "
                assert [(each.error, each.tenant) for each in damages] == [
                    ("HashMismatchError", row.tenant)
                ] * (1 if data != row._mapping[column] else 0), (column, damages)
                assert all(each.payload.startswith(place) for each in damages)
    assert await verify(app) == (rows, [])


async def test_every_column_of_events_and_the_ends_of_their_chains(
    app: AgentFlow, engine: Engine
) -> None:
    log = [row for row in read_rows(engine, events) if (row.tenant, row.run_id) == ("", "decided")]
    middle, last = log[len(log) // 2], log[-1]
    (run,) = [row for row in read_rows(engine, runs) if (row.tenant, row.run_id) == ("", "decided")]
    (asked,) = [row for row in read_rows(engine, waits) if row.tenant == "" and row.comment is None]
    changes: list[tuple[Any, sa.Table, dict[str, Any]]] = [
        (middle, events, {"type": "run.succeeded"}),
        (middle, events, {"at": middle.at + timedelta(seconds=1)}),
        (middle, events, {"prev_hash": last.hash}),
        (middle, events, {"hash": last.hash}),
        (middle, events, {"seq": 99}),
        (last, events, {"seq": 99}),
        (last, events, {"hash": middle.hash}),
        (last, events, {"run_id": "failed", "seq": 99}),
        (last, events, {"tenant": "acme", "seq": 99}),
        (run, runs, {"event_seq": run.event_seq - 1, "event_hash": log[-2].hash}),
        (run, runs, {"event_seq": run.event_seq + 1}),
        (run, runs, {"event_hash": middle.hash}),
        (asked, waits, {"proposal_hash": asked.proposal_hash[:-1]}),
    ]
    for row, table, change in changes:
        with updated(engine, row, table, **change):
            _, damages = await verify(app)
            assert {each.error for each in damages} == {"HashMismatchError"}, change
    for row in (log[0], middle, last):
        with deleted(engine, row):
            _, damages = await verify(app)
            assert {each.error for each in damages} == {"HashMismatchError"}, row
    assert not (await verify(app))[1]


async def test_only_what_was_asked_for_is_verified(app: AgentFlow, engine: Engine) -> None:
    (row,) = [
        row for row in read_rows(engine, runs) if (row.tenant, row.run_id) == ("acme", "waiting")
    ]
    with updated(engine, row, runs, input=flipped(row.input)):
        for narrowed, expected in (
            ({}, 1),
            ({"tenant": "acme"}, 1),
            ({"thread_id": "waiting"}, 1),
            ({"tenant": ""}, 0),
            ({"thread_id": "decided"}, 0),
        ):
            rows, damages = await verify(app, **narrowed)
            assert rows
            assert len(damages) == expected, narrowed
        (damage,) = (await verify(app))[1]
        assert damage.payload == "runs.input of 'waiting' of tenant 'acme'"
        assert damage.payload in damage.message


async def test_runs_that_go_on_meanwhile_are_not_damaged(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two pages everything may have gone on."""
    monkeypatch.setattr(verification, "_ROWS_AT_ONCE", 1)
    async with open_app(database_url, None) as app:
        await fill(app)
        number = 0
        async for verified in app._store.find_damages():
            assert verified.damages == ()
            number += 1
            if number % 4 == 0 and number < 40:
                await app.submit("refund", {"given": "x"}, run_id=f"new-{number}")
                await app.drive(f"new-{number}")
            if number == 5:
                await app.cancel("waiting")
        assert number > 20


async def test_outcome_that_is_an_object_is_verified_there(sqlite_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    fetch = Fetch()
    async with fetch.app(sqlite_url, folder) as opened:
        await fetch.begin(opened)
        assert (await verify(opened))[1] == []
        (file,) = objects(folder)
        whole = file.read_bytes()
        for data, error in ((flipped(whole), "HashMismatchError"), (None, "MissingBlobError")):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            (damage,) = (await verify(opened))[1]
            assert (damage.error, damage.payload[:18]) == (error, "effects.outcome of")
        file.write_bytes(whole)
        assert (await verify(opened))[1] == []


def test_command_names_damage_of_runs(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = fresh_cli(sqlite_url, monkeypatch)
    run_id = cli.submit("echo", 1)
    assert " rows of runs\n" in cli.ok("checkpoint", "verify", "--thread", run_id).err
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("UPDATE agentflow_events SET type = 'run.cancelled' WHERE seq = 1")
    result = cli("checkpoint", "verify")
    assert result.code == 1
    assert f"HashMismatchError: stored value (events.data of {run_id!r}, 1)" in result.out
    assert "1 thing is damaged; nothing was changed" in result.err
    (found,) = json.loads(cli("checkpoint", "verify", "-o", "json").out)
    assert found["payload"] == f"events.data of {run_id!r}, 1"


async def test_what_is_not_binary_is_refused_by_name(sqlite_url: str) -> None:
    """SQLite takes a text where bytes should be."""
    engine = sa.create_engine(sqlite_url)
    async with open_app(sqlite_url, None) as app:
        await fill(app)
        for column in OF_RUNS:
            table, name = column.table, column.name
            found = read_rows(engine, table)
            row = [row for row in found if row._mapping[column] is not None][-1]
            where = " AND ".join(f"{each.name} = ?" for each in table.primary_key)
            put = f"UPDATE {table.name} SET {name} = ? WHERE {where}"
            at = [row._mapping[each] for each in table.primary_key]
            with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as raw:
                for text in ("text", "text" * 99):
                    with raw:
                        raw.execute(put, [text, *at])
                    with pytest.raises(HashMismatchError):
                        await read_payloads(app, table, row)
                    _, damages = await verify(app)
                    assert [each.error for each in damages] == ["HashMismatchError"]
                with raw:
                    raw.execute(put, [row._mapping[column], *at])
    engine.dispose()
