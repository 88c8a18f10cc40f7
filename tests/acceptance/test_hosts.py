"""A run needs nothing but the shared store: neither the machine that began it, nor a process."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from agentflow import AgentFlow
from agentflow.config import Settings
from agentflow.database.engine import now
from agentflow.database.tables import runs, waits
from agentflow.types import NextDue
from tests.acceptance.victims import HOST, NODES, done, interview
from tests.fault.forkserver import ForkServer
from tests.fault.scene import connected

SUSPENDED = 10_000
SECONDS = 10
LOOKS = round(SECONDS / Settings().poll_interval.total_seconds())
"""What an idle worker does in that time, unless it is told otherwise: it looks for work."""
FEW = 10
IDLE = 0.02
"""The share of that time for which its process may be at work."""


async def test_run_goes_on_when_the_machine_that_began_it_is_lost_with_its_disk(
    database_url: str, tmp_path: Path, forkserver: ForkServer
) -> None:
    trace = str(tmp_path / "trace.txt")

    async def run_on(folder: Path, **options: Any) -> int:
        await asyncio.to_thread(folder.mkdir)
        env = {"HOME": str(folder), "TMPDIR": str(folder), "AGENTFLOW_LEASE": "60"}
        machine = forkserver.spawn(HOST, database_url, trace, str(folder), options, env=env)
        return await asyncio.to_thread(machine.wait, 60)

    first, second = tmp_path / "first", tmp_path / "second"
    assert await run_on(first, die_in="d") == -signal.SIGKILL
    assert {path.name for path in first.iterdir()} == {f"scratch-{name}" for name in "abcd"}
    shutil.rmtree(first)
    expire(database_url)
    assert await run_on(second) == 0
    assert done(trace) == [*"abcd", *"def"]
    async with AgentFlow(database_url) as app:
        assert (await app.handle("r").result())["log"] == list(NODES)


async def test_ten_thousand_suspended_runs_cost_a_worker_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_POLL_INTERVAL", "0.005")
    trace = str(tmp_path / "trace.txt")
    async with AgentFlow(database_url) as app:
        app.register(interview(trace), name="interview")
        looks = Looks(app)
        async with app.worker():
            handle = await app.submit("interview", {"log": []}, run_id="r")
            await handle.wait(until="parked", timeout=30)
            await looks.wait_for(FEW)
            before = held()
            suspend_more(database_url)
            await looks.wait_for(FEW)
            began = time.process_time()
            await looks.wait_for(LOOKS)
            worked = time.process_time() - began
            assert max(held()[what] - before[what] for what in before) < FEW
            assert worked < IDLE * SECONDS
            (approval,) = await handle.approvals()
            await app.approvals.decide(approval.id, "approve", by="ada")
            assert (await handle.result(timeout=30))["log"] == ["a", {"amount": 5}, "c"]
        assert count_waiting(database_url) == SUSPENDED
    assert done(trace) == ["a", "c"], "of one run"


class Looks:
    """Counts how often the workers of an app look for work."""

    def __init__(self, app: AgentFlow) -> None:
        self._look = app._store.next_due
        self._looked = asyncio.Semaphore(0)
        app._store.next_due = self._count  # type: ignore[method-assign]  # counted, and made

    async def _count(self, *args: Any, **options: Any) -> NextDue:
        self._looked.release()
        return await self._look(*args, **options)

    async def wait_for(self, count: int) -> None:
        """Wait until there were so many more."""
        while self._looked._value:
            await self._looked.acquire()
        for _ in range(count):
            await self._looked.acquire()


def held() -> dict[str, int]:
    """Count what this process has."""
    process = psutil.Process()
    return {
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
        "connections": len(process.net_connections()),
        "files": len(process.open_files()),
    }


def suspend_more(url: str) -> None:
    """Have as many runs wait as the first one does, each for an answer of its own."""
    first = sa.select(sa.literal(1).label("number")).cte(recursive=True)
    following = sa.select(first.c.number + 1).where(first.c.number < SUSPENDED)
    numbers = first.union_all(following)
    with connected(url) as connection:
        for table in (runs, waits):
            columns = [column for column in table.c if column.name != "seq"]
            own = {"run_id", "thread_id", "wait_id"}
            made = [
                column + sa.cast(numbers.c.number, sa.Text) if column.name in own else column
                for column in columns
            ]
            each = sa.select(*made).select_from(table.join(numbers, numbers.c.number > 0))
            names = [column.name for column in columns]
            connection.execute(sa.insert(table).from_select(names, each))
        connection.commit()


def count_waiting(url: str) -> int:
    """Count the runs that wait."""
    with connected(url) as connection:
        waiting = sa.select(sa.func.count()).where(runs.c.status == "waiting")
        return int(connection.execute(waiting).scalar_one())


def expire(url: str) -> None:
    """Let the time of all leases pass."""
    with connected(url) as connection:
        connection.execute(sa.update(runs).values(lease_expires_at=now(connection)))
        connection.commit()
