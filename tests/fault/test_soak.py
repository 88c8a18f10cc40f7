"""Random faults at random times, on many runs at once: what must hold at the end, holds.

The schedule comes from the seed. A few seconds of it run with every `make test`, minutes with
`make chaos`; in both cases not less than it takes for a run to succeed meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import pytest

from agentflow.errors import AlreadyResolvedError, SupersededError
from agentflow.types import Run, RunStatus
from tests.fault.conftest import IS_FULL, Sampler, Tally
from tests.fault.forkserver import Victim
from tests.fault.graphs import LINEAR
from tests.fault.scene import LEASE, Scene, assert_sound

WORKERS = 3
ABREAST = 12
"""Runs that are unfinished at a time."""
MINUTES = float(os.environ.get("AGENTFLOW_FAULT_MINUTES", "5")) if IS_FULL else 0.1
PAUSES = (0.1, 0.8)
KILLED = 0.6
"""The share of victims that are killed; the others are stopped, and continue later."""


@pytest.mark.timeout(60 * (MINUTES + 3))
async def test_random_kills_and_stops_lose_nothing(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    """Every run ends well, none twice, and each node that was saved is not executed again."""
    soak = Soak(scene, sampler.dice())
    await soak.run(time.monotonic() + 60 * MINUTES)
    runs = [await scene.app.get_run(run_id) for run_id in soak.submitted]
    for run in runs:
        assert run.status is RunStatus.SUCCEEDED, (run.id, run.error)
        assert run.output["log"] == soak.expected(run.id), run.id
    assert_sound(scene.url, soak.submitted)
    done = Counter(run.status for run in soak.under_fire)
    assert done[RunStatus.SUCCEEDED] > 0, "nothing succeeded while the faults were on"
    assert soak.kills > 0
    tally(
        kills=soak.kills,
        zombies=soak.stops,
        runs=len(runs),
        succeeded_under_fire=done[RunStatus.SUCCEEDED],
    )


class Soak:
    """Keeps runs coming and workers dying."""

    def __init__(self, scene: Scene, dice: random.Random) -> None:
        self.kills = self.stops = 0
        self.submitted: dict[str, str] = {}
        """Run id to graph."""
        self.under_fire: list[Run] = []
        self._scene = scene
        self._dice = dice
        self._workers: list[Victim] = []
        scene.deciders.append(self._decide)

    def expected(self, run_id: str) -> list[str]:
        match self.submitted[run_id]:
            case "linear":
                return [f"{node}({run_id})" for node in LINEAR]
            case "loop":
                return [str(number) for number in range(6)]
            case _:
                return [f"{number}: approve" for number in range(3)]

    async def run(self, until: float) -> None:
        """Do harm until then, heal, and wait until every run has ended."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._use(until))
            # Apart from the rest: who uses a SQLite file waits while its stopped writer has it
            # locked.
            group.create_task(self._harm(until, group))
        self.under_fire = [await self._scene.app.get_run(run_id) for run_id in self.submitted]
        while len(self._workers) < WORKERS:
            self._workers.append(self._worker())
        await self._scene.ended(self.submitted)

    def _worker(self) -> Victim:
        # A lease that leaves a machine that is busy with all of this the time to extend it.
        return self._scene.worker(concurrency=4, lease=2 * LEASE)

    async def _has_succeeded(self) -> bool:
        page = await self._scene.app.list_runs(status=RunStatus.SUCCEEDED, limit=1)
        return bool(page.items)

    async def _use(self, until: float) -> None:
        while time.monotonic() < until:
            await self._submit()
            await self._decide()
            await asyncio.sleep(PAUSES[0])

    async def _submit(self) -> None:
        page = await self._scene.app.list_runs(limit=200)
        unfinished = sum(not run.status.is_ended for run in page.items)
        for _ in range(ABREAST - unfinished):
            run_id = f"run-{len(self.submitted)}"
            graph = self._dice.choice(["linear", "linear", "loop", "questions"])
            self.submitted[run_id] = graph
            inputs = {
                "linear": {"input": run_id},
                "loop": {"wanted": 6},
                "questions": {"wanted": 3},
            }
            await self._scene.app.submit(graph, inputs[graph], run_id=run_id)

    async def _harm(self, until: float, group: asyncio.TaskGroup) -> None:
        while time.monotonic() < until or not await self._has_succeeded():
            while len(self._workers) < WORKERS:
                self._workers.append(self._worker())
            await asyncio.sleep(self._dice.uniform(*PAUSES))  # the schedule, not a synchronisation
            victim = self._workers.pop(self._dice.randrange(len(self._workers)))
            if self._dice.random() < KILLED:
                victim.kill()
                await asyncio.to_thread(victim.wait)
                self.kills += 1
            else:
                victim.stop()
                self.stops += 1
                group.create_task(self._resume(victim, self._dice.uniform(1, 6) * LEASE))

    async def _resume(self, zombie: Victim, delay: float) -> None:
        await asyncio.sleep(delay)
        zombie.resume()
        self._workers.append(zombie)

    async def _decide(self) -> None:
        for approval in (await self._scene.app.approvals.list()).items:
            try:
                await self._scene.app.approvals.decide(approval.id, "approve", by="alice")
            except (AlreadyResolvedError, SupersededError):
                continue
