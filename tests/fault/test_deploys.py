"""A deploy under runs that wait: releases side by side, and processes killed while runs move."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agentflow import AgentFlow
from agentflow.types import Run, RunStatus
from tests.fault.deploys import MOVER, WORKER, Release
from tests.fault.sabotage import Place
from tests.fault.scene import LONG, Scene

DOCS = Path(__file__).parents[2] / "docs" / "versions.md"
MIGRATION: tuple[Place | str, ...] = (
    Place("RunStore.claim_migration", 1, "committed"),
    "migration.carried",
    "migration.saved",
    Place("RunStore.migrate_run", 1, "uncommitted"),
    Place("RunStore.migrate_run", 1, "committed"),
)
IMPORT: tuple[Place | str, ...] = (
    "transfer.restored",
    Place("RunStore.import_run", 1, "uncommitted"),
    Place("RunStore.import_run", 1, "committed"),
)


@asynccontextmanager
async def released(scene: Scene, number: int, url: str = "") -> AsyncIterator[AgentFlow]:
    """Open an app with the code of a release."""
    async with AgentFlow(url or scene.url) as app:
        Release(number, scene.ledger.address).register(app)
        yield app


async def approve(app: AgentFlow, run_id: str) -> str:
    """Approve what a run asks, and return the approval's id."""
    [approval] = await app.handle(run_id).approvals()
    await app.approvals.decide(approval.id, {"type": "approve"}, by="ann")
    return approval.id


def steps(scene: Scene, run_id: str) -> Counter[tuple[str, int]]:
    """Count what the outside world saw of a run: steps and the releases that did them."""
    entries = [entry for entry in scene.ledger.entries() if entry.get("run") == run_id]
    return Counter((entry["step"], entry["release"]) for entry in entries)


async def test_rolling_deploy_under_waiting_runs(scene: Scene) -> None:
    where = (scene.url, scene.ledger.address)
    first = scene.forkserver.spawn(WORKER, *where, 1)
    async with released(scene, 1) as old:
        for run_id in ("finished", "decided", "waiting"):
            await old.submit("refund", {"amount": 5.0}, run_id=run_id)
            await scene.parked(run_id)
    second = scene.forkserver.spawn(WORKER, *where, 2)
    async with released(scene, 2) as app:
        # Side by side: each run stays with the code that it began with.
        await app.submit("refund", {"cents": 700}, run_id="r-4711")
        await scene.parked("r-4711")
        await approve(app, "finished")
        await scene.ended(["finished"])
        assert steps(scene, "finished") == {("check", 1): 1, ("notify", 1): 1, ("pay", 1): 1}
        # Without workers of version 1 nobody drives its runs, and that is told.
        first.kill(signal.SIGTERM)
        first.wait(LONG)
        await approve(app, "decided")
        [stranded] = [e for e in await app.list_events() if e.type == "graph.stranded"]
        assert stranded.data == {"graph": "refund", "version": "1", "runs": 2}
        checks = {check.name: check for check in (await app.doctor()).checks}
        assert "1 queued of refund@1" in checks["versions"].message
        # The migration takes decisions along, those that were made and those that were not.
        [asked] = await app.handle("waiting").approvals()
        report = await app.migrate_runs("refund")
        assert [(run.run_id, run.outcome) for run in report.runs] == [
            ("decided", "migrated"),
            ("waiting", "migrated"),
        ]
        assert await approve(app, "waiting") == asked.id
        for run in await scene.ended(["decided", "waiting"]):
            assert (run.output["cents"], run.output["currency"]) == (500, "EUR")
            expected = {("check", 1): 1, ("notify", 1): 1, ("pay", 2): 1}
            assert steps(scene, run.id) == expected
        # Version 2 is changed in place, where its run still has to come to.
        second.kill(signal.SIGTERM)
        second.wait(LONG)
        third = scene.forkserver.spawn(WORKER, *where, 3)
        await approve(app, "r-4711")
        run = await scene.until(lambda: _paused(app, "r-4711"), "the refusal")
        third.kill(signal.SIGTERM)
        third.wait(LONG)
        assert run.error is not None
        documented = re.sub(r"\s+(> )?", " ", DOCS.read_text(encoding="utf-8"))
        assert run.error.message in documented
        assert ("pay", 3) not in steps(scene, "r-4711")
        # The next release has the old name again, and changes what the run has behind it.
        scene.forkserver.spawn(WORKER, *where, 4)
        await app.resume_run("r-4711")
        await scene.ended(["r-4711"])
        assert steps(scene, "r-4711") == {("check", 2): 1, ("notify", 2): 1, ("pay", 4): 1}
        [changed] = [e for e in await app.list_events("r-4711") if e.type == "run.graph_changed"]
        assert changed.data["verdict"] == "behind"
        assert changed.data["changes"] == ["node 'check' has other code"]


async def test_runs_of_a_worker_that_was_killed_are_told_of(scene: Scene) -> None:
    where = (scene.url, scene.ledger.address)
    async with released(scene, 1) as old:
        await old.submit("refund", {"amount": 5.0}, run_id="waiting")
        first = scene.forkserver.spawn(WORKER, *where, 1)
        await scene.parked("waiting")
        second = scene.forkserver.spawn(WORKER, *where, 2, env={"AGENTFLOW_LEASE": "0.3"})

        async def both() -> bool | None:
            return len(await old._store.list_workers("")) == 2 or None

        await scene.until(both, "the second worker")
        first.kill(signal.SIGKILL)
        first.wait(LONG)
        scene.silence("release-1")

        async def told() -> list[Any] | None:
            log = await old.list_events()
            return [e.data for e in log if e.type == "graph.stranded"] or None

        assert await scene.until(told, "the event") == [
            {"graph": "refund", "version": "1", "runs": 1}
        ]
        second.kill(signal.SIGTERM)
        second.wait(LONG)


async def _paused(app: AgentFlow, run_id: str) -> Run | None:
    run = await app.get_run(run_id)
    return run if run.paused_at is not None else None


async def test_migration_goes_on_wherever_its_process_is_killed(scene: Scene) -> None:
    """The approval stays the same one, and no node that has finished runs again."""
    names = {f"run-{number}": place for number, place in enumerate(MIGRATION)}
    asked = {}
    async with released(scene, 1) as old:
        for run_id in names:
            await old.submit("refund", {"amount": 5.0}, run_id=run_id)
            await old.drive(run_id)
            [approval] = await old.handle(run_id).approvals()
            asked[run_id] = approval.id
    for run_id, place in names.items():
        await scene.died(_mover(scene, run_id, "", place))
    scene.expire(names)
    async with released(scene, 2) as app:
        for run_id, place in names.items():
            run = await app.migrate_run(run_id)
            assert (run.version, run.status) == ("2", RunStatus.WAITING), place
            assert await approve(app, run_id) == asked[run_id], place
            run = await app.drive(run_id)
            assert (run.status, run.output["cents"]) == (RunStatus.SUCCEEDED, 500), place
            expected = {("check", 1): 1, ("notify", 1): 1, ("pay", 2): 1}
            assert steps(scene, run_id) == expected, place
            migrated = [e for e in await app.list_events(run_id) if e.type == "run.migrated"]
            assert len(migrated) == 1, place


async def test_run_inside_of_a_subgraph_is_migrated_wherever_that_is_killed(scene: Scene) -> None:
    places = ("migration.carried", "migration.saved")
    asked = {}
    async with released(scene, 1) as old:
        for place in places:
            await old.submit("nested", {"amount": 5.0}, run_id=place)
            await old.drive(place)
            [approval] = await old.handle(place).approvals()
            asked[place] = approval.id
    for place in places:
        await scene.died(_mover(scene, place, "", place))
    scene.expire(places)
    async with released(scene, 2) as app:
        for place in places:
            run = await app.migrate_run(place)
            assert (run.version, run.status) == ("2", RunStatus.WAITING), place
            assert await approve(app, place) == asked[place], place
            assert (await app.drive(place)).status is RunStatus.SUCCEEDED, place
            expected = {("check", 1): 1, ("notify", 2): 1, ("pay", 2): 1}
            assert steps(scene, place) == expected, place


async def test_old_worker_that_finds_a_half_migrated_run_does_not_drive_it(scene: Scene) -> None:
    async with released(scene, 1) as old:
        await old.submit("refund", {"amount": 5.0}, run_id="half")
        await old.drive("half")
        await scene.died(_mover(scene, "half", "", "migration.saved"))
        scene.expire(["half"])
        worker = scene.forkserver.spawn(WORKER, scene.url, scene.ledger.address, 1)
        await scene.until(lambda: _paused(old, "half"), "the refusal")
        worker.kill(signal.SIGTERM)
        worker.wait(LONG)
    async with released(scene, 2) as app:
        run = await app.migrate_run("half")
        assert (run.version, run.status, run.paused_at) == ("2", RunStatus.WAITING, None)
        await approve(app, "half")
        assert (await app.drive("half")).status is RunStatus.SUCCEEDED
    assert steps(scene, "half") == {("check", 1): 1, ("notify", 1): 1, ("pay", 2): 1}


async def test_import_goes_on_wherever_its_process_is_killed(scene: Scene, tmp_path: Path) -> None:
    files: dict[str, tuple[Path, Place | str]] = {}
    async with released(scene, 2, "memory://") as source:
        for number, place in enumerate(IMPORT):
            run_id = f"run-{number}"
            await source.submit("refund", {"cents": 500}, run_id=run_id)
            await source.drive(run_id)
            files[run_id] = (tmp_path / f"{run_id}.json", place)
            files[run_id][0].write_text(json.dumps(await source.export_run(run_id)))
    for run_id, (file, place) in files.items():
        await scene.died(_mover(scene, run_id, str(file), place))
    async with released(scene, 2) as app:
        for run_id, (file, place) in files.items():
            # What was committed is there; anything else is imported by another call.
            if not isinstance(place, Place) or place.moment != "committed":
                await app.import_run(json.loads(file.read_text()))
            await approve(app, run_id)
            assert (await app.drive(run_id)).status is RunStatus.SUCCEEDED, place
            assert steps(scene, run_id) == {
                ("check", 2): 1,
                ("notify", 2): 1,
                ("pay", 2): 1,
            }, place


def _mover(scene: Scene, run_id: str, file: str, place: Place | str) -> Any:
    """Start a process that migrates or imports, and kills itself by SIGKILL at a place."""
    at: Any = place if isinstance(place, str) else place.plain()
    return scene.forkserver.spawn(
        MOVER,
        scene.url,
        scene.ledger.address,
        run_id,
        file,
        at,
        env={"AGENTFLOW_LEASE": str(LONG)},
    )
