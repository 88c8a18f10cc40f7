"""What is damaged of one run neither hides the others nor stops them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow
from agentflow.database.engine import parse_url
from agentflow.database.tables import dead_letters, effects, pauses, runs, waits, workers
from agentflow.errors import HashMismatchError
from agentflow.types import Page, RunStatus, WorkerReport
from tests.integration.cli import fresh_cli
from tests.integration.sealed import fill, open_app

Damage = Callable[..., None]


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app with runs of each kind, two of each."""
    async with open_app(database_url, None) as opened:
        await fill(opened)
        for run_id, graph in (("asking", "refund"), ("failed-2", "fail")):
            await opened.submit(graph, {}, run_id=run_id)
            await opened.drive(run_id)
        yield opened


@pytest.fixture
def damage(database_url: str) -> Iterator[Damage]:
    """Changes rows behind agentflow's back."""
    engine = sa.create_engine(parse_url(database_url))

    def put(table: sa.Table, condition: sa.ColumnElement[bool], **columns: Any) -> None:
        with engine.begin() as connection:
            changed = connection.execute(sa.update(table).where(condition).values(columns))
            assert changed.rowcount == 1

    yield put
    engine.dispose()


def others(before: Page[Any], after: Page[Any]) -> list[str]:
    """Return what is left out of a page, whose other items are as they were."""
    gone = [each.id for each in after.unreadable]
    for each in after.unreadable:
        assert isinstance(each.error, HashMismatchError)
    left = [each for each in before.items if getattr(each, "id", None) not in gone]
    left = [each for each in left if getattr(each, "run_id", "") not in gone]
    assert list(after.items) == left
    assert len(left) == len(before.items) - len(gone) > 0
    with pytest.raises(HashMismatchError):
        after.whole()
    return gone


async def test_lists_have_all_but_what_is_damaged(
    app: AgentFlow, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    listings: dict[str, Callable[[], Any]] = {
        "runs": app.list_runs,
        "waits": app.approvals.list,
        "letters": app.dead_letters.list,
        "effects": app.effects.list,
    }
    before = {name: await read() for name, read in listings.items()}
    (asked,) = await app.handle("waiting").approvals()
    effect = before["effects"].items[0]
    damage(runs, runs.c.run_id == "waiting", metadata=b"junk")
    damage(waits, waits.c.wait_id == asked.id, request=b"junk")
    damage(dead_letters, dead_letters.c.run_id == "failed", cause=b"junk")
    damage(effects, effects.c.effect_id == effect.id, request=b"junk")
    gone = {name: others(before[name], await read()) for name, read in listings.items()}
    assert gone == {
        "runs": ["waiting"],
        "waits": [asked.id],
        "letters": ["failed"],
        "effects": [effect.id],
    }
    told = [each.__dict__ for each in caplog.records]
    assert {each["id"] for each in told} == {"waiting", asked.id, "failed", effect.id}
    assert {each["error"] for each in told} == {"HashMismatchError"}
    verdicts = {each.run_id: each.verdict for each in await app.check_runs()}
    assert (verdicts["waiting"], verdicts["asking"]) == ("unreadable", "same")


async def test_status_that_is_none_is_named(app: AgentFlow, damage: Damage) -> None:
    before = await app.list_runs()
    damage(runs, runs.c.run_id == "decided", status="succeede")
    assert others(before, await app.list_runs()) == ["decided"]
    with pytest.raises(HashMismatchError, match=r"runs\.status of 'decided'"):
        await app.get_run("decided")


async def test_pauses_and_workers_are_looked_at_whatever_they_say(
    app: AgentFlow, damage: Damage
) -> None:
    for name in ("one", "two"):
        report = WorkerReport(
            instance=name, name=name, queues=("default",), graphs=tuple(app.graphs), concurrency=1
        )
        await app._store.beat_worker("", report)
    damage(pauses, pauses.c.scope == "queue", reason=b"junk")
    damage(workers, workers.c.instance == "one", report="{")
    (pause,) = await app.list_pauses()
    assert (pause.name, pause.reason) == ("unused", None)
    assert (pause.damage or "").startswith("HashMismatchError: stored value (pauses.reason of")
    found = {check.name: check.message for check in (await app.doctor()).checks}
    assert "queue 'unused'" in found["pauses"]
    assert found["workers"] == "1 are at work"
    await app._store.remove_worker("", "one")


async def test_worker_drives_the_others_and_pauses_what_is_damaged(
    app: AgentFlow, damage: Damage
) -> None:
    for run_id in ("damaged", "whole"):
        await app.submit("refund", {}, run_id=run_id, priority=int(run_id == "damaged"))
    damage(runs, runs.c.run_id == "damaged", input=b"junk")
    async with app.worker():
        await app.wait("whole", until="parked", timeout=30)
        assert (await app.get_run("whole")).status is RunStatus.WAITING
    log = [event.type for event in await app.list_events("damaged")]
    assert log == ["run.submitted", "run.unreadable", "run.paused"]


def test_command_shows_damaged_rows_among_the_others(
    database_url: str, monkeypatch: pytest.MonkeyPatch, damage: Damage
) -> None:
    cli = fresh_cli(database_url, monkeypatch)
    damaged, whole = cli.submit("echo", 1), cli.submit("echo", 2)
    damage(runs, runs.c.run_id == damaged, input=b"junk")
    shown = cli.ok("run", "list")
    assert [line.split("\t")[:4] for line in shown.out.splitlines()[1:]] == [
        [whole, "echo", "1", "queued"],
        [damaged, "echo", "1", "HashMismatchError"],
    ]
    assert f"{damaged} cannot be read: HashMismatchError: stored value (runs.input of" in shown.err
    found = json.loads(cli.ok("run", "list", "-o", "json").out)
    assert [(each["status"], each.get("unreadable")) for each in found] == [
        ("queued", None),
        ("queued", "HashMismatchError"),
    ]
