"""Made `database-v3.sqlite3.gz` and its encrypted twin: rows of the revision 0005.

They have what came with the revisions 0003 to 0005: fingerprints and versions, a run that was
migrated and one that a change of its graph keeps, routes, a pause, effects in all states, forks,
and runs that are undone. Like the others they are never made again. They were made by

    python -c "from tests.golden.database_v3 import make; make()"
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentflow import AgentFlow
from agentflow.errors import IncompatibleGraphError
from agentflow.journal import Effect, EffectStatus
from agentflow.types import DeadLetter, Pause, Route
from tests.golden.graphs_v3 import Old, Outside, order, register
from tests.golden.listing import list_database, show

FOLDER = Path(__file__).parent
FORMS = ("plain", "encrypted")
REVISION = "0005"
"""The revision of the schema that the files have."""
KEYS = f"golden={base64.b64encode(bytes(range(32, 64))).decode()}"
"""What `AGENTFLOW_KEYS` was for the encrypted one."""
NAMES = {"plain": "database-v3", "encrypted": "database-v3-encrypted"}
STATUSES = {
    "waiting": "waiting",
    "decided": "queued",
    "migrated": "waiting",
    "doubted": "waiting",
    "resolved": "queued",
    "undone": "cancelled",
    "undoing": "queued",
    "failed": "failed",
    "kept": "queued",
    "succeeded": "succeeded",
    "inside": "waiting",
    "new": "queued",
    "fork": "queued",
    "killed": "running",
}
"""The status of each run."""


def database_of(form: str) -> Path:
    """Return where a form is."""
    return FOLDER / f"{NAMES[form]}.sqlite3.gz"


def listing_of(form: str) -> Path:
    """Return where everything is that must be found in a form."""
    return FOLDER / f"{NAMES[form]}.json.gz"


def environment(form: str) -> dict[str, str]:
    """Return the environment that a form needs."""
    return {"AGENTFLOW_KEYS": KEYS if form == "encrypted" else ""}


async def ask(app: AgentFlow, run_id: str, **options: Any) -> str:
    """Drive a run to its question, and return that approval's id."""
    given = {"log": [run_id], "amount": 5.5}
    await app.submit("order", given, run_id=run_id, version="1", **options)
    await app.drive(run_id)
    (approval,) = await app.handle(run_id).approvals()
    return approval.id


async def approve(app: AgentFlow, run_id: str) -> None:
    """Bring a run to its question, and approve it."""
    approval = await ask(app, run_id)
    await app.approvals.decide(approval, "approve", by="ann", comment="as agreed")


def write(url: str) -> None:
    """Write everything into the empty database at `url`."""
    asyncio.run(_write(url))
    asyncio.run(_keep(url))
    command = "from tests.golden import database_v3 as v3; import sys; v3.die(sys.argv[1])"
    died = subprocess.run([sys.executable, "-c", command, url], check=False, cwd=FOLDER.parents[1])
    assert died.returncode == -9


async def _write(url: str) -> None:
    async with AgentFlow(url) as app:
        outside = Outside()
        register(app, outside)
        await ask(app, "waiting", metadata={"team": "a"})
        await approve(app, "decided")
        await ask(app, "migrated")
        await app.migrate_run("migrated", by="ann")
        outside.hangs = "pay"
        for run_id in ("doubted", "resolved"):
            await approve(app, run_id)
            await app.drive(run_id)
        outside.hangs = ""
        (doubt,) = [
            each
            for each in (await app.effects.list(run_id="resolved")).items
            if each.status is EffectStatus.INTENDED
        ]
        await app.effects.resolve(
            doubt.id, happened=True, outcome="a receipt", by="bob", comment="the bank says so"
        )
        await ask(app, "undone")
        await app.cancel("undone", reason="changed their mind", by="ann")
        await app.drive("undone")
        await ask(app, "undoing")
        await app.cancel("undoing", by="ann")
        await approve(app, "failed")
        outside.is_up = False
        await app.drive("failed")
        outside.is_up = True
        await approve(app, "succeeded")
        await app.drive("succeeded")
        await app.submit("nested", {"log": ["inside"]}, run_id="inside")
        await app.drive("inside")
        await app.route("order", "2", 0.25, by="ann")
        await app.submit("order", {"log": ["new"], "cents": 7}, run_id="new", version="2")
        waiting = await app.get_run("waiting")
        assert waiting.checkpoint_id is not None
        await app.fork("waiting", waiting.checkpoint_id, new_run_id="fork")
        await app.pause(queue="night", reason="maintenance", by="ann")


async def _keep(url: str) -> None:
    """Have a run refused by a program in which a node was renamed."""
    async with AgentFlow(url) as app:
        register(app, Outside())
        await approve(app, "kept")
    async with AgentFlow(url) as app:
        app.register(order(Outside(), "approve", Old, last="wire"), name="order", version="1")
        with suppress(IncompatibleGraphError):
            await app.drive("kept")


def die(url: str) -> None:
    """Drive a run whose call kills its process."""

    async def drive() -> None:
        async with AgentFlow(url) as app:
            register(app, Outside(kills="pay"))
            await approve(app, "killed")
            await app.drive("killed")

    asyncio.run(drive())


async def list_all(url: str) -> dict[str, Any]:
    """List what `list_database` does, and what came later."""
    listing = await list_database(url, tenants=("",))
    async with AgentFlow(url) as app:
        runs = [await app.get_run(run_id) for run_id in STATUSES]
        effects = (await app.effects.list(limit=100)).items
        return {
            **listing,
            "versions": {run.id: [run.version, run.fingerprint] for run in runs},
            "pauses": {run.id: show(run.paused_at) for run in runs},
            "sagas": {run.id: run.saga for run in runs},
            "origins": {run.id: run.forked_from for run in runs},
            "effects": [_show_effect(each) for each in effects],
            "letters": [_show_letter(each) for each in (await app.dead_letters.list()).items],
            "routes": [_show_route(each) for each in await app.list_routes()],
            "paused": [_show_pause(each) for each in await app.list_pauses()],
            "log": [[e.type, show(e.data), e.hash] for e in await app.list_events(limit=1000)],
        }


def _show_effect(effect: Effect) -> dict[str, Any]:
    failure = effect.failure
    return {
        "id": effect.id,
        "run": effect.run_id,
        "scope": effect.scope,
        "graph": effect.graph,
        "name": effect.name,
        "key": effect.key,
        "arguments": show(dict(effect.arguments)),
        "place": [effect.ns, effect.task_id, effect.node],
        "status": effect.status.value,
        "attempt": effect.attempt,
        "by": [effect.worker, effect.token],
        "on_in_doubt": effect.on_in_doubt,
        "compensate": effect.compensate,
        "order": effect.order,
        "outcome": show(effect.outcome),
        "failure": failure and [failure.type, failure.message],
        "resolved": [effect.resolved_by, effect.comment],
        "times": show([effect.intended_at, effect.ended_at]),
    }


def _show_letter(letter: DeadLetter) -> dict[str, Any]:
    return {
        "run": letter.run_id,
        "graph": f"{letter.graph}@{letter.version}",
        "reason": letter.reason,
        "cause": [letter.cause.type, letter.cause.message, letter.cause.node],
        "counts": [letter.attempts, letter.claims, letter.step],
        "checkpoint": letter.checkpoint_id,
        "at": show(letter.at),
    }


def _show_route(route: Route) -> dict[str, Any]:
    return {"graph": route.graph, "version": route.version, "share": route.share, "by": route.by}


def _show_pause(pause: Pause) -> dict[str, Any]:
    return {"scope": pause.scope, "name": pause.name, "reason": pause.reason, "by": pause.by}


def make() -> None:
    """Make all files; only a program of this revision may."""
    from agentflow.database import migrate

    assert migrate.HEAD == REVISION
    for form in FORMS:
        os.environ.update(environment(form))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "golden.db"
            url = f"sqlite:///{file}"
            write(url)
            listing = asyncio.run(list_all(url))
            assert [each.name for each in Path(folder).iterdir()] == [file.name]
            database_of(form).write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        text = json.dumps(listing, ensure_ascii=False)
        listing_of(form).write_bytes(gzip.compress(text.encode(), mtime=0))
