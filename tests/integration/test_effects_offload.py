"""Large outcomes of effects are objects, and come back whatever becomes of those."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.checkpoint import Retention, Saver
from agentflow.checkpoint.collection import GRACE
from agentflow.database.tables import effects
from agentflow.failpoints import arm, disarm
from agentflow.journal import EffectStatus
from agentflow.storage.sql import SqlRunStore
from agentflow.types import Run, RunStatus
from tests.integration.graphs import State, chain
from tests.integration.offloaded import KEEP, Later, objects, once, text
from tests.integration.sealed import ring

LARGE = text("outcome", 900_000)
ONCE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "objects"
    made.mkdir()
    yield made
    disarm()


class Fetch:
    """A node whose effect returns much, and that fails as long as it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails = True

        @effect
        async def fetch() -> str:
            self.calls += 1
            return LARGE

        async def node(state: State) -> State:
            found = await fetch()
            if self.fails:
                raise OSError("no")
            return {"log": [len(found)]}

        self.graph = chain(("a", node))

    def app(self, url: str, folder: Path, **options: Any) -> AgentFlow:
        made = AgentFlow(url, offload=f"file://{folder}", **options)
        made.register(self.graph, name="g", retry=ONCE)
        return made

    async def begin(self, app: AgentFlow) -> None:
        """Call it in a run that fails after that."""
        await app.submit("g", {"log": []}, run_id="r")
        assert (await app.drive("r")).status is RunStatus.FAILED

    async def go_on(self, app: AgentFlow) -> Run:
        self.fails = False
        await app.dead_letters.requeue("r")
        return await app.drive("r")


async def stored(app: AgentFlow) -> int:
    """Return how large the outcome is in its row."""
    store = app._store
    assert isinstance(store, SqlRunStore)
    query = sa.select(sa.func.length(effects.c.outcome))
    return int(await store._database.read(lambda c: c.execute(query).scalar_one()))


async def collect(app: AgentFlow) -> int:
    """Sweep twice, each time later than the grace period; return how many objects went."""
    saver = app._saver
    assert isinstance(saver, Saver)
    gone = [await saver.asweep(KEEP, clock=Later(2 * n * GRACE)) for n in (1, 2)]
    return sum(each.objects for each in gone)


async def test_outcome_is_an_object_until_its_record_is_deleted(
    database_url: str, folder: Path
) -> None:
    fetch = Fetch()
    async with fetch.app(database_url, folder) as app:
        await fetch.begin(app)
        assert len(objects(folder)) == 1
        assert await stored(app) < 1000
        assert await collect(app) == 0
        (record,) = (await app.effects.list(run_id="r")).items
        assert record.outcome == (await app.effects.get(record.id)).outcome == LARGE
        assert (await fetch.go_on(app)).output == {"log": [len(LARGE)]}
        assert fetch.calls == 1
        await asyncio.sleep(0.01)
        await app.sweep(Retention(ttl=0.001))
        assert (await app.effects.list()).items == ()
        assert await collect(app) == 1
    assert objects(folder) == []


async def test_object_that_is_collected_before_its_row_is_stored_is_put_again(
    database_url: str, folder: Path
) -> None:
    fetch = Fetch()
    async with fetch.app(database_url, folder) as app:

        def interfere() -> None:
            (path,) = objects(folder)
            path.unlink()

        arm("objects.stored", once(interfere))
        await fetch.begin(app)
        assert (await fetch.go_on(app)).status is RunStatus.SUCCEEDED
    assert fetch.calls == 1


async def test_outcome_is_kept_in_the_database_if_the_object_store_is_down(
    sqlite_url: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Fetch()
    async with fetch.app(sqlite_url, folder) as app:
        await asyncio.to_thread(folder.rmdir)
        await fetch.begin(app)
        assert "object store has refused it" in caplog.text
        assert await stored(app) > 400_000
        assert (await fetch.go_on(app)).output == {"log": [len(LARGE)]}
    assert fetch.calls == 1


async def test_call_whose_outcome_is_missing_is_not_made_again(
    sqlite_url: str, folder: Path
) -> None:
    fetch = Fetch()
    async with fetch.app(sqlite_url, folder) as app:
        await fetch.begin(app)
        (path,) = objects(folder)
        away = path.rename(path.with_name("away"))
        run = await fetch.go_on(app)
        assert run.error is not None
        assert run.error.type == "agentflow.errors.MissingBlobError"
        away.rename(path)
        assert (await fetch.go_on(app)).status is RunStatus.SUCCEEDED
    assert fetch.calls == 1


async def test_rotation_seals_the_object_anew(sqlite_url: str, folder: Path) -> None:
    fetch = Fetch()
    async with fetch.app(sqlite_url, folder, keys=ring("one")) as app:
        await fetch.begin(app)
        (old,) = objects(folder)
    async with fetch.app(sqlite_url, folder, keys=ring("two", "one")) as app:
        assert (await app.rotate_keys()).is_complete
        os.utime(old, (1, 1))
        assert await collect(app) == 1
        (new,) = objects(folder)
        assert new != old
    async with fetch.app(sqlite_url, folder, keys=ring("two")) as app:
        assert (await fetch.go_on(app)).status is RunStatus.SUCCEEDED
    assert fetch.calls == 1


async def test_exported_run_has_its_outcomes_with_it(
    sqlite_url: str, folder: Path, tmp_path: Path
) -> None:
    fetch = Fetch()
    async with fetch.app(sqlite_url, folder) as app:
        await fetch.begin(app)
        file = json.loads(json.dumps(await app.export_run("r")))
    shutil.rmtree(folder)
    async with AgentFlow(f"sqlite:///{tmp_path / 'other.db'}") as app:
        app.register(fetch.graph, name="g", retry=ONCE)
        await app.import_run(file)
        (record,) = (await app.effects.list(status=EffectStatus.SUCCEEDED)).items
        assert record.outcome == LARGE
        assert (await fetch.go_on(app)).status is RunStatus.SUCCEEDED
    assert fetch.calls == 1
