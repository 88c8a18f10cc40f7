"""A key service that does not answer holds up only those who need it, and only for as long."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.errors import KeyUnavailableError
from agentflow.keys import KeyRing
from agentflow.storage.sql import SqlRunStore
from agentflow.testing.clock import VirtualClock
from agentflow.types import RunStatus
from tests.conformance.runs import claim_all, create, types_of_events
from tests.integration.sealed import fill, open_app, ring, secret


class Service:
    """A key service."""

    is_down = True

    def ring(self, current: str) -> KeyRing:
        """Make a ring that has one key, and asks for the others."""
        return KeyRing([(current, secret(current))], lookup=self)

    def __call__(self, name: str) -> bytes | None:
        if self.is_down:
            raise ConnectionError(f"no answer about {name}, says a text with {secret(name)!r}")
        return secret(name)


def open_store(url: str, keys: KeyRing, clock: VirtualClock) -> SqlRunStore:
    database = Database(url, Settings())
    return SqlRunStore(database, codec=Codec(keys=keys), owns_database=True, clock=clock)


async def test_runs_that_need_another_key_are_put_back_and_the_others_go_on(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, service = VirtualClock(), Service()
    before = open_store(database_url, ring("one"), clock)
    await create(before, "old", priority=9)
    await before.close()
    store = open_store(database_url, service.ring("two"), clock)
    await create(store, "new")
    assert [claimed.run.id for claimed in await claim_all(store)] == ["new"]
    (told,) = caplog.records
    assert (told.__dict__["run_id"], told.__dict__["error"]) == ("old", "KeyUnavailableError")
    assert "says a text" not in str(told.__dict__)
    with pytest.raises(KeyUnavailableError, match="ConnectionError"):
        await store.get_run("", "old")
    assert await claim_all(store) == [], "it is left alone for a while"
    assert len(caplog.records) == 1
    service.is_down = False
    clock.advance(timedelta(minutes=1))
    assert [claimed.run.id for claimed in await claim_all(store)] == ["old"]
    assert await types_of_events(store, "old") == ["run.submitted", "run.unreadable", "run.claimed"]
    await store.close()


async def test_attempt_that_needs_another_key_is_free_and_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, service = f"sqlite:///{tmp_path}/runs.db", Service()
    async with open_app(url, ring("one")) as app:
        await fill(app)
        (asked,) = await app.handle("waiting").approvals()
        await app.approvals.decide(asked.id, "approve", by="ann")
        graphs = {name: each.graph for (name, _), each in app.graphs.items()}
    saver: Any = open_checkpointer(url, keys=service.ring("two"))
    clock = VirtualClock()
    async with AgentFlow(url, keys=ring("one"), checkpoints=saver, clock=clock) as app:
        app.register(graphs["refund"], name="refund")
        async with app.worker():
            async for event in app.events("waiting"):
                if event.type == "run.released":
                    break
        run = await app.get_run("waiting")
        assert (run.status, run.attempt, run.error) == (RunStatus.QUEUED, 0, None)
        assert "its key cannot be had" in caplog.text
        assert run.available_at >= clock.now() + timedelta(minutes=1)
        service.is_down = False
        clock.advance(timedelta(minutes=1))
        assert (await app.drive("waiting")).status is RunStatus.SUCCEEDED
