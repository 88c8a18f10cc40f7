"""What the revision 0005 left behind: versions and effects, plain, encrypted, and in PostgreSQL.

`tests/golden/database_v3.py` wrote the files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.config import load_settings
from agentflow.database import migrate
from agentflow.database.engine import make_engine, parse_url, writing
from agentflow.storage import RowDamage
from agentflow.types import Run, RunStatus
from tests.golden import database_v3 as v3
from tests.golden import graphs_v3 as graphs
from tests.integration.sealed import payloads
from tests.integration.test_golden_postgres import copy_rows, create_schema
from tests.servers import no_leaked_files

POSTGRES = "postgres"
CODEC = 2
"""The version of the envelopes in the files."""
ELSEWHERE = {
    "agentflow_anchors.data",
    "agentflow_checkpoints.base",
    "agentflow_effects.late",
    "agentflow_values.data",
}
"""Columns that other golden files have payloads in."""


@pytest.fixture(params=[*v3.FORMS, pytest.param(POSTGRES, marks=pytest.mark.postgres)])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which one it is; the key of the encrypted one is in the environment."""
    for name, value in v3.environment(request.param).items():
        monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.fixture
def url(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a copy."""
    folder = tmp_path / "golden"
    folder.mkdir()
    file = folder / "agentflow.db"
    with no_leaked_files(folder):
        packed = v3.database_of("plain" if form == POSTGRES else form)
        file.write_bytes(gzip.decompress(packed.read_bytes()))
        if form != POSTGRES:
            yield f"sqlite:///{file}"
            return
        server = request.getfixturevalue("postgres_server")
        name = server.create_database()
        engine = make_engine(parse_url(server.url(name)), load_settings())
        with writing(engine) as connection:
            create_schema(connection, v3.REVISION)
            copy_rows(file, connection)
        engine.dispose()
        migrate.up(server.url(name))
        yield server.url(name)
        server.drop_database(name)


@pytest.fixture
def outside() -> graphs.Outside:
    """The world that the effects touch."""
    return graphs.Outside()


@pytest.fixture
async def app(url: str, outside: graphs.Outside) -> AsyncIterator[AgentFlow]:
    """An app with the graphs on the copy, in which no run is damaged before or afterwards."""
    async with AgentFlow(url) as opened:
        graphs.register(opened, outside)
        assert await damages(opened) == []
        yield opened
        assert await damages(opened) == []


async def damages(app: AgentFlow) -> list[RowDamage]:
    found = app._store.find_damages()
    return [damage async for verified in found for damage in verified.damages]


async def test_everything_is_listed_with_its_version_and_nothing_is_damaged(
    form: str, url: str
) -> None:
    listing = v3.listing_of("plain" if form == POSTGRES else form)
    expected = json.loads(gzip.decompress(listing.read_bytes()))
    # As a file has it.
    assert json.loads(json.dumps(await v3.list_all(url))) == expected
    found = payloads(url)
    assert {column for column, rows in found.items() if not rows} == ELSEWHERE
    assert {row[-1][0] for rows in found.values() for row in rows} == {CODEC}
    async with open_checkpointer(url) as saver:
        async for audited in saver.verify():
            assert audited.damages == []


async def answered(app: AgentFlow, run_id: str, decision: Any = "approve") -> Run:
    """Answer what a run asks, and drive it."""
    (approval,) = await app.handle(run_id).approvals()
    await app.approvals.decide(approval.id, decision, by="cy")
    return await app.drive(run_id)


async def test_each_run_goes_on_and_nothing_is_done_twice(
    app: AgentFlow, outside: graphs.Outside
) -> None:
    ended = {run_id for run_id, status in v3.STATUSES.items() if RunStatus(status).is_ended}
    checked = {run.run_id: (run.verdict, run.action) for run in await app.check_runs()}
    assert checked == dict.fromkeys(v3.STATUSES.keys() - ended, ("same", "accept"))
    happened = {"type": "respond", "value": {"happened": True, "outcome": "a receipt"}}

    runs = {"waiting": await answered(app, "waiting")}
    await app.migrate_run("decided")
    runs["decided"] = await app.drive("decided")
    runs["migrated"] = await answered(app, "migrated")
    runs["doubted"] = await answered(app, "doubted", happened)
    runs["resolved"] = await app.drive("resolved")
    await app.resume_run("kept")
    runs["kept"] = await app.drive("kept")
    assert (await app.drive("fork")).status is RunStatus.WAITING
    runs["fork"] = await answered(app, "fork")
    assert (await app.drive("killed")).status is RunStatus.WAITING
    runs["killed"] = await answered(app, "killed", happened)
    assert {run_id: (run.version, run.output["log"][2:]) for run_id, run in runs.items()} == {
        "waiting": ("1", ["approve by cy", "receipt of waiting: 5.5"]),
        "decided": ("2", ["approve by ann", "receipt of decided: 550"]),
        "migrated": ("2", ["approve by cy", "receipt of migrated: 550"]),
        "doubted": ("1", ["approve by ann", "a receipt: 5.5"]),
        "resolved": ("1", ["approve by ann", "a receipt: 5.5"]),
        "kept": ("1", ["approve by ann", "receipt of kept: 5.5"]),
        "fork": ("1", ["approve by cy", "receipt of waiting: 5.5"]),
        "killed": ("1", ["approve by ann", "a receipt: 5.5"]),
    }
    assert (await answered(app, "inside")).output["log"][-2:] == ["approve", "end"]
    undone = await app.drive("undoing")
    assert (undone.status, undone.saga) == (RunStatus.CANCELLED, "compensated")
    assert outside.calls == [
        "pay waiting",
        "pay decided",
        "pay migrated",
        "pay kept",
        "release place of undoing",
    ]
    assert (await app.drive("new")).status is RunStatus.WAITING
